"""Attention over packed rows, as an attention function that any transformers model can be switched to.

Letters: T packed tokens, H query heads, K key-value heads, D head width, S attention segments.

A pack is run without an attention mask and without a cache; which token sees which is said by a `Layout`, which
travels to every layer as the keyword `layout=` inside an `AttentionPlan`. A call without one, from a subclass's own
code for example, gets the attention the model had before. Four back ends compute the same function:

- `flash_attn`, on CUDA in fp16 or bf16, when that package is installed;
- `torch.nn.attention.varlen`, on CUDA in fp16 or bf16, without soft-capping; this and the one before want the keys of
  each segment end to end, but keep each key once for the backward pass (`grpo_fast.shared_keys`);
- torch's flash kernel for the CPU, in fp32 or wider, without windows and soft-capping: on runs of queries and keys;
- tiles, anywhere, in fp32 or wider: matrix products over padded tiles of similar segments. They take shared prompts,
  windows and soft caps alike, and cost less than the kernel where segments are short.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_fast.batch import Layout
from grpo_fast.segment_attention import Part, make_parts, segment_attention
from grpo_fast.shared_keys import on_gathered_keys
from grpo_fast.tiled_attention import Tiling, make_tiling, tiled_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = "grpo_packed"
# attribute of a packed model's config: the implementation it had before
NATIVE = "_grpo_native_attention"
PACKABLE_LAYERS = {"full_attention", "sliding_attention", "attention"}
DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "attn_dropout_prob")
# keywords of a model's call that reach its attention functions without meaning anything to them; any other that is set
# asks for something that no back end here computes (sinks, biases, chosen blocks)
HARMLESS_KEYWORDS = {"position_ids", "use_cache", "cache_position", "return_dict", "is_causal"} | {
    f"output_{what}" for what in ("attentions", "hidden_states", "router_logits")
}
# FlashAttention 2 holds heads up to this width
MAX_FLASH_WIDTH = 256


_is_running_packs: ContextVar[bool] = ContextVar("is_running_packs", default=False)
# the masks a model has made for a pack and the window of each, while `comparing_windows`
_made_masks: ContextVar[list[tuple[Tensor, int | None]] | None] = ContextVar("made_masks", default=None)


class AttentionPlan:
    """A layout on the device, with what back ends derive from it at the first layer and keep for the others.

    Attributes:
        layout: Its tensors are on the device.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Take a layout that is on the host, from which the rest is made without a wait for the device."""
        self.layout, self._host, self._device = layout.to(device), layout, device
        self._tilings: dict[tuple[int | None, int, int], Tiling] = {}

    @cached_property
    def parts(self) -> list[Part] | None:
        """The parts of a pack on the CPU, or None where tiles serve it better."""
        return make_parts(self._host)

    def reach(self, window: int | None) -> int | None:
        """The window; None where it reaches over every segment, which is the same as none."""
        return None if window is None or window >= max(self._host.key_lengths, default=0) else window

    def tiling(self, window: int | None, num_heads: int, num_kv_heads: int) -> Tiling:
        """The tiles for a window and head counts."""
        window = self.reach(window)
        key = (window, num_heads, num_kv_heads)
        if key not in self._tilings:
            self._tilings[key] = make_tiling(
                self._host, self._device, window=window, num_heads=num_heads, num_kv_heads=num_kv_heads
            )
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


def adds_virtual_tokens(model: nn.Module) -> bool:
    """Whether an adapter learns a prompt, which it puts before every row."""
    configs = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())


def can_pack(model: nn.Module) -> str | None:
    """Why rows cannot be packed for this model, in words, or None if they can.

    This reads the model's declarations only. `grpo_fast.self_check.check_scoring` compares results.
    """
    lm = causal_lm(model)
    config = lm.config
    name = type(lm).__name__
    layer_types = set(getattr(config, "layer_types", None) or ())
    if adds_virtual_tokens(model):
        return "prompt-learning adapters prepend virtual tokens to every row"
    if config.get_text_config() is not config:
        return f"{name} has parts beside its language model"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "use_bidirectional_attention", 0) in (
        True,
        "all",
    ):
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
    """Let `model` take packs inside the block, backward pass included; nests.

    Gradient checkpointing runs the layers again in the backward pass, so that must happen inside the block too.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, _uncompiled(_packed_attention_forward))
    AttentionMaskInterface.register(PACKED, _uncompiled(_packed_mask))
    lm = causal_lm(model)
    if is_packed(lm):
        yield
        return
    before = vars(lm.config).get(NATIVE)
    setattr(lm.config, NATIVE, lm.config._attn_implementation)
    try:
        with attention_implementation(lm, PACKED):
            yield
    finally:
        # a saved config must not hold it
        delattr(lm.config, NATIVE)
        if before is not None:
            setattr(lm.config, NATIVE, before)


@contextmanager
def native_attention(model: nn.Module) -> Iterator[None]:
    """Give `model` its own attention back inside the block; without effect outside `packed_attention`."""
    lm = causal_lm(model)
    with attention_implementation(lm, getattr(lm.config, NATIVE)) if is_packed(lm) else nullcontext():
        yield


@contextmanager
def running_packs() -> Iterator[None]:
    """Around a forward pass of a pack: no mask is built for it, and a layer that gets no layout is an error."""
    token = _is_running_packs.set(True)
    try:
        yield
    finally:
        _is_running_packs.reset(token)


