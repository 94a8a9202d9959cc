# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Passes over rows of width D and over whole tensors, at the two ends of a sweep.

Shapes: N tokens, R rows, D hidden width, V vocabulary.
Source: kernels/README.md, "The anchored softmax".
Spec: `linear_logps` in this package, whose torch path does the same with torch's operators.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.specimen import Specimen, specimen_of
from grpo_kernels.tile_kernels import BLOCK, block_for, capped, check_rows, warps_for

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# columns of a step of a dot product: 8 values a thread of each operand, for 16 spill on sm_100
DOT_BLOCK = 1024

# programs of a pass that usually finds nothing to do: one wave of 8 on each of 132 multiprocessors
MAX_PROGRAMS = 1056


@triton.jit
def _target_logits_kernel(
    # [N, D]; [V, D]; [N] int64; [V]; [N] fp32
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    bias_ptr,
    inv_temperature_ptr,
    # [N] fp32 output
    out_ptr,
    hidden_stride_N,
    hidden_stride_D,
    weight_stride_V,
    weight_stride_D,
    D,
    V,
    logit_scale,
    softcap,
    OPERAND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    is_inside = (target >= 0) & (target < V)
    width = tl.where(is_inside, D, 0)
    # fp32 sums of products that are exact in fp32 for half-precision operands
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = offs < width
        h = tl.load(hidden_ptr + row * hidden_stride_N + offs * hidden_stride_D, mask=mask, other=0.0)
        w = tl.load(weight_ptr + target * weight_stride_V + offs * weight_stride_D, mask=mask, other=0.0)
        sums += h.to(OPERAND).to(tl.float32) * w.to(OPERAND).to(tl.float32)
    x = tl.sum(sums, 0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + target, mask=is_inside, other=0.0).to(OPERAND).to(tl.float32)
    x *= logit_scale
    if HAS_SOFTCAP:
        x = capped(x, softcap)
    tl.store(out_ptr + row, x * tl.load(inv_temperature_ptr + row))


def target_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None,
    inv_temperature_N: Tensor,
    logit_scale: float,
    softcap: float | None,
    operand: torch.dtype,
    block: int | None = None,
    num_warps: int | None = None,
) -> Tensor:
    """[N] fp32 logits of the targets; a target outside [0, V) reads nothing and gives 0.

    Hidden states, weight and bias are rounded to `operand`; their products are summed in fp32. Any strides.
    """
    N, D = hidden_ND.shape
    V = weight_VD.shape[0]
    assert weight_VD.shape == (V, D)
    assert bias_V is None or (bias_V.shape == (V,) and bias_V.is_contiguous())
    check_rows(N, targets_N, inv_temperature_N)
    out_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
    if N == 0:
        return out_N
    block = block or min(block_for(D), DOT_BLOCK)
    _target_logits_kernel[(N,)](
        hidden_ND,
        weight_VD,
        targets_N,
        bias_V,
        inv_temperature_N,
        out_N,
        *hidden_ND.stride(),
        *weight_VD.stride(),
        D,
        V,
        logit_scale,
        1.0 if softcap is None else softcap,
        OPERAND=TRITON_DTYPES[operand],
        HAS_BIAS=bias_V is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_D=block,
        num_warps=num_warps or 2 * warps_for(block),
    )
    return out_N


@triton.jit
def _scale_rows_kernel(
    # [R, D]; [R] fp32
    hidden_ptr,
    scale_ptr,
    # [R, D] output, contiguous
    out_ptr,
    hidden_stride_R,
    hidden_stride_D,
    D,
    OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = offs < D
    h = tl.load(hidden_ptr + row * hidden_stride_R + offs * hidden_stride_D, mask=mask, other=0.0)
    scaled = h.to(OPERAND).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * D + offs, scaled.to(out_ptr.dtype.element_ty), mask=mask)


def scale_rows(
    hidden_RD: Tensor,
    scale_R: Tensor,
    *,
    operand: torch.dtype,
    dtype: torch.dtype,
    block: int | None = None,
    num_warps: int | None = None,
) -> Tensor:
    """[R, D] `dtype`, contiguous: hidden states rounded to `operand`, times the row's fp32 scale. Any strides."""
    R, D = hidden_RD.shape
    check_rows(R, scale_R)
    out_RD = torch.empty(R, D, dtype=dtype, device=hidden_RD.device)
    if R == 0:
        return out_RD
    block = block or block_for(D)
    _scale_rows_kernel[(R, triton.cdiv(D, block))](
        hidden_RD,
        scale_R,
        out_RD,
        *hidden_RD.stride(),
        D,
        OPERAND=TRITON_DTYPES[operand],
        BLOCK_D=block,
        num_warps=num_warps or warps_for(block),
    )
    return out_RD


