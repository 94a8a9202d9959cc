# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Passes over the exponentials kept from forward to backward; in place, and only where something has to change.

Shapes: R rows, V vocabulary, T tiles along it.
Source: kernels/README.md, "The anchored softmax".
Spec: `Slopes` in `grpo_kernels.head`.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.specimen import Specimen, specimen_of
from grpo_kernels.tile_kernels import BLOCK, block_for, check_rows, warps_for


@triton.jit
def _entropy_coefficients_kernel(
    # updated: [R, V] bf16 or fp32
    kept_ptr,
    # [R] fp32 each
    constant_ptr,
    at_entropy_ptr,
    kept_stride,
    V,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = columns < V
    ptrs = kept_ptr + row * kept_stride + columns
    e = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    # 0 is a target, or an exponential that underflowed
    exponents = tl.where(e == 0, 0.0, tl.log(e))
    coefficients = e * (tl.load(constant_ptr + row) + tl.load(at_entropy_ptr + row) * exponents)
    tl.store(ptrs, coefficients.to(kept_ptr.dtype.element_ty), mask=mask)


def entropy_coefficients_(
    kept_RV: Tensor,
    *,
    constant_R: Tensor,
    at_entropy_R: Tensor,
    block: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Turn kept exponentials into coefficients in place: `e (constant + at_entropy ln e)`, 0 stays 0.

    Reads and writes each element once. A row's exponentials must share one offset, and hold no soft cap's slope.
    """
    R, V = kept_RV.shape
    assert kept_RV.stride(1) == 1 or V == 1
    check_rows(R, constant_R, at_entropy_R)
    if R == 0:
        return
    block = block or block_for(V)
    _entropy_coefficients_kernel[(R, triton.cdiv(V, block))](
        kept_RV,
        constant_R,
        at_entropy_R,
        kept_RV.stride(0),
        V,
        BLOCK_V=block,
        num_warps=num_warps or warps_for(block),
    )


@triton.jit
def _rescale_kernel(
    # updated: [R, V] bf16 or fp32
    kept_ptr,
    # [T, R] fp32; [R] fp32
    offsets_ptr,
    offset_ptr,
    kept_stride,
    offsets_stride,
    V,
    T,
    tile_columns,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offset = tl.load(offset_ptr + row)
    tiles = tl.arange(0, BLOCK_T)
    offsets = tl.load(offsets_ptr + tl.cast(tiles, tl.int64) * offsets_stride + row, mask=tiles < T, other=0.0)
    has_moved = (tiles < T) & (offsets != offset)
    if tl.max(has_moved.to(tl.int32), 0) == 0:
        return
    for tile in range(T):
        drift = tl.load(offsets_ptr + tl.cast(tile, tl.int64) * offsets_stride + row) - offset
        # the offset only rises, so the drift is never above 0; a NaN differs from 0 and is passed on
        if drift != 0:
            start = tile * tile_columns
            stop = tl.minimum(start + tile_columns, V)
            for block_start in range(start, stop, BLOCK_V):
                columns = block_start + tl.arange(0, BLOCK_V)
                mask = columns < stop
                ptrs = kept_ptr + row * kept_stride + columns
                e = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
                tl.store(ptrs, (e * tl.exp(drift)).to(kept_ptr.dtype.element_ty), mask=mask)


def rescale_(
    kept_RV: Tensor,
    *,
    offsets_TR: Tensor,
    offset_R: Tensor,
    columns: int,
    block: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Bring the kept exponentials of every tile to the row's final offset, in place.

    Tile `t` holds columns `t * columns` and following, relative to `offsets_TR[t]`. A row whose offset never moved
    costs T reads and touches nothing else; of one that moved, only the tiles before the move are read and written.
    """
    R, V = kept_RV.shape
    T = offsets_TR.shape[0]
    assert triton.cdiv(V, columns) == T, (V, columns, T)
    assert kept_RV.stride(1) == 1 or V == 1
    assert offsets_TR.shape == (T, R)
    assert offsets_TR.stride(1) == 1 or R == 1
    check_rows(R, offset_R)
    if R == 0:
        return
    block = block or block_for(columns)
    _rescale_kernel[(R,)](
        kept_RV,
        offsets_TR,
        offset_R,
        kept_RV.stride(0),
        offsets_TR.stride(0),
        V,
        T,
        columns,
        BLOCK_T=triton.next_power_of_2(T),
        BLOCK_V=block,
        num_warps=num_warps or warps_for(block),
    )


def specimens() -> Iterator[Specimen]:
    """What the offline compiler builds of this file."""
    for dtype in ("bf16", "fp32"):
        yield specimen_of(
            f"entropy_coefficients {dtype}",
            _entropy_coefficients_kernel,
            pointers={"kept_ptr": dtype, "constant_ptr": "fp32", "at_entropy_ptr": "fp32"},
            constexprs={"BLOCK_V": BLOCK},
            num_warps=warps_for(BLOCK),
        )
        yield specimen_of(
            f"rescale {dtype}",
            _rescale_kernel,
            pointers={"kept_ptr": dtype, "offsets_ptr": "fp32", "offset_ptr": "fp32"},
            constexprs={"BLOCK_T": 64, "BLOCK_V": BLOCK},
            num_warps=warps_for(BLOCK),
        )
