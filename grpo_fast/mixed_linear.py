"""Linear layers in mixed precision that keep no rounded copy of their weight for the backward pass.

Autocast rounds an fp32 weight to bf16 or fp16 in the forward pass, and autograd keeps the copy until the layer's
backward pass is through: another half of all weights, from one pass to the other. Here the weight is rounded once more
in the backward pass, where it costs one read of it beside two matrix products. Results and gradients are bitwise
autocast's, which rounds the same values.

Layers that read one tensor, as queries, keys and values do, also share its rounded copy, which autocast makes anew for
each.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grpo_kernels.first_order import first_order

LINEAR_FORWARD = nn.Linear.forward
# what autocast rounds; float64 it refuses
ROUNDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def install_mixed_linear(model: nn.Module) -> int:
    """Let the plain linear layers of `model` keep no copy of their weight under autocast; returns how many.

    A layer of another class, or with a `forward` of its own, is left as it is. Hooks run as before, and so does a
    `forward` that is set on a layer later, or on `nn.Linear`.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for layer in layers:
        # bound, so that a deep copy of the layer calls itself; the class's own in a pickle
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    return len(layers)


def forward(self: nn.Linear, input: Tensor) -> Tensor:
    """`nn.Linear.forward`."""
    dtype = _rounding(self, input)
    if dtype is None:
        return type(self).forward(self, input)
    out: Tensor = _MixedLinear.apply(input, _rounded(input, dtype), self.weight, self.bias)
    return out


def _rounding(layer: nn.Linear, input: Tensor) -> torch.dtype | None:
    """What autocast would round the layer's weight to for a backward pass; None where it would not."""
    device, weight = input.device, layer.weight
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    is_rounded = weight.dtype != dtype and weight.dtype in ROUNDED_DTYPES and input.dtype in ROUNDED_DTYPES
    # sharded and quantised weights are of other classes
    is_plain = type(weight) is nn.Parameter and weight.device == device and not input.is_inference()
    return dtype if is_rounded and is_plain and type(layer).forward is LINEAR_FORWARD else None


def _rounded(input: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in `dtype`; as long as it is alive and as it was, the same tensor for each layer that reads it."""
    if input.dtype == dtype:
        return input.detach()
    kept = vars(input).get("_rounded")
    if kept is None or kept[0] != input._version or kept[1].dtype != dtype:
        kept = input._rounded = (input._version, input.detach().to(dtype))  # type: ignore[attr-defined]
    rounded: Tensor = kept[1]
    return rounded


class _MixedLinear(torch.autograd.Function):
    """`linear` of the operands as autocast rounds them; saves the rounded input and the weight as it is."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rounded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # what the weight's gradient needs, and what the input's does
        ctx.save_for_backward(rounded if weight.requires_grad else None, weight if input.requires_grad else None)
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
