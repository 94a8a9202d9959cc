"""Attention over packed rows, as an attention function that any transformers model can be switched to.

Letters: T packed tokens, H query heads, K key-value heads, D head width, S attention segments.

The model is called without an attention mask and without a cache; which token sees which is said by a `Layout`, which
travels to every layer as the keyword `layout=` inside an `AttentionPlan`. Three back ends compute the same function:

- `flash_attn`, on CUDA in fp16 or bf16, when that package is installed;
- `torch.nn.attention.varlen`, on CUDA in fp16 or bf16, without soft-capping;
- tiles, anywhere, in fp32 or wider: matrix products over padded tiles of similar segments. They keep only the pack's
  own queries, keys and values for the backward pass, and take shared prompts, windows and soft caps alike. Against
  torch's own causal attention on a CPU they cost less for short rows in bf16 and up to 1.7 times as much for long ones.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo_fast.batch import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = "grpo_packed"
PACKABLE_LAYERS = {"full_attention", "sliding_attention", "attention"}
DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "attn_dropout_prob")
# keywords by which models ask for attention that no back end here computes
REFUSED_KEYWORDS = ("s_aux", "position_bias", "cache")
# FlashAttention 2 holds heads up to this width
MAX_FLASH_WIDTH = 256
# scores held at a time by the tiled back end (4 MiB in fp32), and the fewest queries a long segment is cut into
TILE_SCORES = 2**20
MIN_TILE_QUERIES = 64
# padded scores a head may compute before segments get a tile of their own, as a part of the tile and outright
MAX_PADDING = 0.25
FREE_PADDING = 8192


class AttentionPlan:
    """A layout with what the tiled back end derives from it, built at the first layer and kept for the others."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._tilings: dict[tuple[int | None, int, int], _Tiling] = {}

    def tiling(self, window: int | None, num_heads: int, num_kv_heads: int) -> _Tiling:
        """The tiles for a window and head counts. Windows that reach over every segment are the same as none."""
        if window is not None and window >= max(self.layout.key_lengths, default=0):
            window = None
        key = (window, num_heads, num_kv_heads)
        if key not in self._tilings:
            self._tilings[key] = _tile(self.layout, window=window, num_heads=num_heads, num_kv_heads=num_kv_heads)
        return self._tilings[key]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a layer asks for beside its tensors; `window` counts the keys a query sees, its own included."""

    plan: AttentionPlan
    scaling: float
    window: int | None
    softcap: float | None


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers.

    Raises:
        ValueError: If there is none.
    """
    from transformers import PreTrainedModel

    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise ValueError(f"model must be or wrap a transformers.PreTrainedModel, got {type(model).__name__}")
    return inner


def can_pack(model: nn.Module) -> str | None:
    """Why rows cannot be packed for this model, in words, or None if they can.

    This reads the model's declarations only. `grpo_fast.policy.check_scoring` compares results.
    """
    lm = causal_lm(model)
    config = lm.config
    name = type(lm).__name__
    layer_types = set(getattr(config, "layer_types", None) or ())
    peft_configs = getattr(model, "peft_config", None) or {}
    if any(getattr(peft, "is_prompt_learning", False) for peft in peft_configs.values()):
        return "prompt-learning adapters prepend virtual tokens to every row"
    if config.get_text_config() is not config:
        return f"{name} has parts beside its language model"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "use_bidirectional_attention", False):
        return f"{name} attends to later tokens"
    if getattr(lm, "_is_stateful", False):
        return f"{name} carries a recurrent state from token to token"
    if not layer_types <= PACKABLE_LAYERS:
        return f"{name} has layers of type {', '.join(sorted(layer_types - PACKABLE_LAYERS))}"
    if not (lm._supports_attention_backend and lm._can_set_attn_implementation()):
        return f"{name} does not take its attention from transformers' AttentionInterface"
    if any("sink" in parameter.rpartition(".")[2] for parameter, _ in lm.named_parameters()):
        return f"{name} has attention sinks"
    dropout = {field: getattr(config, field, None) for field in DROPOUT_FIELDS}
    active = [f"{field}={value}" for field, value in dropout.items() if value]
    if active:
        return f"{name} drops attention weights in training ({', '.join(active)})"
    return None


@contextmanager
def attention_implementation(model: nn.Module, implementation: str) -> Iterator[None]:
    """Run `model` with one of transformers' attention implementations inside the block; nests."""
    lm = causal_lm(model)
    before = lm.config._attn_implementation
    if implementation != before:
        lm.set_attn_implementation(implementation)
    try:
        yield
    finally:
        if lm.config._attn_implementation != before:
            lm.set_attn_implementation(before)


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Switch `model` to packed attention inside the block, backward pass included; nests.

    Gradient checkpointing runs the layers again in the backward pass, so that must happen inside the block too.
    Inside it the model accepts packs only; `native_attention` switches back for generation.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _packed_attention_forward)
    lm = causal_lm(model)
    if not is_packed(lm):
        lm._grpo_native_attention = lm.config._attn_implementation
    with attention_implementation(lm, PACKED):
        yield


@contextmanager
def native_attention(model: nn.Module) -> Iterator[None]:
    """Give `model` its own attention back inside the block; without effect outside `packed_attention`."""
    lm = causal_lm(model)
    with attention_implementation(lm, lm._grpo_native_attention) if is_packed(lm) else nullcontext():
        yield


def is_packed(model: nn.Module) -> bool:
    """Whether `model` is inside `packed_attention`."""
    return causal_lm(model).config._attn_implementation == PACKED


