"""What attention's bench compares: one layer's causal attention over rows of unequal length, forward and backward.

Letters: T packed tokens, H query heads, K key-value heads, D head width, S segments, B rows, L the longest row.
"rows" are 8 rows of their own a group; "shared" are 8 completions behind one prompt that is half of the group's tokens
and stored once. Peers that know no packs get the same rows padded, prompts repeated; that copy is made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.profile_rows import quantile_lengths
from bench.provider import Provider, relative_error
from bench.shapes import AttentionHeads
from grpo_fast import attention
from grpo_fast.batch import Layout

ROWS, GROUP_TOKENS, SPREAD = 8, 16384, 0.65
DATA = ("rows", "shared")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def row_lengths(tokens: int) -> list[int]:
    """8 lengths, log-normal around their median, that add up to `tokens`."""
    raw = quantile_lengths(1000, SPREAD, ROWS, scale=1.0)
    ends = [round(tokens * end / sum(raw)) for end in accumulate(raw)]
    return [end - start for start, end in pairwise([0, *ends])]


def make_layout(T: int, data: str) -> Layout:
    """Segments of T tokens on the host; groups of about 16,384 tokens."""
    groups = max(1, T // GROUP_TOKENS)
    bounds = [round(T * i / groups) for i in range(groups + 1)]
    queries: list[int] = []
    keys: list[Tensor] = []
    for start, end in pairwise(bounds):
        prompt = (end - start) // 2 if data == "shared" else 0
        if prompt:
            queries.append(prompt)
            keys.append(torch.arange(start, start + prompt))
        first = start + prompt
        for length in row_lengths(end - first):
            own = torch.arange(first, first + length)
            keys.append(torch.cat([torch.arange(start, start + prompt), own]))
            queries.append(length)
            first += length
    counts = tuple(len(index) for index in keys)
    return Layout(
        cu_queries=torch.tensor([0, *queries]).cumsum(0).int(),
        cu_keys=torch.tensor([0, *counts]).cumsum(0).int(),
        key_index=torch.cat(keys) if data == "shared" else None,
        query_lengths=tuple(queries),
        key_lengths=counts,
    )


def visible_pairs(layout: Layout) -> int:
    """Query-key pairs that are not masked."""
    sizes = zip(layout.query_lengths, layout.key_lengths, strict=True)
    return sum(q * (k - q) + q * (q + 1) // 2 for q, k in sizes)


@dataclass(frozen=True)
class Problem:
    """Queries [T, H, D], keys and values [T, K, D], leaves; the output's gradient [T, H, D]; who sees whom (host)."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    layout: Layout

    @cached_property
    def plan(self) -> attention.AttentionPlan:
        """Made once for all layers of a pack, so outside of what is timed."""
        return attention.AttentionPlan(self.layout, self.query.device)

    @cached_property
    def padded(self) -> PaddedRows:
        """The same states for attention that knows no packs."""
        return PaddedRows.of(self)

    def packed_results(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A step's output and gradients as [T, heads, D]."""
        return self.padded.packed(found) if found[0].dim() == 4 else found

    @cached_property
    def block_mask(self) -> Any:
        """For flex_attention."""
        return _block_mask(self.layout, self.query.device)


def make_problem(
    heads: AttentionHeads, T: int, *, dtype: str, data: str, device: torch.device, seed: int = 0
) -> Problem:
    """Unit normals."""
    g = torch.Generator(device).manual_seed(seed)
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads, heads.num_heads)
    states = [
        torch.randn(T, count, heads.width, generator=g, device=device).to(DTYPES[dtype]).requires_grad_(i < 3)
        for i, count in enumerate(counts)
    ]
    return Problem(*states, layout=make_layout(T, data))


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """The tokens of B rows in a rectangle, padded on the right.

    Attributes:
        query: [B, H, L, D] a leaf; key and value are [B, K, L, D].
        dout: [B, H, L, D], zero in the padding and for every copy of a prompt but the first.
        source: [B * L] int64, the pack's token at each place; 0 in the padding.
        target: [T] int64, the place of each packed token; of a shared prompt the first row's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor
    source: Tensor
    target: Tensor

    @staticmethod
    def of(problem: Problem) -> PaddedRows:
        layout = problem.layout
        T = sum(layout.query_lengths)
        index = torch.arange(T) if layout.key_index is None else layout.key_index
        rows = list(index.split(layout.key_lengths))
        if layout.key_index is not None:
            # a prompt's own segment is the beginning of its completions' rows
            rows = [row for row, q, k in zip(rows, layout.query_lengths, layout.key_lengths, strict=True) if q < k]
        B, L = len(rows), max(len(row) for row in rows)
        source = torch.stack([F.pad(row, (0, L - len(row))) for row in rows]).flatten().to(problem.query.device)
        target = torch.empty(T, dtype=torch.int64)
        for i, row in reversed(list(enumerate(rows))):
            target[row] = i * L + torch.arange(len(row))
        target = target.to(source.device)

        def padded(states: Tensor) -> Tensor:
            return states.view(B, L, *states.shape[1:]).transpose(1, 2).contiguous()

        query, key, value = (
            padded(state.detach()[source]).requires_grad_() for state in (problem.query, problem.key, problem.value)
        )
        dout = torch.zeros_like(problem.dout[source]).index_copy_(0, target, problem.dout)
        return PaddedRows(query=query, key=key, value=value, dout=padded(dout), source=source, target=target)

    def packed(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Output and gradients [B, heads, L, D] as those of the pack; copies of a prompt share its gradient."""
        out, dquery, dkey, dvalue = (states.transpose(1, 2).flatten(0, 1) for states in found)
        sums = (
            states.new_zeros(len(self.target), *states.shape[1:], dtype=torch.float64).index_add(
                0, self.source, states.double()
            )
            for states in (dkey, dvalue)
        )
        return out[self.target], dquery[self.target], *sums


