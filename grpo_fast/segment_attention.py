"""Attention over packed rows by torch's flash kernel for the CPU, part by part, merged by their log-sum-exps.

Letters: T packed tokens, H query heads, K key-value heads, G = H / K query heads share a key head, D head width; Q and
L, queries and keys of a part.

A part is a run of queries and a run of keys, both slices of the pack: nothing is gathered. A segment's own keys are
halved down to `MAX_CAUSAL` tokens: the later half sees all of the earlier one, and only the small squares on the
diagonal are computed in vain above it. A shared prompt is one part for all completions that stand behind it.
Everything is computed in fp32 or wider; output and log-sum-exp [T, H] are kept beside queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_fast.batch import Layout

# up to 512 tokens the kernel computes a whole square for a triangle; under some hundred, a call costs more than that
MAX_CAUSAL = 128
# query-key pairs of a part, on average, from which its calls cost less than tiles that hold many segments at a time
MIN_PAIRS = 2048


@dataclass(frozen=True)
class Part:
    """Queries that see a run of keys: all of it, or, where queries and keys are the same tokens, up to themselves."""

    queries: slice
    keys: slice
    is_causal: bool


def make_parts(layout: Layout) -> list[Part] | None:
    """The parts of a pack. The causal ones come first and have each query once.

    Args:
        layout: On the CPU.

    Returns:
        None where tiles cost less, or where a segment's last keys are not its own queries.
    """
    causal: list[Part] = []
    earlier: list[Part] = []
    shared: dict[tuple[int, int], list[slice]] = {}
    pairs = 0
    queries, keys = layout.cu_queries.tolist(), layout.cu_keys.tolist()
    for s, (start, end) in enumerate(pairwise(queries)):
        num_before = keys[s + 1] - keys[s] - (end - start)
        if layout.key_index is not None:
            index = layout.key_index[keys[s] : keys[s + 1]]
            if not torch.equal(index[num_before:], torch.arange(start, end)):
                return None
            for run in _runs(index[:num_before]):
                _extend(shared.setdefault(run, []), start, end)
        _halve(start, end, causal, earlier)
        pairs += (end - start) * num_before + (end - start) * (end - start + 1) // 2
    parts = causal + earlier
    parts += [Part(rows, slice(*run), is_causal=False) for run, slices in shared.items() for rows in slices]
    return parts if pairs >= MIN_PAIRS * len(parts) else None


def _runs(index: Tensor) -> Iterator[tuple[int, int]]:
    """The runs of consecutive tokens in a list of keys, as (first, last + 1)."""
    if index.numel():
        for run in torch.tensor_split(index, (index.diff() != 1).nonzero().flatten() + 1):
            yield int(run[0]), int(run[-1]) + 1


def _extend(slices: list[slice], start: int, end: int) -> None:
    if slices and slices[-1].stop == start:
        slices[-1] = slice(slices[-1].start, end)
    elif end > start:
        slices.append(slice(start, end))


def _halve(start: int, end: int, causal: list[Part], earlier: list[Part]) -> None:
    if end - start <= MAX_CAUSAL:
        if end > start:
            causal.append(Part(slice(start, end), slice(start, end), is_causal=True))
        return
    middle = (start + end) // 2
    _halve(start, middle, causal, earlier)
    _halve(middle, end, causal, earlier)
    earlier.append(Part(slice(middle, end), slice(start, middle), is_causal=False))


class _SegmentAttention(torch.autograd.Function):
    """Each part's backward pass takes the merged output and log-sum-exp: its weights are then parts of the whole."""

    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, parts: list[Part], scaling: float
    ) -> Tensor:
        T, H, D = query_THD.shape
        K = key_TKD.shape[1]
        query, key, value = _query_heads(query_THD, K), _key_heads(key_TKD, H), _key_heads(value_TKD, H)
        joined = query.new_empty(T, K, H // K, D)
        out, lse = joined.permute(1, 2, 0, 3), query.new_empty(T, K, H // K).permute(1, 2, 0)
        with torch.autocast("cpu", enabled=False):
            for part in parts:
                rows, columns = part.queries, part.keys
                values, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query[:, :, rows],
                    key[:, :, columns],
                    value[:, :, columns],
                    0.0,
                    part.is_causal,
                    scale=scaling,
                )
                if part.is_causal:
                    out[:, :, rows], lse[:, :, rows] = values, sums
                else:
                    _merge_(out[:, :, rows], lse[:, :, rows], values, sums)
        result = joined.view(T, H, D).to(query_THD.dtype)
        ctx.save_for_backward(query_THD, key_TKD, value_TKD, result, lse)
        ctx.parts, ctx.scaling = parts, scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_TKD, value_TKD, result, lse = ctx.saved_tensors
        T, H, D = query_THD.shape
        K = key_TKD.shape[1]
        query, out, dout = (_query_heads(states, K) for states in (query_THD, result, dout_THD))
        key, value = _key_heads(key_TKD, H), _key_heads(value_TKD, H)
        dquery = query.new_zeros(T, K, H // K, D)
        dkey, dvalue = query.new_zeros(T, K, D), query.new_zeros(T, K, D)
        with torch.autocast("cpu", enabled=False):
            for part in ctx.parts:
                rows, columns = part.queries, part.keys
                grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    dout[:, :, rows],
                    query[:, :, rows],
                    key[:, :, columns],
                    value[:, :, columns],
                    out[:, :, rows],
                    lse[:, :, rows],
                    0.0,
                    part.is_causal,
                    scale=ctx.scaling,
                )
                dquery[rows] += grads[0].permute(2, 0, 1, 3)
                # of the query heads that share a key head
                dkey[columns] += grads[1].sum(1).transpose(0, 1)
                dvalue[columns] += grads[2].sum(1).transpose(0, 1)
        dquery = dquery.view(T, H, D)
        grads = zip((dquery, dkey, dvalue), (query_THD, key_TKD, value_TKD), strict=True)
        return *(grad.to(states.dtype) for grad, states in grads), None, None


def _merge_(out_KGQD: Tensor, lse_KGQ: Tensor, more_KGQD: Tensor, more_lse_KGQ: Tensor) -> None:
    """Join attention to some keys with attention to others."""
    total = torch.logaddexp(lse_KGQ, more_lse_KGQ)
    out_KGQD.mul_((lse_KGQ - total).exp_()[..., None])
    out_KGQD.addcmul_(more_KGQD, (more_lse_KGQ - total).exp_()[..., None])
    lse_KGQ.copy_(total)


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _query_heads(states_THD: Tensor, K: int) -> Tensor:
    """[K, G, T, D], at least fp32."""
    T, H, D = states_THD.shape
    return _wide(states_THD).reshape(T, K, H // K, D).permute(1, 2, 0, 3)


def _key_heads(states_TKD: Tensor, H: int) -> Tensor:
    """[K, G, T, D], at least fp32, each key head seen G times without a copy."""
    T, K, D = states_TKD.shape
    return _wide(states_TKD).transpose(0, 1)[:, None].expand(K, H // K, T, D)


def segment_attention(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, parts: list[Part], *, scaling: float
) -> Tensor:
    """Attention of each query to the keys its layout names, [T, H, D] in the query's dtype.

    Args:
        query_THD: [T, H, D], on the CPU.
        key_TKD: [T, K, D], H a multiple of K.
        value_TKD: [T, K, D], as wide as the keys.
        parts: From `make_parts`, for the pack's layout.
        scaling: What the scores are multiplied by.
    """
    out: Tensor = _SegmentAttention.apply(query_THD, key_TKD, value_TKD, parts, scaling)
    return out
