"""Tied embeddings whose two uses make one gradient: the LM head's, with the looked-up rows added to it.

Autograd makes a [V, D] gradient of each use, though a pack looks up some hundred rows, and adds the two up. Here both
uses meet in one node of the graph, which adds the rows into the head's gradient in place: bitwise the same sums, half
of the memory.

Letters: V vocabulary, D hidden width, U different tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels.first_order import first_order

# weights that rows have been looked up of -> what stands for them in the graph
_uses: ContextVar[dict[Tensor, Tensor] | None] = ContextVar("uses", default=None)


@contextmanager
def joined_lookups(model: nn.Module, head: nn.Module) -> Iterator[int]:
    """Within, the plain embeddings of `model` whose weight is the head's take part in `one_gradient`; yields how many.

    An embedding of another class, such as one that scales its rows, is left as it is, and so is one with a `forward` of
    its own.
    """
    weight = getattr(head, "weight", None)
    embeddings = [
        module
        for module in model.modules()
        if type(module) is nn.Embedding and module.weight is weight and "forward" not in vars(module)
    ]
    for embedding in embeddings:
        # bound, so that a deep copy of the module calls itself; the class's own in a pickle
        embedding.forward = MethodType(forward, embedding)  # type: ignore[method-assign]
    try:
        yield len(embeddings)
    finally:
        for embedding in embeddings:
            # others may have wrapped it
            if getattr(vars(embedding).get("forward"), "__func__", None) is forward:
                del embedding.forward


@contextmanager
def one_gradient() -> Iterator[None]:
    """Around one forward pass, whose head multiplies by `head_weight(...)` and hands that to nobody else."""
    token = _uses.set({})
    try:
        yield
    finally:
        _uses.reset(token)


def head_weight(weight: Tensor) -> Tensor:
    """The head's weight: itself, or what stands for it where rows of it have been looked up."""
    return (_uses.get() or {}).get(weight, weight)


def forward(self: nn.Embedding, input: Tensor) -> Tensor:
    """`nn.Embedding.forward`."""
    uses = _uses.get()
    if uses is None or not _is_plain(self):
        return type(self).forward(self, input)
    # after an earlier lookup of the same pass, its stand-in: the head's gradient goes through both
    rows, uses[self.weight] = _Lookup.apply(head_weight(self.weight), input, self.padding_idx)
    out: Tensor = rows
    return out


def _is_plain(embedding: nn.Embedding) -> bool:
    weight = embedding.weight
    wants_gradient = torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
    # elsewhere the host would wait for the number of different tokens; sharded weights are of other classes
    is_whole = weight.device.type == "cpu" and type(weight) is nn.Parameter
    has_options = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    # nobody has replaced the class's
    is_torchs = getattr(type(embedding).forward, "__globals__", None) is vars(nn.modules.sparse)
    return wants_gradient and is_whole and not has_options and is_torchs


class _Lookup(torch.autograd.Function):
    """Rows of the weight, and the weight once more for the head."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.padding_idx = weight.shape[0], -1 if padding_idx is None else padding_idx
        ctx.set_materialize_grads(False)
        return nn.functional.embedding(ids, weight, padding_idx), weight.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, drows: Tensor | None, dweight: Tensor | None) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        if drows is None:
            return dweight, None, None
        if dweight is None:
            return _summed(drows, ids, ctx.num_rows, ctx.padding_idx), None, None
        is_trained = ids != ctx.padding_idx
        different_U, places = ids[is_trained].unique(return_inverse=True)
        sums_UD = _summed(drows[is_trained], places, different_U.numel(), -1)
        # nobody else has it: the head makes it anew
        return dweight.index_add_(0, different_U, sums_UD), None, None


def _summed(drows: Tensor, ids: Tensor, num_rows: int, padding_idx: int) -> Tensor:
    """The gradient of `num_rows` rows, each summed in autograd's order."""
    total: Tensor = torch.ops.aten.embedding_dense_backward(drows, ids, num_rows, padding_idx, False)
    return total