def _gradients(out: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, (problem.query, problem.key, problem.value), problem.dout)


def _ours(problem: Problem, backend: str | None = None) -> tuple[Tensor, ...]:
    # the entry is that of a model's layer, without what reads the model
    call = attention._Call(plan=problem.plan, scaling=problem.query.shape[-1] ** -0.5, window=None, softcap=None)
    run = getattr(attention, backend) if backend else attention._choose_backend(problem.query, problem.value, call)
    return _gradients(run(problem.query, problem.key, problem.value, call), problem)


def _ours_varlen(problem: Problem) -> tuple[Tensor, ...]:
    return _ours(problem, "_varlen_attention")


def _ours_flash(problem: Problem) -> tuple[Tensor, ...]:
    return _ours(problem, "_flash_attention")


def _ours_segments(problem: Problem) -> tuple[Tensor, ...]:
    return _ours(problem, "_segment_attention")


def _ours_tiled(problem: Problem) -> tuple[Tensor, ...]:
    return _ours(problem, "_tiled_attention")


def _padded_sdpa(problem: Problem) -> tuple[Tensor, ...]:
    rows = problem.padded
    states = (rows.query, rows.key, rows.value)
    # padding is on the right, where the causal mask hides it from every token
    out = F.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, states, rows.dout)


def _block_mask(layout: Layout, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(layout.query_lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    # the segment whose tokens stand before a token's own: its prompt's, or its own again
    prompts = torch.arange(len(lengths))
    prompt = 0
    for s, (q, k) in enumerate(zip(layout.query_lengths, layout.key_lengths, strict=True)):
        prompt = s if q == k else prompt
        prompts[s] = prompt
    before = prompts.to(device)[segment]

    def is_seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((segment[q] == segment[k]) | (before[q] == segment[k]))

    T = int(lengths.sum())
    return create_block_mask(is_seen, None, None, T, T, device=str(device))


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_attention(problem: Problem) -> tuple[Tensor, ...]:
    states = [state.transpose(0, 1)[None] for state in (problem.query, problem.key, problem.value)]
    out = _flex()(*states, block_mask=problem.block_mask, enable_gqa=True)
    return _gradients(out[0].transpose(0, 1), problem)


PROVIDERS = {
    provider.label: provider
    for provider in (
        Provider(label="ours", step=_ours, package="grpo_fast"),
        Provider(label="ours-segments", step=_ours_segments, package="grpo_fast", cpu_only=True),
        Provider(label="ours-tiled", step=_ours_tiled, package="grpo_fast"),
        Provider(label="ours-varlen", step=_ours_varlen, package="grpo_fast", cuda_only=True),
        Provider(label="ours-flash", step=_ours_flash, package="flash_attn", cuda_only=True),
        Provider(label="padded-sdpa", step=_padded_sdpa, package="torch"),
        Provider(label="flex", step=_flex_attention, package="torch", cuda_only=True),
    )
}


def exact(problem: Problem) -> tuple[Tensor, ...]:
    """Output and gradients of queries, keys and values in float64, on the operands as they are rounded."""
    layout, device = problem.layout, problem.query.device
    query, key, value = (
        state.detach().double().requires_grad_() for state in (problem.query, problem.key, problem.value)
    )
    T = query.shape[0]
    index = torch.arange(T) if layout.key_index is None else layout.key_index
    rows = index.split(layout.key_lengths)
    is_seen = torch.zeros(T, T, dtype=torch.bool)
    first = 0
    for row, q, k in zip(rows, layout.query_lengths, layout.key_lengths, strict=True):
        is_seen[first : first + q, row] = torch.ones(q, k, dtype=torch.bool).tril(k - q)
        first += q
    share = query.shape[1] // key.shape[1]
    keys, values = (state.repeat_interleave(share, dim=1) for state in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~is_seen.to(device), -torch.inf).softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, values)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), problem.dout.double())


def errors(problem: Problem, found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative to the norms: of the output and of the gradients; those of padded rows are packed first."""
    found = problem.packed_results(found)
    names = ("out", "dquery", "dkey", "dvalue")
    return {name: relative_error(got, right) for name, got, right in zip(names, found, truth, strict=True)}
