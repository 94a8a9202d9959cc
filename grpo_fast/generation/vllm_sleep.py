"""The engine's memory: there while completions are generated, free while the trainer uses the device.

That is the KV cache, and on a CPU the engine's own copies of weights: a bf16 engine beside fp32 weights has half of
them again, which the policy fills anew each time. Weights that the policy shares stay where they are, and so do all on
a GPU, where CUDA graphs know their addresses; vLLM's own sleep would move them away or discard them.
"""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from grpo_fast.generation.shared_weights import Link
from grpo_fast.heap import trim_heap


def sleep_arguments(overrides: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that can release its KV cache.

    Args:
        overrides: The user's own arguments.

    Raises:
        ValueError: the device has no such engine, or an argument or the environment forbids it.
    """
    from vllm.platforms import current_platform

    if "worker_cls" in overrides:
        raise ValueError(
            "vllm_enable_sleep_mode=True brings its own worker_cls: leave it out of vllm_engine_kwargs, it is "
            f"{overrides['worker_cls']!r}"
        )
    package = __name__.rpartition(".")[0]
    if current_platform.is_cpu():
        return {"worker_cls": f"{package}.vllm_cpu_worker.KVReleasingCPUWorker"}
    if not current_platform.is_cuda_alike():
        raise ValueError(
            f"vllm_enable_sleep_mode=True needs a GPU or a CPU, vLLM runs on {current_platform.device_type}"
        )
    # newer versions of vLLM read it and work around it
    is_known = importlib.util.find_spec("vllm.device_allocator.alloc_conf") is not None
    if not is_known and "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", ""):
        raise ValueError(
            "vllm_enable_sleep_mode=True does not go with PYTORCH_ALLOC_CONF=expandable_segments:True in this version "
            "of vLLM: set it in PYTORCH_CUDA_ALLOC_CONF, which vLLM reads, or leave it out"
        )
    return {"enable_sleep_mode": True, "worker_cls": f"{package}.vllm_gpu_worker.ResidentWeightsWorker"}


def fill_before_steps(llm: Any, fill: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Let vLLM's worker call `fill` before it runs its model, whoever asked it to."""

    def before_step() -> None:
        living = fill()
        if living is not None:
            living()

    llm.collective_rpc("call_before_steps", args=(before_step,))


class EngineMemory:
    """Taken by `take` or `held`, and free from the end of the outermost `held` on."""

    def __init__(self, llm: Any, copies: dict[torch.UntypedStorage, list[Link]]) -> None:
        """Release the memory.

        Args:
            llm: Was started with `sleep_arguments`.
            copies: `SharedWeights.copies`, of which the policy fills what is released; {} releases no weights.
        """
        self._llm: Any = llm
        self._copies = [(storage, storage.nbytes(), links) for storage, links in copies.items()]
        self._num_holders = 0
        self._is_taken = True
        # whether their memory is taken, but has not been filled
        self.needs_weights = False
        self._release()

    @property
    def has_weights(self) -> bool:
        """Whether weights are released with it."""
        return bool(self._copies)

    @property
    def lacks_weights(self) -> bool:
        """Whether weights are released at present."""
        return self.has_weights and not self._is_taken

    def take(self) -> None:
        """Take the memory if it is free; what it held before is gone, cached prefixes too."""
        if self._is_taken:
            return
        for storage, size, _ in self._copies:
            storage.resize_(size)
        # what the allocators keep for themselves after training, and the weights have not been put into
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif self.has_weights:
            trim_heap()
        self._llm.wake_up()
        self.needs_weights = self.has_weights
        self._is_taken = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the memory through the block, which may be nested."""
        self.take()
        self._num_holders += 1
        try:
            yield
        finally:
            self._num_holders -= 1
            if not self._num_holders:
                self._release()

    def leave(self) -> None:
        """The engine has stopped: there is nothing to take or release."""
        self._llm = None

    def _release(self) -> None:
        if self._llm is not None:
            # level 1 would move weights in vLLM's pool to the host: none are there
            self._llm.sleep(level=1)
            for storage, _, links in self._copies:
                storage.resize_(0)
                for link in links:
                    link.written = None
            self._is_taken = self.needs_weights = False
