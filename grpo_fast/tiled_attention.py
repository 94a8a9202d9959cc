"""Attention over packed rows as matrix products over padded tiles of similar segments, on any device.

Letters: T packed tokens, H query heads, K key-value heads, D head width.
One path serves shared prompts, sliding windows and soft caps. It computes in fp32 or wider, saves the pack's queries,
keys and values for the backward pass and nothing else, and holds some 4 MiB of scores at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_fast.batch import Layout, moved

# scores held at a time by the tiled back end (4 MiB in fp32), and the fewest queries a long segment is cut into
TILE_SCORES = 2**20
MIN_TILE_QUERIES = 64
# padded scores a head may compute before segments get a tile of their own, as a part of the tile and outright
MAX_PADDING = 0.25
FREE_PADDING = 8192


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Queries and keys of B segments, padded to Q queries and L keys; G = H / K query heads share a key head.

    Attributes:
        size: B, K, G, Q, L.
        query_rows: [B * K * G * Q] int64, rows of the queries seen as [T * H, D].
        key_rows: [B * K * L] int64, rows of the keys seen as [T * K, D].
        padding: [...] int64, the places in `query_rows` that hold no query, or None.
        bias: [B or 1, 1, 1, Q, L] fp32, 0 where the query sees the key and -inf elsewhere, or None if all is seen.
    """

    size: tuple[int, int, int, int, int]
    query_rows: Tensor
    key_rows: Tensor
    padding: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles that hold every query once; `restore` [T * H] picks the queries' rows from the tiles' rows end to end."""

    tiles: list[_Tile]
    restore: Tensor


def _buckets(layout: Layout) -> list[list[int]]:
    """Segments of similar size, so that padding stays within its bounds."""
    sizes = list(zip(layout.key_lengths, layout.query_lengths, strict=True))
    buckets: list[list[int]] = []
    real = longest = 0
    for segment in sorted(range(len(sizes)), key=lambda s: sizes[s], reverse=True):
        keys, queries = sizes[segment]
        if buckets:
            padded = (len(buckets[-1]) + 1) * max(longest, queries) * sizes[buckets[-1][0]][0]
            if padded - real - keys * queries <= max(MAX_PADDING * padded, FREE_PADDING):
                buckets[-1].append(segment)
                real, longest = real + keys * queries, max(longest, queries)
                continue
        buckets.append([segment])
        real, longest = keys * queries, queries
    return buckets


def make_tiling(
    layout: Layout, device: torch.device, *, window: int | None, num_heads: int, num_kv_heads: int
) -> Tiling:
    """Tiles on `device` for a layout that is on the host, a window or None, and head counts."""
    num_queries, num_keys = torch.tensor(layout.query_lengths), torch.tensor(layout.key_lengths)
    query_starts = torch.tensor([0, *accumulate(layout.query_lengths)])
    key_starts = torch.tensor([0, *accumulate(layout.key_lengths)])
    key_index = torch.arange(int(key_starts[-1])) if layout.key_index is None else layout.key_index
    heads_KG = torch.arange(num_heads).view(1, num_kv_heads, -1, 1)
    tiles: list[_Tile] = []
    restore = torch.empty(int(query_starts[-1]) * num_heads, dtype=torch.int64)
    filled = 0
    for bucket in _buckets(layout):
        most_queries = max(layout.query_lengths[s] for s in bucket)
        most_keys = max(layout.key_lengths[s] for s in bucket)
        query_step = min(most_queries, max(MIN_TILE_QUERIES, TILE_SCORES // (num_heads * most_keys)))
        step = max(1, TILE_SCORES // (num_heads * most_keys * query_step))
        for first in range(0, len(bucket), step):
            members = torch.tensor(bucket[first : first + step])
            queries_B1, keys_B1 = num_queries[members, None], num_keys[members, None]
            ahead_B1 = keys_B1 - queries_B1
            for low in range(0, int(queries_B1.max()), query_step):
                i_Q = torch.arange(low, min(low + query_step, int(queries_B1.max())))
                key_low = 0 if window is None else max(0, low + int(ahead_B1.min()) - window + 1)
                j_L = torch.arange(key_low, min(int(keys_B1.max()), int(i_Q[-1] + ahead_B1.max()) + 1))
                is_query_BQ, is_key_BL = i_Q < queries_B1, j_L < keys_B1
                query_BQ = torch.where(is_query_BQ, query_starts[members, None] + i_Q, 0)
                key_BL = key_index[torch.where(is_key_BL, key_starts[members, None] + j_L, 0)]
                rows = (query_BQ[:, None, None] * num_heads + heads_KG).flatten()
                is_row = is_query_BQ[:, None, None].expand(-1, *heads_KG.shape[1:3], -1).flatten()
                restore[rows[is_row]] = filled + is_row.nonzero().flatten()
                filled += len(rows)
                tile = _Tile(
                    size=(len(members), num_kv_heads, num_heads // num_kv_heads, len(i_Q), len(j_L)),
                    query_rows=moved(rows, device),
                    key_rows=moved(
                        (key_BL[:, None] * num_kv_heads + torch.arange(num_kv_heads)[:, None]).flatten(), device
                    ),
                    padding=None if bool(is_row.all()) else moved((~is_row).nonzero().flatten(), device),
                    bias=_bias(i_Q, j_L, queries_B1, ahead_B1, window, device),
                )
                tiles.append(tile)
    return Tiling(tiles=tiles, restore=moved(restore, device))


def _bias(
    i_Q: Tensor, j_L: Tensor, queries_B1: Tensor, ahead_B1: Tensor, window: int | None, device: torch.device
) -> Tensor | None:
    """Query i sees keys up to i + ahead, the last `window` of them; one mask serves segments equally far ahead."""
    alike = bool((ahead_B1 == ahead_B1[0]).all())
    last_BQ1 = i_Q[:, None] + (ahead_B1[:1, :, None] if alike else ahead_B1[:, :, None])
    seen_BQL = j_L <= last_BQ1
    if window is not None:
        seen_BQL &= j_L > last_BQ1 - window
    if not alike:
        # a softmax over no key is not a number: what padding sees is never read
        seen_BQL |= (i_Q >= queries_B1)[:, :, None]
    if bool(seen_BQL.all()):
        return None
    return moved(torch.zeros(seen_BQL.shape).masked_fill_(~seen_BQL, -torch.inf)[:, None, None], device)


def _gather(states: Tensor, rows: Tensor, tile: _Tile) -> Tensor:
    """[B * K, rows of a key head, D]."""
    return states.index_select(0, rows).view(tile.size[0] * tile.size[1], -1, states.shape[-1])


def _probabilities(query: Tensor, key: Tensor, tile: _Tile, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """[B * K, G * Q, L] attention weights, and the tanh of the soft cap for its derivative."""
    scores = torch.bmm(query, key.transpose(1, 2))
    tanh = None
    if softcap is not None:
        tanh = torch.tanh_(scores.div_(softcap))
        scores = tanh * softcap
    if tile.bias is not None:
        scores.view(tile.size).add_(tile.bias)
    return torch.softmax(scores, -1), tanh


class _TiledAttention(torch.autograd.Function):
    """Keeps queries, keys and values only; backward computes the attention weights again, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        tiling: Tiling,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(query_THD, key_TKD, value_TKD)
        ctx.tiling, ctx.scaling, ctx.softcap = tiling, scaling, softcap
        query, key, value = (_rows(states) for states in (query_THD, key_TKD, value_TKD))
        parts = []
        with torch.autocast(query.device.type, enabled=False):
            for tile in tiling.tiles:
                scaled = _gather(query, tile.query_rows, tile).mul_(scaling)
                weights, _ = _probabilities(scaled, _gather(key, tile.key_rows, tile), tile, softcap)
                parts.append(torch.bmm(weights, _gather(value, tile.key_rows, tile)).view(-1, value.shape[-1]))
        return _join(parts, tiling).view(*query_THD.shape[:2], -1).to(query_THD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        query_THD, key_TKD, value_TKD = ctx.saved_tensors
        query, key, value, dout = (_rows(states) for states in (query_THD, key_TKD, value_TKD, dout_THD))
        dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
        dquery_parts = []
        with torch.autocast(query.device.type, enabled=False):
            for tile in ctx.tiling.tiles:
                scaled = _gather(query, tile.query_rows, tile).mul_(ctx.scaling)
                keys, values = _gather(key, tile.key_rows, tile), _gather(value, tile.key_rows, tile)
                dweighted = dout.index_select(0, tile.query_rows)
                if tile.padding is not None:
                    dweighted.index_fill_(0, tile.padding, 0)
                dweighted = dweighted.view(len(keys), -1, dout.shape[-1])
                weights, tanh = _probabilities(scaled, keys, tile, ctx.softcap)
                dvalue.index_add_(0, tile.key_rows, torch.bmm(weights.transpose(1, 2), dweighted).flatten(0, 1))
                dweights = torch.bmm(dweighted, values.transpose(1, 2))
                dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
                if tanh is not None:
                    dscores = dscores.mul_(1 - tanh.square_())
                dquery_parts.append(torch.bmm(dscores, keys).flatten(0, 1))
                dkey.index_add_(0, tile.key_rows, torch.bmm(dscores.transpose(1, 2), scaled).flatten(0, 1))
        dquery = _join(dquery_parts, ctx.tiling).mul_(ctx.scaling)
        grads = zip((dquery, dkey, dvalue), (query_THD, key_TKD, value_TKD), strict=True)
        return *(grad.view(states.shape).to(states.dtype) for grad, states in grads), None, None, None


def _rows(states: Tensor) -> Tensor:
    """[tokens * heads, D], at least fp32."""
    return states.to(torch.promote_types(states.dtype, torch.float32)).reshape(-1, states.shape[-1])


def _join(parts: list[Tensor], tiling: Tiling) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, tiling.restore)


def tiled_attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    tiling: Tiling,
    *,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention of each query to the keys its layout names, [T, H, D of the value] in the query's dtype.

    Args:
        query_THD: [T, H, D].
        key_TKD: [T, K, D], H a multiple of K.
        value_TKD: [T, K, D of the value].
        tiling: From `make_tiling`, for the pack's layout, the window and H and K.
        scaling: What the scores are multiplied by.
        softcap: c in `c * tanh(score / c)`, or None.
    """
    out: Tensor = _TiledAttention.apply(query_THD, key_TKD, value_TKD, tiling, scaling, softcap)
    return out
