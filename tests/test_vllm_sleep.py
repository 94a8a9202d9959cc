"""The KV cache's memory: taken for a rollout and given back after it, on a CPU for real."""

from contextlib import nullcontext

import pytest

from grpo_fast.batch import Sampling
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
