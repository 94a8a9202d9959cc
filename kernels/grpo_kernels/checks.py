"""What every public op asks of its arguments; users' mistakes end here as ValueErrors."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device in one phrase, for messages."""
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_dtype(**tensors: Tensor | None) -> None:
    """Refuse tensors that are not float64, float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {describe(tensor)}")


def check_device(**tensors: Tensor | None) -> None:
    """Refuse tensors that lie on another device than the first."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {describe(tensor)}")


def check_positive(**values: float | None) -> None:
    """Refuse numbers that are not finite and above zero; None passes."""
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and above 0, got {value}")


def check_temperature(
    temperature: float | Tensor, N: int, *, operand: torch.dtype, device: torch.device
) -> float | Tensor:
    """The temperature as a float, or as [N] in the dtype of the logits; its values are not read on an accelerator."""
    if not isinstance(temperature, Tensor):
        check_positive(temperature=temperature)
        return float(temperature)
    if temperature.shape != (N,) or not temperature.is_floating_point() or temperature.device != device:
        raise ValueError(f"temperature must be a number or [{N}] float on {device}, got {describe(temperature)}")
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient: none is computed for it")
    if device.type == "cpu" and not (temperature.isfinite() & (temperature > 0)).all():
        raise ValueError(f"temperature must be finite and above 0, got values down to {temperature.min().item()}")
    return temperature.to(torch.promote_types(operand, torch.float32))


def check_share(**values: float) -> None:
    """Refuse numbers outside (0, 1]."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value}")


def check_lengths(N: int, *, sequence_lengths: Sequence[int] | None) -> None:
    """Refuse lengths that do not add up to the rows."""
    if sequence_lengths is None:
        return
    if sum(sequence_lengths) != N or min(sequence_lengths, default=0) < 0:
        raise ValueError(f"sequence_lengths must be non-negative and add up to {N}, got {list(sequence_lengths)}")


def check_weight_grad(weight_grad: Tensor | None, weight_VD: Tensor, *, is_wanted: bool) -> None:
    """Refuse a buffer that cannot take the weight's gradient."""
    if weight_grad is None:
        return
    if not is_wanted:
        raise ValueError("weight_grad was given, but weight_VD does not require a gradient here")
    if weight_grad.shape != weight_VD.shape or weight_grad.dtype not in (torch.float32, weight_VD.dtype):
        wanted = f"{list(weight_VD.shape)} float32 or {weight_VD.dtype}"
        raise ValueError(f"weight_grad must be {wanted} like weight_VD, got {describe(weight_grad)}")
    if weight_grad.requires_grad:
        raise ValueError("weight_grad must not require a gradient itself")
    check_device(weight_VD=weight_VD, weight_grad=weight_grad)


def check_head(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias: Tensor | None) -> None:
    """Refuse shapes, dtypes and devices that do not fit a language-model head, and targets outside the vocabulary.

    On an accelerator the range of the targets is checked only under TRITON_DEBUG=1: reading it waits for the device.
    """
    if hidden_ND.ndim != 2:
        raise ValueError(f"hidden_ND must be [N, D], got {describe(hidden_ND)}")
    N, D = hidden_ND.shape
    if weight_VD.ndim != 2 or weight_VD.shape[1] != D or weight_VD.shape[0] == 0:
        raise ValueError(f"weight_VD must be [V, {D}] like hidden_ND's columns, got {describe(weight_VD)}")
    V = weight_VD.shape[0]
    if targets_N.shape != (N,) or targets_N.dtype != torch.int64:
        raise ValueError(f"targets_N must be [{N}] torch.int64 like hidden_ND's rows, got {describe(targets_N)}")
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must be [{V}] like weight_VD's rows, got {describe(bias)}")
    check_dtype(hidden_ND=hidden_ND, weight_VD=weight_VD, bias=bias)
    check_device(hidden_ND=hidden_ND, weight_VD=weight_VD, targets_N=targets_N, bias=bias)
    reads_targets = targets_N.device.type == "cpu" or os.environ.get("TRITON_DEBUG") == "1"
    if N and reads_targets and (targets_N.min() < 0 or targets_N.max() >= V):
        lowest, highest = int(targets_N.min()), int(targets_N.max())
        raise ValueError(f"targets_N must lie in [0, {V}), got values from {lowest} to {highest}")


def operand_dtype(hidden_ND: Tensor, weight_VD: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype `F.linear` would multiply in: autocast's where it is on (float64 stays), else the tensors' own."""
    device = hidden_ND.device.type
    dtypes = {t.dtype for t in (hidden_ND, weight_VD, bias) if t is not None}
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device)
    if len(dtypes) > 1:
        raise ValueError(
            "hidden_ND, weight_VD and bias must share one dtype outside autocast, got "
            f"{hidden_ND.dtype}, {weight_VD.dtype} and {None if bias is None else bias.dtype}"
        )
    return hidden_ND.dtype


def check_tokens(**tensors: Tensor | None) -> None:
    """Refuse per-token tensors unlike the first, which must be [N], float32 or float64."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    first_name, first = given[0]
    if first.ndim != 1 or first.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{first_name} must be [N] float32 or float64, got {describe(first)}")
    for name, tensor in given[1:]:
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(f"{name} must be like {first_name}, {describe(first)}, got {describe(tensor)}")
    check_device(**tensors)