@contextmanager
def comparing_windows() -> Iterator[None]:
    """Around `running_packs`: a layer is an error whose own window is not that of the mask its model makes for it."""
    token = _made_masks.set([])
    try:
        yield
    finally:
        _made_masks.reset(token)


@cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as torch.compile leaves it, between the compiled parts of layers: tiles follow the pack."""
    # one object for all calls, or every step would compile again
    return torch.compiler.disable(function)


def _packed_mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """What transformers calls before the layers: the native attention's mask, or none for a pack."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if _is_running_packs.get():
        made = _made_masks.get()
        if made is None:
            return None
        mask = ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, config=config, **kwargs)
        made.append((mask, kwargs.get("local_size")))
        return mask
    return ALL_MASK_ATTENTION_FUNCTIONS[getattr(config, NATIVE)](*args, config=config, **kwargs)


def _native_attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer's attention as it was before `packed_attention`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # where each model keeps the attention that is not in transformers' table
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(getattr(module.config, NATIVE), eager)(module, *args, **kwargs)


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
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer.

    Takes queries [1, H, T, D], keys and values [1, K, T, D] and returns [1, T, H, D of the values] and no weights.
    A query sees `sliding_window` keys, its own included; `softcap` is c in `c * tanh(score / c)`. Further keywords are
    for other attention functions, and ignored but for those that would change the result.
    """
    name = type(module).__name__
    if layout is None:
        if _is_running_packs.get():
            raise ValueError(f"layout must reach {name}: its model does not hand keywords down to its layers")
        native = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap} | kwargs
        return _native_attention_forward(module, query, key, value, attention_mask, **native)
    if attention_mask is not None:
        _compare_window(name, attention_mask, sliding_window)
    wanted = [key for key, given in kwargs.items() if given is not None and key not in HARMLESS_KEYWORDS]
    wanted += [f"dropout={dropout}"] if dropout > 0 else []
    # a call's own word overrules its layer's
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        wanted.append("is_causal=False")
    if wanted:
        raise ValueError(f"{name} must use plain causal attention to be packed, got {', '.join(wanted)}")
    device_type = query.device.type
    if device_type != "cpu" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_THD, key_TKD, value_TKD = (states[0].transpose(0, 1) for states in (query, key, value))
    call = _Call(plan=layout, scaling=scaling, window=sliding_window, softcap=softcap)
    backend = _choose_backend(query_THD, value_TKD, call)
    return backend(query_THD, key_TKD, value_TKD, call)[None], None


def _compare_window(name: str, mask: Tensor, window: int | None) -> None:
    for made, made_window in _made_masks.get() or ():
        # a layer may cut the mask to its keys
        if made.data_ptr() == mask.data_ptr():
            if made_window == window:
                return
            raise ValueError(f"{name} must be given the window of its mask to be packed, {made_window}; got {window}")
    raise ValueError(f"attention_mask must be None in {name} under packed attention, got a mask")


def _choose_backend(query_THD: Tensor, value_TKD: Tensor, call: _Call) -> Callable[..., Tensor]:
    half = query_THD.dtype in (torch.float16, torch.bfloat16)
    width = query_THD.shape[-1]
    is_square = width == value_TKD.shape[-1]
    flash_fits = query_THD.is_cuda and half and is_square and width <= MAX_FLASH_WIDTH
    is_plain = call.softcap is None and call.plan.reach(call.window) is None
    if flash_fits and importlib.util.find_spec("flash_attn") is not None:
        backend = _flash_attention
    elif flash_fits and call.softcap is None:
        backend = _varlen_attention
    elif query_THD.device.type == "cpu" and is_square and is_plain and call.plan.parts is not None:
        backend = _segment_attention
    else:
        backend = _tiled_attention
    _announce(backend.__name__, query_THD.device.type, query_THD.dtype)
    return backend


@cache
def _announce(backend: str, device_type: str, dtype: torch.dtype) -> None:
    """Log a choice of back end the first time it is made."""
    from transformers.utils import logging

    logging.get_logger(__name__).info(f"packed attention: {backend.strip('_')} on {device_type} in {dtype}")


def _flash_attention(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, call: _Call) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    layout = call.plan.layout

    def kernel(keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            query_THD,
            keys,
            values,
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

    return on_gathered_keys(kernel, key_TKD, value_TKD, layout.key_index)


@cache
def _varlen_function() -> Callable[..., Any]:
    """Torch's varlen attention for fewer key-value heads than query heads, which torch 2.11 allows without saying."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return partial(varlen_attn, enable_gqa=True)
    return varlen_attn


def _varlen_attention(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, call: _Call) -> Tensor:
    layout = call.plan.layout

    def kernel(keys: Tensor, values: Tensor) -> Tensor:
        out: Tensor = _varlen_function()(
            query_THD,
            keys,
            values,
            layout.cu_queries,
            layout.cu_keys,
            max(layout.query_lengths),
            max(layout.key_lengths),
            scale=call.scaling,
            window_size=(-1 if call.window is None else call.window - 1, 0),
        )
        return out

    return on_gathered_keys(kernel, key_TKD, value_TKD, layout.key_index)


def _segment_attention(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, call: _Call) -> Tensor:
    assert call.plan.parts is not None
    return segment_attention(query_THD, key_TKD, value_TKD, call.plan.parts, scaling=call.scaling)


def _tiled_attention(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, call: _Call) -> Tensor:
    tiling = call.plan.tiling(call.window, query_THD.shape[1], key_TKD.shape[1])
    return tiled_attention(query_THD, key_TKD, value_TKD, tiling, scaling=call.scaling, softcap=call.softcap)
