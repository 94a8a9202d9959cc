"""Watches what torch allocates: the largest tensor, and the most bytes alive at once."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Allocation:
    """One allocation: the op that made it, and the tensor it was made for."""

    op: str
    shape: tuple[int, ...]
    numel: int
    bytes: int


NOTHING = Allocation(op="", shape=(), numel=0, bytes=0)


class Allocations(TorchDispatchMode):
    """Use as `with Allocations() as allocations:`; counts storages made inside, on any device, autograd's included.

    A backward is watched where it runs in the calling thread, as it does on CPU. Storages that an op makes and frees
    inside itself are not seen.

    Attributes:
        largest: The allocation with the most bytes.
        largest_numel: The allocation with the most elements.
        peak_bytes: The most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = NOTHING
        self.largest_numel = NOTHING
        self.peak_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def live_bytes(self) -> int:
        """Bytes of the storages seen so far that are still alive."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._record(str(func), tensor)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return out

    def _record(self, op: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        made = Allocation(op=op, shape=tuple(tensor.shape), numel=tensor.numel(), bytes=storage.nbytes())
        self.largest = max(self.largest, made, key=lambda allocation: allocation.bytes)
        self.largest_numel = max(self.largest_numel, made, key=lambda allocation: allocation.numel)
        self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
