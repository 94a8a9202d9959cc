"""The engine's memory: taken for a rollout and given back after it, on a CPU for real."""

import gc
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_fast.batch import Sampling
from grpo_fast.generation import EngineError
from tests.tiny_lm import make_model
from tests.vllm_engines import GREEDY, PROMPTS, make_trainer, rss, start, tiny, variety

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]

MIB = 2**20
KV_BYTES = 64 * MIB
# what else may move while 64 MiB come and go
RSS_SLACK = 8 * MIB
DRAWN = Sampling(max_tokens=8, seed=3)


def kv_bytes(engine):
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in worker.model_runner.kv_caches})


@pytest.fixture(scope="module")
def sleeper():
    engine = start(tiny(), kv_cache_memory_bytes=KV_BYTES, enable_sleep_mode=True)
    yield engine
    engine.close()


def test_the_cache_is_there_inside_awake_only_and_completions_do_not_change(sleeper):
    first = sleeper.generate(PROMPTS, DRAWN)
    assert kv_bytes(sleeper) == 0
    before = rss()
    with sleeper.awake():
        assert kv_bytes(sleeper) == pytest.approx(KV_BYTES, rel=0.01)
        assert rss() - before > KV_BYTES - RSS_SLACK
        # several calls share the cache, and a script may call vLLM itself
        assert sleeper.generate(PROMPTS, DRAWN) == first
        assert len(sleeper.llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)[0].outputs[0].token_ids) > 0
        assert kv_bytes(sleeper) == pytest.approx(KV_BYTES, rel=0.01)
    assert kv_bytes(sleeper) == 0
    assert rss() - before < RSS_SLACK
    # the cached block of the first prompt is gone: reading it would give other log-probs
    assert sleeper.generate(PROMPTS, DRAWN) == first


def test_weights_are_updated_while_it_sleeps(sleeper):
    model = tiny(seed=1)
    before = sleeper.generate(PROMPTS, GREEDY)
    sleeper.update_weights(model)
    after = sleeper.generate(PROMPTS, GREEDY)
    assert after.ids != before.ids
    plain = start(model)
    assert plain.generate(PROMPTS, GREEDY).ids == after.ids
    plain.close()


def test_the_memory_comes_back_after_an_error_inside_awake(sleeper):
    with pytest.raises(KeyError), sleeper.awake():
        raise KeyError
    assert kv_bytes(sleeper) == 0


def test_fifty_cycles_do_not_grow(sleeper):
    first = sleeper.generate(PROMPTS, DRAWN)
    before = rss()
    for _ in range(50):
        assert sleeper.generate(PROMPTS, DRAWN) == first
    assert rss() - before < RSS_SLACK


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"enable_sleep_mode": True, "vllm_engine_kwargs": {"worker_cls": "x.Y"}}, "brings its own worker_cls"),
        ({"vllm_engine_kwargs": {"enable_sleep_mode": True}}, "must not hold 'enable_sleep_mode'.*set vllm_enable_sl"),
    ],
)
def test_arguments_that_sleep_forbids_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        start(tiny(), **kwargs)


def test_the_gpu_worker_keeps_weights_out_of_the_pool_that_sleep_takes():
    from vllm.v1.worker.gpu_worker import Worker

    from grpo_fast.generation.vllm_gpu_worker import ResidentWeightsWorker

    pools = []

    class Recorded(ResidentWeightsWorker):
        def __init__(self):
            pass

    # what there is to override, and what vLLM would do with the tag
    theirs = vars(Worker)["_maybe_get_memory_pool_context"]
    try:
        Worker._maybe_get_memory_pool_context = lambda self, tag: pools.append(tag) or nullcontext("pool")
        assert Recorded()._maybe_get_memory_pool_context("weights").__enter__() is None
        with Recorded()._maybe_get_memory_pool_context("kv_cache") as pool:
            assert pool == "pool"
    finally:
        Worker._maybe_get_memory_pool_context = theirs
    # vLLM's check that the pool has one user runs on weights
    assert pools == ["weights", "kv_cache"]


