"""What vLLM cannot do, in words that help: memory at the start, requests that fail, runs that break off."""

import types

import pytest
import torch

from grpo_fast.batch import Sampling
from grpo_fast.generation import EngineError
from grpo_fast.generation.vllm_faults import check_request, explained_start
from tests.vllm_engines import GREEDY, PROMPTS, make_trainer, start, tiny

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]

GIB = 2**30


def at_forward(engine, number, action):
    """Run `action` in vLLM's model, inside its `number`-th forward from here; returns the hook's handle."""
    count = iter(range(1, 10**9))

    def hook(module, args, kwargs):
        if next(count) == number:
            action()

    return engine.llm.apply_model(lambda model: model.register_forward_pre_hook(hook, with_kwargs=True))[0]


def fail(error):
    def action():
        raise error

    return action


# -- start -------------------------------------------------------------------------------------------------------------


def test_the_message_for_a_small_cache_names_what_is_enough():
    model = tiny()
    with pytest.raises(EngineError, match="vLLM did not start") as error:
        # of a context of 64 tokens one block fits
        start(model, kv_cache_memory_bytes=40_000)
    message = str(error.value)
    needed = int(message.split("kv_cache_memory_bytes in vllm_engine_kwargs to at least ")[1].split(",")[0])
    length = int(message.split("vllm_max_model_length to at most ")[1].split(",")[0])
    assert "it is 40000; or lower" in message
    assert message.endswith("it is None, the whole context of the model")
    assert isinstance(error.value.__cause__, ValueError)
    assert 0 < length < 64
    start(model, kv_cache_memory_bytes=needed).close()
    start(model, kv_cache_memory_bytes=40_000, max_model_len=length).close()


def vllm_error(raises):
    """What a function of vLLM itself raises."""
    try:
        raises()
    except Exception as error:
        return error


def full_device():
    from vllm.v1.worker.utils import request_memory

    snapshot = types.SimpleNamespace(
        free_memory=17 * GIB, total_memory=80 * GIB, device_="cuda:0", device="cuda:0", torch_memory=0
    )
    request_memory(snapshot, types.SimpleNamespace(gpu_memory_utilization=0.3, kv_cache_memory_bytes=None))


def no_blocks():
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    _check_enough_kv_cache_memory(0, lambda: 1, 64, lambda available: 0)


def few_blocks():
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    _check_enough_kv_cache_memory(1, lambda: 2 * GIB, 64, lambda available: 0)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("raises", "words"),
    [
        (full_device, ["17 of the device's 80 GiB", "vllm_gpu_memory_utilization to at most 0.21, it is 0.3"]),
        (no_blocks, ["raise vllm_gpu_memory_utilization", "it is 0.3"]),
        (few_blocks, ["raise vllm_gpu_memory_utilization (it is 0.3)", "to at least 4096"]),
        (out_of_memory, ["weights take 3 MiB", "max_num_seqs (it is 8)", "enforce_eager=True"]),
        (fail(ValueError("Unknown argument")), []),
    ],
    ids=["device", "no blocks", "few blocks", "allocation", "another"],
)
def test_vllms_own_errors_are_told_in_the_trainers_settings(raises, words):
    arguments = {
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": None,
        "max_model_len": None,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 4096,
    }
    message = explained_start(vllm_error(raises), arguments, sequence_bytes=4096, weight_bytes=3 * 2**20)
    assert all(word in message for word in words), message
    assert bool(message) == bool(words)


# -- generation --------------------------------------------------------------------------------------------------------


def closed(engine, reason):
    with pytest.raises(EngineError, match=f"engine is closed: .*{reason}"):
        engine.generate(PROMPTS, GREEDY)
    with pytest.raises(EngineError, match="engine is closed"):
        engine.update_weights(tiny())
    return engine.llm is None and not torch.distributed.is_initialized()


def test_a_log_prob_that_is_no_number_is_refused():
    model = tiny()
    engine = start(model)
    with torch.no_grad():
        # the embedding of a token that the second prompt alone has, and no other can draw
        model.get_input_embeddings().weight[10].fill_(torch.nan)
    engine.update_weights(model)
    rows = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    with pytest.raises(EngineError, match="log-prob nan for token 0 of a completion of prompt 2: the policy's weights"):
        engine.generate(rows, Sampling(max_tokens=4, seed=1, extra={"allowed_token_ids": [5, 6, 7]}))
    assert closed(engine, "prompt 2")


def test_what_vllm_refuses_leaves_the_engine_as_it_was():
    from vllm.exceptions import VLLMValidationError

    engine = start(tiny())
    first = engine.generate(PROMPTS, GREEDY)
    with pytest.raises(VLLMValidationError, match="out-of-vocab token id"):
        engine.generate(PROMPTS, Sampling(max_tokens=4, extra={"allowed_token_ids": [10_000]}))
    assert engine.generate(PROMPTS, GREEDY) == first
    at_forward(engine, 2, fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, GREEDY)
    assert closed(engine, "KeyboardInterrupt while vLLM generated")


def test_a_request_that_does_not_finish_is_named():
    def output(*reasons):
        return types.SimpleNamespace(
            outputs=[types.SimpleNamespace(index=i, token_ids=[5, 6], finish_reason=r) for i, r in enumerate(reasons)]
        )

    check_request(output("stop", "length", "repetition"), {1, 3}, prompt=4)
    with pytest.raises(EngineError, match="2 completions of prompt 4, asked for were 3"):
        check_request(output("stop", "stop"), {1, 3}, prompt=4)
    for reason in ("abort", "error", None):
        with pytest.raises(EngineError, match=f"completion 1 of prompt 4: its finish_reason is {reason!r} after 2"):
            check_request(output("stop", reason), {1, 2}, prompt=4)


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_a_run_that_breaks_off_resumes_from_its_last_checkpoint(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    whole.engine.close()

    # memory that comes and goes changes nothing
    # without checks every call of `generate` is a rollout
    broken = make_trainer(tmp_path / "broken", vllm_enable_sleep_mode=True, vllm_check_interval=0)
    # each rollout takes at most 8 forwards: in the middle of the third
    hooks = []
    generate = broken.engine.generate

    def count(*args, **kwargs):
        hooks.append(1)
        if len(hooks) == 3:
            at_forward(broken.engine, 2, fail(RuntimeError("device-side assert")))
        return generate(*args, **kwargs)

    broken.engine.generate = count
    with pytest.raises(EngineError) as error:
        broken.train()
    message = str(error.value)
    assert message.startswith("in the rollout for step 3: RuntimeError while vLLM generated: device-side assert")
    assert message.endswith("resume_from_checkpoint={!r}".format(str(tmp_path / "broken" / "checkpoint-2")))
    assert broken.engine.llm is None

    resumed = make_trainer(tmp_path / "broken", vllm_enable_sleep_mode=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    for ours, theirs in zip(weights_of(resumed), weights_of(whole), strict=True):
        assert torch.equal(ours, theirs)
    resumed.engine.close()
