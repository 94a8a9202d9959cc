"""vLLM's CPU worker with a sleep that frees the KV cache. vLLM imports this module by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker


class KVReleasingCPUWorker(CPUWorker):
    """Gives the KV cache's memory back while it sleeps; the weights stay where they are.

    vLLM's own CPU worker has no sleep. The tensors keep their shapes and lose their storage, so nothing may run the
    model before `wake_up`.
    """

    _before_step: Callable[[], None] | None = None
    _sizes: dict[torch.UntypedStorage, int]

    def call_before_steps(self, before_step: Callable[[], None]) -> None:
        """Have `before_step` called whenever the model is about to run."""
        self._before_step = before_step

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's."""
        if self._before_step is not None:
            self._before_step()
        return super().execute_model(*args, **kwargs)

    def sleep(self, level: int = 1) -> None:
        """Free the KV cache, whatever the level."""
        storages = {tensor.untyped_storage() for tensor in _tensors(self.model_runner.kv_caches)}
        self._sizes = {storage: storage.nbytes() for storage in storages}
        for storage in storages:
            storage.resize_(0)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Allocate the KV cache again, filled with zeros as vLLM allocates it."""
        for storage, size in self._sizes.items():
            storage.resize_(size)
        for tensor in _tensors(self.model_runner.kv_caches):
            tensor.zero_()
        self._sizes = {}


def _tensors(caches: Any) -> Iterator[torch.Tensor]:
    """The tensors of a list of layers, of which some hold several."""
    for cache in caches:
        if isinstance(cache, torch.Tensor):
            yield cache
        else:
            yield from _tensors(cache)
