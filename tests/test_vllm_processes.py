"""vLLM in the processes of a launcher (two of them, gloo): DDP, tensor parallel engines, sharded policies."""

import gc
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from grpo_fast.generation.vllm_engine import VLLMEngine
from grpo_fast.trainer.engines import _check_sharding
from tests.processes import launch
from tests.test_vllm_engine import EOS, tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]


def test_engines_follow_ddp_alone_and_together(tmp_path):
    """One launch for two trainers: an engine ends, another starts, and the process group stays."""
    launch("-m", "tests.engines_of_processes", tmp_path, "ddp", "tensor_parallel")


@pytest.mark.slow
def test_engines_follow_fsdp2(tmp_path):
    launch("-m", "tests.engines_of_processes", tmp_path, "fsdp2")


@pytest.mark.slow
def test_an_engine_over_processes_follows_fsdp2(tmp_path):
    launch("-m", "tests.engines_of_processes", tmp_path, "fsdp2_tensor_parallel")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_engines_follow_zero(tmp_path, stage):
    pytest.importorskip("deepspeed")
    launch("-m", "tests.engines_of_processes", tmp_path, f"zero{stage}")


def test_an_engine_leaves_a_process_group_that_it_did_not_make(tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    def start():
        return VLLMEngine(
            model=tiny_model(tied=True),
            processing_class=None,
            dtype=torch.float32,
            max_num_seqs=1,
            eos_token_ids=[EOS],
        )

    try:
        for number in range(2):
            store = f"file://{tmp_path}/{number}"
            torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
            start().close()
            assert torch.distributed.is_initialized()
            torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/last", rank=0, world_size=1)
        # collected without being closed
        start()
        gc.collect()
        assert torch.distributed.is_initialized()
    finally:
        cleanup_dist_env_and_memory()


def test_sharding_that_cannot_be_gathered_is_refused():
    with pytest.raises(ValueError, match=r"set fsdp_config=\{'version': 2\}.*; it is 1"):
        _check_sharding(SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1)), has_adapters=False)
    zero3 = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    _check_sharding(zero3, has_adapters=False)
    with pytest.raises(ValueError, match="no peft_config with deepspeed's ZeRO stage 3"):
        _check_sharding(zero3, has_adapters=True)