def test_a_rollout_takes_the_cache_once_and_training_runs_without_it(tmp_path):
    sleeps, held = [], {"rollout": [], "reward": []}

    def reward(completions, **kwargs):
        held["reward"].append(kv_bytes(trainer.engine))
        return variety(completions)

    def rollout(prompts, trainer):
        """A script's own turns: through vLLM itself and through TRL's name for the engine."""
        ids = trainer.processing_class(prompts)["input_ids"]
        trainer.vllm_generation.llm.generate([{"prompt_token_ids": row} for row in ids], use_tqdm=False)
        held["rollout"].append(kv_bytes(trainer.engine))
        prompt_ids, completion_ids, logps, _ = trainer.vllm_generation.generate(ids)
        held["rollout"].append(kv_bytes(trainer.engine))
        logprobs = [[token[0] for token in row] for row in logps]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    settings = {"vllm_enable_sleep_mode": True, "save_strategy": "no", "max_steps": 2}
    trainer = make_trainer(tmp_path, reward=reward, rollout_func=rollout, **settings)
    assert kv_bytes(trainer.engine) == 0
    sleep = trainer.engine.llm.sleep
    trainer.engine.llm.sleep = lambda level: sleeps.append(level) or sleep(level)
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    # two training batches, and an evaluation of two prompts with four completions each
    assert len(held["rollout"]) == 6
    assert all(held["rollout"])
    assert held["reward"] == [0] * 3
    assert len(sleeps) == 3
    # a script's own call between rollouts; a sleeping vLLM would wait for ever
    assert trainer.vllm_generation.llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
    assert kv_bytes(trainer.engine)
    trainer.engine.generate(PROMPTS, GREEDY)
    assert kv_bytes(trainer.engine) == 0
    trainer.engine.close()


# -- the engine's own copies of weights --------------------------------------------------------------------------------


def unpadded(seed=0):
    """A model whose vocabulary vLLM need not pad, so that copies fill all of the engine's weights."""
    return make_model(seed=seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)


def weight_bytes(engine):
    (tensors,) = engine.llm.apply_model(lambda target: list(target.parameters()))
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in tensors})


def nbytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def train(model, seed=0):
    """Move the policy so far that its greedy completions change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


@pytest.fixture(scope="module")
def halves():
    """An fp32 policy with two bf16 engines: one that sleeps, one that does not."""
    model = unpadded()
    sleeper, plain = (start(model, dtype=torch.bfloat16, enable_sleep_mode=sleeps) for sleeps in (True, False))
    yield model, sleeper, plain
    sleeper.close()
    plain.close()


def test_copies_of_weights_are_there_inside_awake_only(halves):
    model, sleeper, _ = halves
    half = nbytes(model) // 2
    # a look at `llm` does not wake it
    assert weight_bytes(sleeper) == 0
    with sleeper.awake(), sleeper.awake():
        assert weight_bytes(sleeper) == half
        sleeper.generate(PROMPTS, GREEDY)
        assert weight_bytes(sleeper) == half
    assert weight_bytes(sleeper) == 0


def test_completions_are_those_of_an_engine_that_stays_awake(halves):
    model, sleeper, plain = halves
    outputs = [plain.generate(PROMPTS, DRAWN)]
    assert sleeper.generate(PROMPTS, DRAWN) == outputs[0]
    for seed in range(3):
        train(model, seed)
        plain.update_weights(model)
        outputs.append(plain.generate(PROMPTS, DRAWN))
        assert outputs[-1].ids != outputs[-2].ids
        if seed == 0:
            sleeper.update_weights(model)
            assert sleeper.generate(PROMPTS, DRAWN) == outputs[-1]
        with sleeper.awake():
            sleeper.update_weights(model)
            assert sleeper.copied_bytes == nbytes(model) // 2
            for _ in range(2):
                assert sleeper.generate(PROMPTS, DRAWN) == outputs[-1]


def test_frozen_weights_are_filled_again(halves):
    model, sleeper, plain = halves
    for parameter in model.model.layers.parameters():
        parameter.requires_grad = False
    for seed in range(2):
        train(model, seed)
        for engine in (sleeper, plain):
            engine.update_weights(model)
        assert sleeper.generate(PROMPTS, DRAWN) == plain.generate(PROMPTS, DRAWN)
    model.requires_grad_(True)


def test_weights_are_copied_once_a_rollout(halves, monkeypatch):
    model, sleeper, _ = halves
    copies, update = [], sleeper.weights.update
    monkeypatch.setattr(sleeper.weights, "update", lambda model: copies.append(1) or update(model))
    sleeper.update_weights(model)
    assert not copies
    with sleeper.awake():
        sleeper.update_weights(model)
        sleeper.check_weights()
        sleeper.generate(PROMPTS, GREEDY)
        sleeper.generate(PROMPTS, GREEDY)
    assert len(copies) == 1


def direct(llm):
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[1])
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, settings, use_tqdm=False)]


def test_no_step_of_vllm_runs_without_weights(halves):
    model, sleeper, plain = halves
    train(model, seed=5)
    plain.update_weights(model)
    expected = direct(plain.llm)
    # a script's own handle, which no update comes before
    llm = sleeper.llm
    with sleeper.awake():
        assert direct(llm) == expected
    sleeper.wake()
    assert direct(llm) == expected
    sleeper.generate(PROMPTS, GREEDY)
    assert weight_bytes(sleeper) == 0


def test_weights_are_checked_while_it_sleeps(halves):
    model, sleeper, plain = halves
    sleeper.check_weights()
    assert weight_bytes(sleeper) == 0
    with sleeper.awake():
        sleeper.update_weights(model)
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        with pytest.raises(RuntimeError, match=r"lm_head\.weight: its rows are not the policy's"):
            sleeper.check_weights()
    plain.update_weights(model)


def test_no_optimizer_writes_what_is_not_there(halves):
    model, sleeper, plain = halves
    assert sleeper.shadows() == {}
    assert set(plain.shadows()) == set(model.parameters())
    # said of an engine that has none: the next rollout copies all the same
    train(model, seed=7)
    with sleeper.awake():
        sleeper.shadows_written()
        plain.update_weights(model)
        assert sleeper.generate(PROMPTS, DRAWN) == plain.generate(PROMPTS, DRAWN)


def test_a_failure_between_taking_and_filling_leaves_nothing_behind(halves, monkeypatch):
    model, sleeper, plain = halves
    train(model, seed=8)
    plain.update_weights(model)

    def fail(model):
        raise ValueError("no adapter of this kind")

    with monkeypatch.context() as patch:
        patch.setattr(sleeper.weights, "update", fail)
        with pytest.raises(ValueError, match="no adapter of this kind"):
            sleeper.generate(PROMPTS, DRAWN)
    assert weight_bytes(sleeper) == kv_bytes(sleeper) == 0
    assert sleeper.generate(PROMPTS, DRAWN) == plain.generate(PROMPTS, DRAWN)


@pytest.mark.parametrize("is_awake", [False, True])
def test_an_engine_ends_asleep_or_awake_and_leaves_the_policy_whole(is_awake):
    model = unpadded(seed=2)
    before = [parameter.clone() for parameter in model.parameters()]
    engine = start(model, dtype=torch.bfloat16, enable_sleep_mode=True)
    with engine.awake() if is_awake else nullcontext():
        engine.close()
    with pytest.raises(EngineError, match="is closed"):
        engine.generate(PROMPTS, GREEDY)
    engine.close()
    del engine
    gc.collect()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_padded_and_shared_weights_stay():
    model = tiny()
    # of one piece of memory that also holds shared weights
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj", "down_proj"], init_lora_weights=False))
    merged = {"vllm_engine_kwargs": {"enable_lora": False}}
    expected = start(model, **merged)
    drawn = expected.generate(PROMPTS, DRAWN)
    expected.close()
    engine = start(model, enable_sleep_mode=True, **merged)
    half = start(model, dtype=torch.bfloat16, enable_sleep_mode=True, **merged)
    try:
        base = model.get_base_model()
        rows = base.get_input_embeddings().weight.shape[0]
        # vLLM pads to 64 rows
        assert rows < 64
        assert weight_bytes(half) == 2 * 64 * 64 * 2
        down = sum(layer.mlp.down_proj.base_layer.weight.nbytes for layer in base.model.layers)
        with engine.awake():
            awake = weight_bytes(engine)
        # the merged ones alone; of queries, keys and values only the values are merged
        assert weight_bytes(engine) == awake - down
        assert engine.generate(PROMPTS, DRAWN) == drawn
    finally:
        engine.close()
        half.close()


def test_a_run_is_that_of_an_engine_that_stays_awake(tmp_path):
    weights = {}
    for sleeps in (True, False):
        settings = {"bf16": True, "vllm_enable_sleep_mode": sleeps, "save_strategy": "no", "max_steps": 2}
        trainer = make_trainer(tmp_path, model=unpadded(seed=3), **settings)
        trainer.train()
        if sleeps:
            assert weight_bytes(trainer.engine) == 0
            copied = [line["sync/copied_mib"] for line in trainer.state.log_history if "sync/copied_mib" in line]
            assert copied == pytest.approx([nbytes(trainer.model) / 2 / MIB])
        weights[sleeps] = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        trainer.engine.close()
    # plain AdamW, and one that writes shadows
    assert torch.equal(weights[True], weights[False])
