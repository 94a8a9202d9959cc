# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Passes over tiles of the [N, V] plane: from products to exponentials and their sums, or to coefficients.

Shapes: R rows of a tile, C columns of a tile, V vocabulary, T tiles along it.
Source: kernels/README.md, "The anchored softmax".
Spec: `RowSums.add_tile` and `Slopes.coefficients_` in `grpo_kernels.head`.

A row belongs to one program, or each of its elements does, so no result depends on the rows beside it or on the order
in which programs run. Every pass is bound by memory: per element it reads and writes what its launcher says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.head import MAX_EXPONENT
from grpo_kernels.specimen import Specimen, specimen_of

# a row of a tile stays in registers: 32 fp32 values a thread at 16 warps
MAX_COLUMNS = 16384

# the logit of a column beyond the last: its exponential is 0, and finite, so that 0 times it is 0
NOTHING = tl.constexpr(-1e38)

# columns of a program in the passes without a sum over the row
BLOCK = 2048


def warps_for(block: int) -> int:
    """Warps of a program over `block` columns: 16 values a thread, four 16-byte loads of fp32 in flight."""
    return min(max(block // 512, 1), 16)


def block_for(columns: int) -> int:
    """Columns of a program in the passes without a sum over the row."""
    return min(triton.next_power_of_2(columns), BLOCK)


def check_rows(R: int, *vectors: Tensor | None) -> None:
    """[R] vectors of unit stride; None passes."""
    for vector in vectors:
        assert vector is None or (vector.shape == (R,) and (R < 2 or vector.stride(0) == 1)), (R, vector.shape)


@triton.jit
def capped(x, softcap):
    """`softcap * tanh(x / softcap)`, within 1e-6 of the soft cap; the exponential's argument is never above 0."""
    decay = tl.exp(tl.abs(x) * (-2.0 / softcap))
    magnitude = softcap * ((1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def cap_slope(logits, bound):
    """The soft cap's part of d logit / d product, `1 - tanh**2`; `bound` is the largest logit there is."""
    tanh = logits / bound
    return (1.0 - tanh) * (1.0 + tanh)


@triton.jit(do_not_specialize=["has_entropy", "has_kept"])
def _exp_tile_kernel(
    # [R, C] fp32; [C]; [R] int64; [R] fp32
    products_ptr,
    bias_ptr,
    targets_ptr,
    inv_temperature_ptr,
    # [R] fp32, updated
    offset_ptr,
    S_ptr,
    U_ptr,
    # [R, C] output
    kept_ptr,
    products_stride,
    kept_stride,
    C,
    column_start,
    logit_scale,
    softcap,
    # what is wanted is no constexpr: other machine code could sum in another order, and rows scored and rows trained
    # must agree bitwise
    has_entropy,
    has_kept,
    MAX_EXPONENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < C
    x = tl.load(products_ptr + row * products_stride + columns, mask=mask, other=0.0)
    target = tl.load(targets_ptr + row) - column_start
    inv_temperature = tl.load(inv_temperature_ptr + row)
    before = tl.load(offset_ptr + row)
    S = tl.load(S_ptr + row)
    U = tl.load(U_ptr + row)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x *= logit_scale
    if HAS_SOFTCAP:
        x = capped(x, softcap)
    logits = tl.where(mask, x * inv_temperature, NOTHING)

    peak = tl.max(logits, 0)
    offset = tl.where(peak > before + MAX_EXPONENT, peak, before)
    exponents = logits - offset
    # a target in another tile, or outside the vocabulary, meets no column
    target = tl.where((target >= 0) & (target < C), target, -1).to(tl.int32)
    # no exponent but the target's own, which is left out, can be above MAX_EXPONENT
    e = tl.where(columns == target, 0.0, tl.exp(exponents))
    # stored before the sums: their barriers then find fewer registers taken
    kept = e * cap_slope(logits, softcap * inv_temperature) if HAS_SOFTCAP else e
    kept_ptrs = kept_ptr + row * kept_stride + columns
    tl.store(kept_ptrs, kept.to(kept_ptr.dtype.element_ty), mask=columns < C * has_kept)
    added = tl.sum(e, 0)
    added_to_U = tl.sum(e * exponents, 0)
    step = offset - before
    shrink = tl.exp(-step)
    tl.store(U_ptr + row, (U - step * S) * shrink + added_to_U, mask=has_entropy != 0)
    tl.store(S_ptr + row, S * shrink + added)
    tl.store(offset_ptr + row, offset)


def exp_tile_(
    products_RC: Tensor,
    *,
    bias_C: Tensor | None,
    targets_R: Tensor,
    column_start: int,
    inv_temperature_R: Tensor,
    logit_scale: float,
    softcap: float | None,
    offset_R: Tensor,
    S_R: Tensor,
    U_R: Tensor | None,
    kept_RC: Tensor | None,
    kept_dtype: torch.dtype = torch.bfloat16,
    num_warps: int | None = None,
) -> None:
    """Add a tile's columns to the sums of its rows, and keep its exponentials: 4 bytes read, 2 or 4 written.

    Args:
        products_RC: [R, C] fp32, `h . w`; C at most `MAX_COLUMNS`; not changed.
        bias_C: [C] float, already rounded to the operand dtype.
        targets_R: [R] int64 in the numbering of the vocabulary.
        column_start: The tile's first column in that numbering.
        inv_temperature_R: [R] fp32.
        logit_scale: Multiplies the products first.
        softcap: Bounds the logits before the temperature.
        offset_R: [R] fp32, updated.
        S_R: [R] fp32, updated.
        U_R: [R] fp32, updated; None without an entropy.
        kept_RC: [R, C] fp32 or bf16, written: the exponentials relative to the updated offset, times the soft cap's
            slope, 0 at the targets. Rows may be strided.
        kept_dtype: Of `kept_RC` in the calls that keep, where this one keeps nothing. Both then run the same machine
            code, and give bitwise the same sums, if the stride of `kept_RC` there is divisible by 16 elements, as it
            should be for wide stores, and its memory 16-byte aligned.
        num_warps: Of a program; a default by C.
    """
    R, C = products_RC.shape
    assert C <= MAX_COLUMNS, C
    assert products_RC.dtype == torch.float32, products_RC.dtype
    assert products_RC.stride(1) == 1 or C == 1
    assert kept_RC is None or (kept_RC.shape == (R, C) and (kept_RC.stride(1) == 1 or C == 1))
    check_rows(R, targets_R, inv_temperature_R, offset_R, S_R, U_R)
    assert bias_C is None or (bias_C.shape == (C,) and bias_C.is_contiguous())
    if R == 0:
        return
    block = triton.next_power_of_2(C)
    _exp_tile_kernel[(R,)](
        products_RC,
        bias_C,
        targets_R,
        inv_temperature_R,
        offset_R,
        S_R,
        # what is not wanted points at memory of its type, and is not written
        S_R if U_R is None else U_R,
        products_RC.view(kept_dtype) if kept_RC is None else kept_RC,
        products_RC.stride(0),
        0 if kept_RC is None else kept_RC.stride(0),
        C,
        column_start,
        logit_scale,
        1.0 if softcap is None else softcap,
        int(U_R is not None),
        int(kept_RC is not None),
        MAX_EXPONENT=MAX_EXPONENT,
        HAS_BIAS=bias_C is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_C=block,
        num_warps=num_warps or warps_for(block),
    )


@triton.jit
def _coefficient_tile_kernel(
    # [R, C] fp32; [C]; [R] int64; [R] fp32 each
    products_ptr,
    bias_ptr,
    targets_ptr,
    inv_temperature_ptr,
    offset_ptr,
    constant_ptr,
    at_entropy_ptr,
    # [R, C] output
    out_ptr,
    products_stride,
    out_stride,
    C,
    column_start,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    x = tl.load(products_ptr + row * products_stride + columns, mask=mask, other=0.0)
    target = tl.load(targets_ptr + row) - column_start
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x *= logit_scale
    if HAS_SOFTCAP:
        x = capped(x, softcap)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    logits = tl.where(mask, x * inv_temperature, NOTHING)

    exponents = logits - tl.load(offset_ptr + row)
    target = tl.where((target >= 0) & (target < C), target, -1).to(tl.int32)
    # the offset is final: no exponent but the target's own is above MAX_EXPONENT
    coefficients = tl.exp(exponents)
    if HAS_ENTROPY:
        coefficients *= tl.load(constant_ptr + row) + tl.load(at_entropy_ptr + row) * exponents
    if HAS_SOFTCAP:
        coefficients *= cap_slope(logits, softcap * inv_temperature)
    coefficients = tl.where(columns == target, 0.0, coefficients)
    tl.store(out_ptr + row * out_stride + columns, coefficients.to(out_ptr.dtype.element_ty), mask=mask)


def coefficient_tile_(
    products_RC: Tensor,
    out_RC: Tensor,
    *,
    bias_C: Tensor | None,
    targets_R: Tensor,
    column_start: int,
    inv_temperature_R: Tensor,
    logit_scale: float,
    softcap: float | None,
    offset_R: Tensor,
    constant_R: Tensor | None,
    at_entropy_R: Tensor | None,
    block: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Write a tile's coefficients, recomputed from its products: 4 bytes read, 2 or 4 written.

    `e_j (constant + at_entropy (l_j - m))`, or `e_j` where both are None, times the soft cap's slope; 0 at the targets.
    `out_RC` may be `products_RC` itself, but not its memory in another dtype. `offset_R` is final. For the rest see
    `exp_tile_`.
    """
    R, C = products_RC.shape
    assert products_RC.dtype == torch.float32, products_RC.dtype
    assert out_RC.shape == (R, C)
    assert (products_RC.stride(1) == 1 and out_RC.stride(1) == 1) or C == 1
    assert (constant_R is None) == (at_entropy_R is None)
    check_rows(R, targets_R, inv_temperature_R, offset_R, constant_R, at_entropy_R)
    assert bias_C is None or (bias_C.shape == (C,) and bias_C.is_contiguous())
    if R == 0:
        return
    block = block or block_for(C)
    _coefficient_tile_kernel[(R, triton.cdiv(C, block))](
        products_RC,
        bias_C,
        targets_R,
        inv_temperature_R,
        offset_R,
        constant_R,
        at_entropy_R,
        out_RC,
        products_RC.stride(0),
        out_RC.stride(0),
        C,
        column_start,
        logit_scale,
        1.0 if softcap is None else softcap,
        HAS_BIAS=bias_C is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_ENTROPY=constant_R is not None,
        BLOCK_C=block,
        num_warps=num_warps or warps_for(block),
    )


def specimens() -> Iterator[Specimen]:
    """What the offline compiler builds of this file."""
    vectors = {"targets_ptr": "i64", "inv_temperature_ptr": "fp32", "offset_ptr": "fp32"}
    # fp16 lacks the range for exponentials
    dtypes = (("bf16", "bf16"), ("fp16", "bf16"), ("fp32", "fp32"))
    for (operand, narrow), has_all in itertools.product(dtypes, (False, True)):
        pointers = {"products_ptr": "fp32", "bias_ptr": operand if has_all else None, **vectors}
        flags = {"HAS_BIAS": has_all, "HAS_SOFTCAP": has_all}
        name = f"{operand}{' bias, softcap' if has_all else ''}"
        for block in (1024, 4096, 8192, MAX_COLUMNS):
            yield specimen_of(
                f"exp_tile {block} {name}",
                _exp_tile_kernel,
                pointers={**pointers, "S_ptr": "fp32", "U_ptr": "fp32", "kept_ptr": narrow},
                floats=("logit_scale", "softcap"),
                flags=("has_entropy", "has_kept"),
                constexprs={"MAX_EXPONENT": MAX_EXPONENT, **flags, "BLOCK_C": block},
                num_warps=warps_for(block),
            )
        for optional in (None, "fp32"):
            yield specimen_of(
                f"coefficient_tile {name}{'' if optional is None else ', entropy'}",
                _coefficient_tile_kernel,
                pointers={**pointers, "constant_ptr": optional, "at_entropy_ptr": optional, "out_ptr": narrow},
                floats=("logit_scale", "softcap"),
                constexprs={**flags, "HAS_ENTROPY": optional is not None, "BLOCK_C": BLOCK},
                num_warps=warps_for(BLOCK),
            )
