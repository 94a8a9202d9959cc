"""Linear layers in mixed precision that keep no rounded copy of their weight for the backward pass.

Autocast rounds an fp32 weight to bf16 or fp16 in the forward pass, and autograd keeps the copy until the layer's
backward pass is through: another half of all weights, from one pass to the other. Here the weight is rounded once more
in the backward pass. Results and gradients are bitwise autocast's, which rounds the same values.

Layers that read one tensor, as queries, keys and values do, also share its rounded copy, which autocast makes anew for
each.

What it costs: 6 bytes of memory traffic a weight (4 read, 2 written) once more a backward pass, and once more a forward
pass where several run within one autocast context, whose cache would have kept the copy. A token takes 6 operations a
weight. At 20 GB/s and 200 GFLOP/s of a CPU that is 1 % of a pass of 1,024 tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels.first_order import first_order

# what autocast rounds; float64 it refuses
ROUNDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def mixed_linears(model: nn.Module) -> Iterator[int]:
    """Within, the plain linear layers of `model` keep no copy of their weight under autocast; yields how many.

    A layer of another class, or with a `forward` of its own, is left as it is. Hooks run as before, and so does a
    `forward` that is set on a layer later, or on `nn.Linear`. A deep copy of a layer does as the layer did; a pickled
    one is plain.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    inputs = _LastInput()

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        dtype = _rounding(self, input)
        if dtype is None:
            return type(self).forward(self, input)
        out: Tensor = _MixedLinear.apply(input, inputs.rounded(input, dtype), self.weight, self.bias)
        return out

    for layer in layers:
        # bound, so that a deep copy of the layer calls itself; the class's own in a pickle
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    try:
        yield len(layers)
    finally:
        for layer in layers:
            # others may have wrapped it
            if getattr(vars(layer).get("forward"), "__func__", None) is forward:
                del layer.forward


def _rounding(layer: nn.Linear, input: Tensor) -> torch.dtype | None:
    """What autocast would round the layer's weight to for a backward pass; None where it would not."""
    device, weight = input.device, layer.weight
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    is_rounded = weight.dtype != dtype and weight.dtype in ROUNDED_DTYPES and input.dtype in ROUNDED_DTYPES
    # sharded and quantised weights are of other classes
    is_plain = type(weight) is nn.Parameter and weight.device == device and not input.is_inference()
    return dtype if is_rounded and is_plain and _is_torchs(type(layer).forward) else None


def _is_torchs(forward: Any) -> bool:
    """Whether nobody has replaced `nn.Linear.forward`, before or after this module was imported."""
    return getattr(forward, "__globals__", None) is vars(nn.modules.linear)


class _LastInput:
    """The tensor that layers have read last, and its rounded copy, which goes when the tensor goes."""

    def __init__(self) -> None:
        # a weak reference, the tensor's state when it was rounded, the copy
        self._kept: tuple[weakref.ref[Tensor], tuple[int, int], Tensor] | None = None

    def rounded(self, input: Tensor, dtype: torch.dtype) -> Tensor:
        """The input in `dtype`, without a gradient.

        In-place changes of the input are seen as autograd sees them: those through `.data` are not.
        """
        if input.dtype == dtype:
            return input.detach()
        kept, state = self._kept, (input._version, input.data_ptr())
        if kept is not None and kept[0]() is input and kept[1] == state and kept[2].dtype == dtype:
            return kept[2]
        copy = input.detach().to(dtype)
        self._kept = (weakref.ref(input, self._forget), state, copy)
        return copy

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        if self._kept is not None and self._kept[0] is reference:
            self._kept = None


class _MixedLinear(torch.autograd.Function):
    """`linear` of the operands as autocast rounds them; saves the rounded input and the weight as it is."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rounded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_input, _, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rounded if needs_weight else None, weight if needs_input else None)
        ctx.shape, ctx.rounded_dtype = input.shape, rounded.dtype
        ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        rounded_bias = None if bias is None else bias.to(rounded.dtype)
        return nn.functional.linear(rounded, weight.to(rounded.dtype), rounded_bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rounded, weight = ctx.saved_tensors
        needs_input, _, needs_weight, needs_bias = ctx.needs_input_grad
        input_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dout = dout.reshape(-1, dout.shape[-1])
        dinput = dweight = dbias = None
        if needs_input:
            dinput = dout.mm(weight.to(ctx.rounded_dtype)).view(ctx.shape).to(input_dtype)
        if needs_weight:
            dweight = dout.t().mm(rounded.reshape(-1, rounded.shape[-1])).to(weight_dtype)
        if needs_bias:
            dbias = dout.sum(0).to(bias_dtype)
        return dinput, None, dweight, dbias
