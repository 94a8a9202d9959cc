"""vLLM's GPU worker with weights that stay while it sleeps. vLLM imports this module by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.v1.worker.gpu_worker import Worker


class ResidentWeightsWorker(Worker):
    """Keeps the weights out of the memory that sleep takes away: they may be the trainer's own parameters."""

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        # for the weights, too, vLLM's function checks that no other engine uses the pool
        context: AbstractContextManager[Any] = super()._maybe_get_memory_pool_context(tag)
        return nullcontext() if tag == "weights" else context