def _packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer.

    Takes queries [1, H, T, D], keys and values [1, K, T, D] and returns [1, T, H, D of the values] and no weights.
    A query sees `sliding_window` keys, its own included; `softcap` is c in `c * tanh(score / c)`. Further keywords are
    for other attention functions, and ignored but for those that would change the result.
    """
    name = type(module).__name__
    if layout is None:
        raise ValueError(f"layout must reach {name} inside packed_attention: use native_attention for other calls")
    if attention_mask is not None:
        raise ValueError(f"attention_mask must be None in {name} under packed attention, got a mask")
    wanted = [keyword for keyword in REFUSED_KEYWORDS if kwargs.get(keyword) is not None]
    if wanted or dropout > 0 or not getattr(module, "is_causal", True):
        wanted += [f"dropout={dropout}"] * (dropout > 0) + ["is_causal=False"] * (
            not getattr(module, "is_causal", True)
        )
        raise ValueError(f"{name} must use plain causal attention to be packed, got {', '.join(wanted)}")
    device_type = query.device.type
    if device_type != "cpu" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_THD, key_TKD, value_TKD = (states[0].transpose(0, 1) for states in (query, key, value))
    backend = _choose_backend(query_THD, value_TKD, softcap)
    call = _Call(plan=layout, scaling=scaling, window=sliding_window, softcap=softcap)
    return backend(query_THD, key_TKD, value_TKD, call)[None], None


def _choose_backend(query_THD: Tensor, value_TKD: Tensor, softcap: float | None) -> Callable[..., Tensor]:
    half = query_THD.dtype in (torch.float16, torch.bfloat16)
    width = query_THD.shape[-1]
    flash_fits = query_THD.is_cuda and half and width == value_TKD.shape[-1] and width <= MAX_FLASH_WIDTH
    if flash_fits and importlib.util.find_spec("flash_attn") is not None:
        backend = _flash_attention
    elif flash_fits and softcap is None:
        backend = _varlen_attention
    else:
        backend = _tiled_attention
    _announce(backend.__name__, query_THD.device.type, query_THD.dtype)
    return backend


@cache
def _announce(backend: str, device_type: str, dtype: torch.dtype) -> None:
    """Log a choice of back end the first time it is made."""
    from transformers.utils import logging

    logging.get_logger(__name__).info(f"packed attention: {backend.strip('_')} on {device_type} in {dtype}")


def _packed_keys(key_TKD: Tensor, value_TKD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    if layout.key_index is None:
        return key_TKD, value_TKD
    return key_TKD.index_select(0, layout.key_index), value_TKD.index_select(0, layout.key_index)


def _flash_attention(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, call: _Call) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    layout = call.plan.layout
    out: Tensor = flash_attn_varlen_func(
        query_THD,
        *_packed_keys(key_TKD, value_TKD, layout),
        cu_seqlens_q=layout.cu_queries,
        cu_seqlens_k=layout.cu_keys,
        max_seqlen_q=max(layout.query_lengths),
        max_seqlen_k=max(layout.key_lengths),
        softmax_scale=call.scaling,
        causal=True,
        window_size=(-1, -1) if call.window is None else (call.window - 1, 0),
        softcap=call.softcap or 0.0,
    )
    return out


@cache
def _varlen_function() -> Callable[..., Any]:
    """Torch's varlen attention for fewer key-value heads than query heads, which torch 2.11 allows without saying."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return partial(varlen_attn, enable_gqa=True)
    return varlen_attn


def _varlen_attention(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, call: _Call) -> Tensor:
    layout = call.plan.layout
    out: Tensor = _varlen_function()(
        query_THD,
        *_packed_keys(key_TKD, value_TKD, layout),
        layout.cu_queries,
        layout.cu_keys,
        max(layout.query_lengths),
        max(layout.key_lengths),
        scale=call.scaling,
        window_size=(-1 if call.window is None else call.window - 1, 0),
    )
    return out


def _tiled_attention(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, call: _Call) -> Tensor:
    tiling = call.plan.tiling(call.window, query_THD.shape[1], key_TKD.shape[1])
    out: Tensor = _TiledAttention.apply(query_THD, key_TKD, value_TKD, tiling, call.scaling, call.softcap)
    return out


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
class _Tiling:
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


def _tile(layout: Layout, *, window: int | None, num_heads: int, num_kv_heads: int) -> _Tiling:
    device = layout.cu_queries.device
    num_queries, num_keys = torch.tensor(layout.query_lengths), torch.tensor(layout.key_lengths)
    query_starts = torch.tensor([0, *accumulate(layout.query_lengths)])
    key_starts = torch.tensor([0, *accumulate(layout.key_lengths)])
    key_index = torch.arange(int(key_starts[-1])) if layout.key_index is None else layout.key_index.cpu()
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
                    query_rows=rows.to(device),
                    key_rows=(key_BL[:, None] * num_kv_heads + torch.arange(num_kv_heads)[:, None])
                    .flatten()
                    .to(device),
                    padding=None if bool(is_row.all()) else (~is_row).nonzero().flatten().to(device),
                    bias=_bias(i_Q, j_L, queries_B1, ahead_B1, window, device),
                )
                tiles.append(tile)
    return _Tiling(tiles=tiles, restore=restore.to(device))


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
    return torch.zeros(seen_BQL.shape).masked_fill_(~seen_BQL, -torch.inf)[:, None, None].to(device)


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
        tiling: _Tiling,
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


def _join(parts: list[Tensor], tiling: _Tiling) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).index_select(0, tiling.restore)
