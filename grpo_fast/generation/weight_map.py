"""Where each of the policy's weights lies inside vLLM's own tensors, learned by watching vLLM load them.

vLLM fuses, shards, pads and renames as it loads, by rules of each architecture. All of them end in copies: a piece of
the weight that was given goes into a piece of one of the engine's tensors. The copies are recorded, so no rule is
written down here a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One copy: some elements of a weight, and the view into one of the engine's tensors that they were copied to.

    Attributes:
        size: Of the elements taken, as in `Tensor.as_strided`.
        stride: Of the elements taken, in a contiguous weight.
        offset: From the weight's first element.
        target: View into the engine's tensor, of the same size.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    target: Tensor

    def of(self, weight: Tensor) -> Tensor:
        """The piece's elements of a weight; a view if the weight is contiguous."""
        weight = weight.contiguous()
        return weight.as_strided(self.size, self.stride, weight.storage_offset() + self.offset)


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """What vLLM did with each weight.

    Attributes:
        pieces: Weight -> its copies. A weight that vLLM ignored has none.
        opaque: Weights that did not only travel by copies, such as quantised ones.
    """

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)


def engine_tensors(target: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of vLLM's model, each once."""
    yield from target.named_parameters()
    yield from target.named_buffers()


def storage_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor looks into."""
    return tensor.untyped_storage().data_ptr()


def record_load(target: Any, weights: Iterable[tuple[str, Tensor]]) -> WeightMap:
    """Let vLLM's model load `weights` and record where each goes."""
    recorder = Recorder(tensor for _, tensor in engine_tensors(target))
    with recorder:
        target.load_weights(recorder.watched(weights))
    return recorder.map


class Recorder(TorchDispatchMode):
    """Sees every copy of the weights given to `watched` into `targets` inside the block, and notes it in `map`."""

    def __init__(self, targets: Iterable[Tensor]) -> None:
        super().__init__()
        self.map = WeightMap()
        self._targets = {storage_of(tensor) for tensor in targets}
        self._given: dict[int, tuple[str, Tensor]] = {}
        self._current = ""

    def watched(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            # a weight's address tells it from the others, also where vLLM keeps it for later
            weight = weight.contiguous()
            self._given[storage_of(weight)] = (name, weight)
            self._current = name
            self.map.pieces[name] = []
            yield name, weight

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and storage_of(args[0]) in self._targets:
            self._record(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _record(self, target: Tensor, source: Tensor) -> None:
        name, weight = self._given.get(storage_of(source), (self._current, None))
        if weight is None or source.dtype != weight.dtype or source.shape != target.shape:
            self.map.opaque.add(name)
            return
        piece = Piece(
            size=tuple(source.shape),
            stride=source.stride(),
            offset=int(source.storage_offset() - weight.storage_offset()),
            target=target.detach(),
        )
        self.map.pieces[name].append(piece)


def whole_view(pieces: list[Piece], weight: Tensor) -> Tensor | None:
    """The one view into an engine's tensor, laid out like the contiguous `weight`, that its pieces make up together.

    Returns:
        A tensor of the weight's shape and strides and the engine's dtype, or None if there is no such view: parts of
        the weight went elsewhere, lie in another order, or were left out.
    """
    if not pieces or not weight.is_contiguous() or sum(piece.target.numel() for piece in pieces) != weight.numel():
        return None
    base = pieces[0].target
    shift = base.storage_offset() - pieces[0].offset
    for piece in pieces:
        if storage_of(piece.target) != storage_of(base) or piece.target.storage_offset() - piece.offset != shift:
            return None
        if _strides(piece.size, piece.stride) != _strides(piece.size, piece.target.stride()):
            return None
    return base.as_strided(weight.shape, weight.stride(), shift)


def _strides(size: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """Strides that matter: of dimensions with more than one element."""
    return [step for length, step in zip(size, stride, strict=True) if length > 1]
