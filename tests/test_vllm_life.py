"""How a vLLM engine comes and goes: what it leaves in the process, and what it needs of other engines."""

import gc
import random
import sys
import weakref

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grpo_fast.generation import EngineError
from tests.vllm_engines import GREEDY, PROMPTS, make_trainer, rss, start, tiny

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]


def test_engines_of_one_process_end_independently():
    engines = [start(tiny(seed)) for seed in (0, 1)]
    outputs = [engine.generate(PROMPTS, GREEDY) for engine in engines]
    assert outputs[0].ids != outputs[1].ids
    assert engines[0].generate(PROMPTS, GREEDY) == outputs[0]
    engines[0].close()
    assert engines[1].generate(PROMPTS, GREEDY) == outputs[1]
    engines.append(start(tiny(0)))
    engines[1].close()
    assert engines[2].generate(PROMPTS, GREEDY) == outputs[0]
    engines[2].close()
    assert not torch.distributed.is_initialized()


def test_the_trainers_own_process_group_outlives_the_engine(tmp_path):
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        start(tiny()).close()
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_process_group_that_ends_first_harms_nothing():
    engine = start(tiny())
    torch.distributed.destroy_process_group()
    engine.close()
    engine = start(tiny())
    assert engine.generate(PROMPTS, GREEDY).ids
    engine.close()


def test_a_dropped_engine_is_stopped():
    class Owner:
        pass

    owner = Owner()
    # made before the engine, whose start must not hide the cycle from the garbage collector
    owner.itself = owner
    owner.engine = start(tiny())
    assert torch.distributed.is_initialized()
    refs = [weakref.ref(owner), weakref.ref(owner.engine), weakref.ref(owner.engine.llm)]
    del owner
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    assert not torch.distributed.is_initialized()


def test_a_start_that_fails_leaves_nothing():
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.v1.engine.core import EngineCore

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), sys.excepthook]
    model = tiny()
    torch.manual_seed(3)
    with pytest.raises(EngineError) as error:
        start(model, kv_cache_memory_bytes=1000)
    after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), sys.excepthook]
    assert after == before
    assert not torch.distributed.is_initialized()
    gc.collect()
    # though the error, and with it vLLM's own, is still held
    assert error.value.__cause__ is not None
    assert not [core for core in gc.get_objects() if type(core) is EngineCore]
    assert not [name for name in _LOAD_FORMAT_TO_MODEL_LOADER if name.startswith("grpo_fast_")]


# the allocator's; measured over 30 engines, memory moves within it and does not grow
SLACK_BYTES = 10 * 2**20
# the tracebacks that torch keeps of each seeding of a CUDA that has not started
CYCLE_BYTES = 2**19


def run_cycles(count, *, warm_up):
    """Growth of memory, threads and file handles over `count` engines, after the first `warm_up`."""
    # 20,000 entries are megabytes
    words = models.WordLevel({f"word{i}": i for i in range(20_000)}, unk_token="word0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="word1", pad_token="word0")
    process, before = psutil.Process(), None
    for i in range(count + warm_up):
        if i == warm_up:
            before = rss(), process.num_threads(), process.num_fds()
        engine = start(tiny(), processing_class=tokenizer)
        engine.generate(PROMPTS, GREEDY)
        engine.close()
        del engine
        gc.collect()
    return rss() - before[0], process.num_threads() - before[1], process.num_fds() - before[2]


@pytest.mark.parametrize(("count", "warm_up"), [(2, 2), pytest.param(100, 3, marks=pytest.mark.slow)])
def test_engines_do_not_leak(count, warm_up):
    memory, threads, handles = run_cycles(count, warm_up=warm_up)
    assert memory < SLACK_BYTES + count * CYCLE_BYTES
    assert threads <= 0
    assert handles <= 0


def test_a_dropped_trainer_takes_its_engine_along(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no", max_steps=1)
    trainer.train()
    refs = [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.engine.llm)]
    del trainer
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    assert not torch.distributed.is_initialized()