@triton.jit
def _finish_hidden_kernel(
    # [R, D] fp32, contiguous; [V, D]; [R] int64; [R] fp32 each
    dhidden_ptr,
    weight_ptr,
    targets_ptr,
    scale_ptr,
    at_target_ptr,
    # [R, D] output
    out_ptr,
    weight_stride_V,
    weight_stride_D,
    out_stride_R,
    out_stride_D,
    D,
    V,
    OPERAND: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = offs < D
    target = tl.load(targets_ptr + row)
    is_inside = (target >= 0) & (target < V)
    dhidden = tl.load(dhidden_ptr + row * D + offs, mask=mask, other=0.0)
    w = tl.load(
        weight_ptr + target * weight_stride_V + offs * weight_stride_D, mask=offs < tl.where(is_inside, D, 0), other=0.0
    )
    dhidden += tl.load(at_target_ptr + row) * w.to(OPERAND).to(tl.float32)
    dhidden *= tl.load(scale_ptr + row)
    out_ptrs = out_ptr + row * out_stride_R + offs * out_stride_D
    tl.store(out_ptrs, dhidden.to(out_ptr.dtype.element_ty), mask=mask)


def finish_hidden(
    dhidden_RD: Tensor,
    *,
    weight_VD: Tensor,
    targets_R: Tensor,
    scale_R: Tensor,
    at_target_R: Tensor,
    operand: torch.dtype,
    out_RD: Tensor,
    block: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Write `(dhidden + at_target w_t) scale` into `out_RD`, in its dtype and any strides.

    `dhidden_RD` is fp32 and contiguous, and may be `out_RD` itself. The target's row of the weight is rounded to
    `operand`; a target outside [0, V) adds nothing.
    """
    R, D = dhidden_RD.shape
    V = weight_VD.shape[0]
    assert dhidden_RD.dtype == torch.float32, dhidden_RD.dtype
    assert dhidden_RD.is_contiguous()
    assert weight_VD.shape == (V, D)
    assert out_RD.shape == (R, D)
    check_rows(R, targets_R, scale_R, at_target_R)
    if R == 0:
        return
    block = block or block_for(D)
    _finish_hidden_kernel[(R, triton.cdiv(D, block))](
        dhidden_RD,
        weight_VD,
        targets_R,
        scale_R,
        at_target_R,
        out_RD,
        *weight_VD.stride(),
        *out_RD.stride(),
        D,
        V,
        OPERAND=TRITON_DTYPES[operand],
        BLOCK_D=block,
        num_warps=num_warps or warps_for(block),
    )


@triton.jit
def _scale_unless_one_kernel(
    # updated
    tensor_ptr,
    # one element
    factor_ptr,
    num_elements,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, num_elements, tl.num_programs(0).to(tl.int64) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < num_elements
        x = tl.load(tensor_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(tensor_ptr + offs, (x * factor).to(tensor_ptr.dtype.element_ty), mask=mask)


def scale_unless_one_(
    tensor: Tensor, factor: Tensor, *, block: int | None = None, num_warps: int | None = None
) -> None:
    """Multiply a contiguous tensor by a factor of one element in place, in fp32; a factor of 1 costs one read of it.

    The factor is read by the device: the host does not wait.
    """
    assert tensor.is_contiguous()
    assert factor.numel() == 1, factor.shape
    num_elements = tensor.numel()
    if num_elements == 0:
        return
    block = block or block_for(num_elements)
    _scale_unless_one_kernel[(min(triton.cdiv(num_elements, block), MAX_PROGRAMS),)](
        tensor,
        factor,
        num_elements,
        BLOCK=block,
        num_warps=num_warps or warps_for(block),
    )


def specimens() -> Iterator[Specimen]:
    """What the offline compiler builds of this file."""
    for operand, stored in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
        narrow = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[operand]
        for has_all in (False, True):
            yield specimen_of(
                f"target_logits {stored} as {operand}{' bias, softcap' if has_all else ''}",
                _target_logits_kernel,
                pointers={
                    "hidden_ptr": stored,
                    "weight_ptr": stored,
                    "targets_ptr": "i64",
                    "bias_ptr": stored if has_all else None,
                    "inv_temperature_ptr": "fp32",
                    "out_ptr": "fp32",
                },
                floats=("logit_scale", "softcap"),
                constexprs={
                    "hidden_stride_D": 1,
                    "weight_stride_D": 1,
                    "OPERAND": narrow,
                    "HAS_BIAS": has_all,
                    "HAS_SOFTCAP": has_all,
                    "BLOCK_D": DOT_BLOCK,
                },
                num_warps=2 * warps_for(DOT_BLOCK),
            )
        yield specimen_of(
            f"scale_rows {stored} as {operand}",
            _scale_rows_kernel,
            pointers={"hidden_ptr": stored, "scale_ptr": "fp32", "out_ptr": "fp32" if operand == "fp16" else operand},
            constexprs={"hidden_stride_D": 1, "OPERAND": narrow, "BLOCK_D": BLOCK},
            num_warps=warps_for(BLOCK),
        )
        vectors = {"targets_ptr": "i64", "scale_ptr": "fp32", "at_target_ptr": "fp32"}
        yield specimen_of(
            f"finish_hidden {stored} as {operand}",
            _finish_hidden_kernel,
            pointers={"dhidden_ptr": "fp32", "weight_ptr": stored, **vectors, "out_ptr": stored},
            constexprs={"weight_stride_D": 1, "out_stride_D": 1, "OPERAND": narrow, "BLOCK_D": BLOCK},
            num_warps=warps_for(BLOCK),
        )
    for dtype in ("bf16", "fp16", "fp32"):
        yield specimen_of(
            f"scale_unless_one {dtype}",
            _scale_unless_one_kernel,
            pointers={"tensor_ptr": dtype, "factor_ptr": "fp32"},
            constexprs={"BLOCK": BLOCK},
            num_warps=warps_for(BLOCK),
        )
