"""Attention kernels on gathered keys, of which the pack's own are kept for the backward pass.

Letters: T packed tokens, K key-value heads, D head width.

Where G completions share a prompt, a kernel that wants the keys of each segment end to end reads the prompt's G times
over. It would also save them so for its backward pass, in every layer. Here it saves the pack's own keys and values,
and they are gathered again when its backward pass asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Kernel = Callable[[Tensor, Tensor], Tensor]


def on_gathered_keys(kernel: Kernel, key_TKD: Tensor, value_TKD: Tensor, key_index: Tensor | None) -> Tensor:
    """What `kernel` makes of the keys and values that `key_index` picks.

    Tensors that the kernel saves go through the hooks in force outside, those of gradient checkpointing for example.

    Args:
        kernel: Takes keys and values, and is differentiable in them. It may save copies or views of another shape; then
            it is those that are kept.
        key_TKD: [T, K, D].
        value_TKD: [T, K, D of the value].
        key_index: [any] int64, or None for all keys in their order.
    """
    if key_index is None:
        return kernel(key_TKD, value_TKD)
    sources = (key_TKD, value_TKD)
    gathered = [source.index_select(0, key_index) for source in sources]
    # by address, so that the hooks do not keep what they are there to drop
    known = {
        (states.data_ptr(), states.shape, states.stride()): source.detach()
        for states, source in zip(gathered, sources, strict=True)
    }
    with _hooks(known, key_index):
        out = kernel(*gathered)
    # whoever holds the hooks does not hold the pack's states by them
    known.clear()
    return out


def _hooks(known: dict[Any, Tensor], key_index: Tensor) -> saved_tensors_hooks:
    # torch applies the innermost hooks alone, so these hand over to the ones outside; nothing public names those
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    # a saved output that held its own graph would never be freed
    outer_pack, outer_unpack = (torch.Tensor.detach, _same) if outer is None else outer

    def pack(states: Tensor) -> tuple[Any, bool]:
        source = known.get((states.data_ptr(), states.shape, states.stride()))
        return (outer_pack(states), False) if source is None else (outer_pack(source), True)

    def unpack(saved: tuple[Any, bool]) -> Tensor:
        kept, is_source = saved
        states: Tensor = outer_unpack(kept)
        return states.index_select(0, key_index) if is_source else states

    return saved_tensors_hooks(pack, unpack)


def _same(states: Tensor) -> Tensor:
    return states
