# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""One matrix product whose epilogue turns products into exponentials and their sums, without storing the products.

Shapes: R rows, C columns of a tile of the [N, V] plane, D hidden width, T programs' tiles along the columns.
Source: kernels/README.md, "The anchored softmax".
Spec: `RowSums.add_tile` in `grpo_kernels.head`.

Every program's tile has its own offset per row. `_merge_kernel` folds the tiles in their order, so runs are bitwise
equal; a row's sums do not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo_kernels.head import MAX_EXPONENT
from grpo_kernels.kept_kernels import rescale_
from grpo_kernels.launch import FUSED, RIVALS, FusedTile, FusedTiles
from grpo_kernels.specimen import Specimen, specimen_of
from grpo_kernels.tile_kernels import cap_slope, capped, check_rows

# one row a thread at Triton's default of 4 warps, which reads lines of 128 bytes
MERGE_ROWS = 128

# programs that walk over the tiles in the interpreter: more than one, so that the walk is tested
INTERPRETED_PROGRAMS = 2


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    # GROUP row tiles are swept over the columns together: their weight tile comes from L2 all but the first time
    group = tile // (GROUP * column_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile - first * column_tiles
    return first + within % height, within // height


@triton.jit
def _products(
    hidden, weight, row_tile, column_tile, R, C, D,
    HAS_DESCRIPTORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # fp32 sums of exact products
    products = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if HAS_DESCRIPTORS:
        # what lies outside the tensors is read as 0
        for d in tl.range(0, D, BLOCK_D):
            h = hidden.load([row_tile * BLOCK_R, d])
            w = weight.load([column_tile * BLOCK_C, d])
            products = tl.dot(h, w.T, products, input_precision="ieee")
    else:
        rows = row_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        columns = column_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        offs_d = tl.arange(0, BLOCK_D)
        hidden_ptrs = hidden + rows[:, None] * D + offs_d[None, :]
        weight_ptrs = weight + columns[:, None] * D + offs_d[None, :]
        for d in tl.range(0, D, BLOCK_D):
            d_mask = offs_d < D - d
            h = tl.load(hidden_ptrs + d, mask=(rows < R)[:, None] & d_mask[None, :], other=0.0)
            w = tl.load(weight_ptrs + d, mask=(columns < C)[:, None] & d_mask[None, :], other=0.0)
            products = tl.dot(h, w.T, products, input_precision="ieee")
    return products


@triton.jit
def _exp_tile(
    hidden, weight, kept, bias_ptr, targets_ptr, inv_temperature_ptr, offset_ptr,
    tile_offset_ptr, tile_S_ptr, tile_U_ptr, row_tile, column_tile,
    R, C, D, kept_stride, column_start, logit_scale, softcap,
    MAX_EXPONENT: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, STORE_E: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x = _products(hidden, weight, row_tile, column_tile, R, C, D, HAS_DESCRIPTORS, BLOCK_R, BLOCK_C, BLOCK_D)
    rows = row_tile.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < R
    first_column = column_tile * BLOCK_C
    local = tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_column + local, mask=local < C - first_column, other=0.0)
        x += bias.to(tl.float32)[None, :]
    x *= logit_scale
    if HAS_SOFTCAP:
        x = capped(x, softcap)
    inv_temperature = tl.load(inv_temperature_ptr + rows, mask=row_mask, other=1.0)
    logits = x * inv_temperature[:, None]

    target = tl.load(targets_ptr + rows, mask=row_mask, other=-1) - column_start - first_column
    target = tl.where((target >= 0) & (target < BLOCK_C), target, -1).to(tl.int32)
    # most tiles hold no target and reach no border; without the branch, column numbers fill the registers
    if (tl.max(target, 0) >= 0) | (first_column + BLOCK_C > C):
        is_rival = (local < C - first_column)[None, :] & (local[None, :] != target[:, None])
        logits = tl.where(is_rival, logits, -float("inf"))

    before = tl.load(offset_ptr + rows, mask=row_mask, other=0.0)
    peak = tl.max(logits, 1)
    offset = tl.where(peak > before + MAX_EXPONENT, peak, before)
    # exponents are at most MAX_EXPONENT
    exponents = logits - offset[:, None]
    e = tl.exp(exponents)
    partial = column_tile.to(tl.int64) * R + rows
    tl.store(tile_offset_ptr + partial, offset, mask=row_mask)
    tl.store(tile_S_ptr + partial, tl.sum(e, 1), mask=row_mask)
    if HAS_ENTROPY:
        # an exponential of 0 may have an infinite exponent
        tl.store(tile_U_ptr + partial, tl.sum(tl.where(e == 0, 0.0, e * exponents), 1), mask=row_mask)
    if STORE_E:
        if HAS_SOFTCAP:
            e = tl.where(e == 0, 0.0, e * cap_slope(logits, (softcap * inv_temperature)[:, None]))
        if HAS_DESCRIPTORS:
            kept.store([row_tile * BLOCK_R, first_column], e.to(kept.dtype))
        else:
            kept_ptrs = kept + rows[:, None] * kept_stride + (first_column + local)[None, :]
            kept_mask = row_mask[:, None] & (local < C - first_column)[None, :]
            tl.store(kept_ptrs, e.to(kept.dtype.element_ty), mask=kept_mask)


@triton.jit
def _fused_exp_kernel(
    # descriptors or pointers: [R, D]; [C, D]; [R, C] output
    hidden,
    weight,
    kept,
    # [C]; [R] int64; [R] fp32; [R] fp32
    bias_ptr,
    targets_ptr,
    inv_temperature_ptr,
    offset_ptr,
    # outputs, [T, R] fp32
    tile_offset_ptr,
    tile_S_ptr,
    tile_U_ptr,
    R,
    C,
    D,
    kept_stride,
    column_start,
    logit_scale,
    softcap,
    MAX_EXPONENT: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    STORE_E: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles = tl.cdiv(R, BLOCK_R)
    column_tiles = tl.cdiv(C, BLOCK_C)
    # fmt: off
    if IS_PERSISTENT:
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
            row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
            _exp_tile(
                hidden, weight, kept, bias_ptr, targets_ptr, inv_temperature_ptr, offset_ptr,
                tile_offset_ptr, tile_S_ptr, tile_U_ptr, row_tile, column_tile,
                R, C, D, kept_stride, column_start, logit_scale, softcap,
                MAX_EXPONENT, HAS_DESCRIPTORS, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, STORE_E, BLOCK_R, BLOCK_C, BLOCK_D,
            )
    else:
        row_tile, column_tile = _place(tl.program_id(0), row_tiles, column_tiles, GROUP)
        _exp_tile(
            hidden, weight, kept, bias_ptr, targets_ptr, inv_temperature_ptr, offset_ptr,
            tile_offset_ptr, tile_S_ptr, tile_U_ptr, row_tile, column_tile,
            R, C, D, kept_stride, column_start, logit_scale, softcap,
            MAX_EXPONENT, HAS_DESCRIPTORS, HAS_BIAS, HAS_SOFTCAP, HAS_ENTROPY, STORE_E, BLOCK_R, BLOCK_C, BLOCK_D,
        )
    # fmt: on


@triton.jit
def _merge_kernel(
    # [T, R] fp32
    tile_offset_ptr,
    tile_S_ptr,
    tile_U_ptr,
    # updated: [R] fp32
    offset_ptr,
    S_ptr,
    U_ptr,
    R,
    T,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = rows < R
    before = tl.load(offset_ptr + rows, mask=mask, other=0.0)
    offset = before
    for tile in range(T):
        offset = tl.maximum(offset, tl.load(tile_offset_ptr + tl.cast(tile, tl.int64) * R + rows, mask=mask, other=0.0))
    # sums relative to an offset `drift` above the final one; the final one is the largest, so drifts are at most 0
    drift = before - offset
    shrink = tl.exp(drift)
    S = tl.load(S_ptr + rows, mask=mask, other=0.0)
    if HAS_ENTROPY:
        U = (tl.load(U_ptr + rows, mask=mask, other=0.0) + drift * S) * shrink
    S *= shrink
    for tile in range(T):
        partial = tl.cast(tile, tl.int64) * R + rows
        drift = tl.load(tile_offset_ptr + partial, mask=mask, other=0.0) - offset
        shrink = tl.exp(drift)
        tile_S = tl.load(tile_S_ptr + partial, mask=mask, other=0.0)
        S += tile_S * shrink
        if HAS_ENTROPY:
            U += (tl.load(tile_U_ptr + partial, mask=mask, other=0.0) + drift * tile_S) * shrink
    tl.store(offset_ptr + rows, offset, mask=mask)
    tl.store(S_ptr + rows, S, mask=mask)
    if HAS_ENTROPY:
        tl.store(U_ptr + rows, U, mask=mask)


def fused_exp_tile_(
    hidden_RD: Tensor,
    weight_CD: Tensor,
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
    config: FusedTiles,
) -> None:
    """Multiply, add the columns to the sums of their rows, and keep the exponentials: `exp_tile_` without products.

    Args:
        hidden_RD: [R, D] contiguous, bf16 or fp16; fp32 in the interpreter only.
        weight_CD: [C, D] like `hidden_RD`.
        bias_C: [C] float, already rounded to the operand dtype.
        targets_R: [R] int64 in the numbering of the vocabulary.
        column_start: The first column in that numbering.
        inv_temperature_R: [R] fp32.
        logit_scale: Multiplies the products first.
        softcap: Bounds the logits before the temperature.
        offset_R: [R] fp32, updated.
        S_R: [R] fp32, updated.
        U_R: [R] fp32, updated; None without an entropy.
        kept_RC: [R, C] fp32 or bf16, written as by `exp_tile_`. Rows may be strided; where base and stride are not
            multiples of 16 bytes, descriptors give way to pointers, for the operands too.
        config: The blocks of the architecture.
    """
    (R, D), C = hidden_RD.shape, weight_CD.shape[0]
    assert hidden_RD.is_contiguous()
    assert weight_CD.is_contiguous()
    assert hidden_RD.dtype == weight_CD.dtype
    # fp32 has no matrix instruction that is exact, and its blocks would not fit shared memory
    assert hidden_RD.dtype.itemsize == 2 or not hidden_RD.is_cuda, hidden_RD.dtype
    assert kept_RC is None or (kept_RC.shape == (R, C) and (kept_RC.stride(1) == 1 or C == 1))
    assert bias_C is None or (bias_C.shape == (C,) and bias_C.is_contiguous())
    check_rows(R, targets_R, inv_temperature_R, offset_R, S_R, U_R)
    if R == 0:
        return
    blocks = config.plain if softcap is None else config.capped
    row_tiles, T = triton.cdiv(R, blocks.rows), triton.cdiv(C, blocks.columns)
    partials = torch.empty((2 if U_R is None else 3, T, R), dtype=torch.float32, device=hidden_RD.device)
    tile_offset, tile_S, tile_U = partials[0], partials[1], None if U_R is None else partials[2]
    tensors = (hidden_RD, weight_CD, kept_RC)
    has_descriptors = blocks.has_descriptors and all(t is None or _fits_descriptor(t) for t in tensors)
    _fused_exp_kernel[(_num_programs(blocks, row_tiles * T, hidden_RD.device),)](
        *(_operands(blocks, *tensors) if has_descriptors else tensors),
        bias_C,
        targets_R,
        inv_temperature_R,
        offset_R,
        tile_offset,
        tile_S,
        tile_U,
        R,
        C,
        D,
        0 if kept_RC is None else kept_RC.stride(0),
        column_start,
        logit_scale,
        1.0 if softcap is None else softcap,
        HAS_DESCRIPTORS=has_descriptors,
        HAS_BIAS=bias_C is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_ENTROPY=U_R is not None,
        STORE_E=kept_RC is not None,
        **_blocks(blocks),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    _merge_kernel[(triton.cdiv(R, MERGE_ROWS),)](
        tile_offset, tile_S, tile_U, offset_R, S_R, U_R, R, T, HAS_ENTROPY=U_R is not None, BLOCK_R=MERGE_ROWS
    )
    if kept_RC is not None:
        rescale_(kept_RC, offsets_TR=tile_offset, offset_R=offset_R, columns=blocks.columns)


def _fits_descriptor(tensor: Tensor) -> bool:
    """The copy engine wants base and row stride in multiples of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0 and tensor.stride(1) == 1


def _operands(blocks: FusedTile, hidden: Tensor, weight: Tensor, kept: Tensor | None) -> tuple[Any, Any, Any]:
    return (
        TensorDescriptor.from_tensor(hidden, [blocks.rows, blocks.depth]),
        TensorDescriptor.from_tensor(weight, [blocks.columns, blocks.depth]),
        None if kept is None else TensorDescriptor.from_tensor(kept, [blocks.rows, blocks.columns]),
    )


def _num_programs(blocks: FusedTile, tiles: int, device: torch.device) -> int:
    if not blocks.is_persistent:
        return tiles
    if device.type != "cuda":
        return min(tiles, INTERPRETED_PROGRAMS)
    return min(tiles, torch.cuda.get_device_properties(device).multi_processor_count)


def _blocks(blocks: FusedTile) -> dict[str, Any]:
    return {
        "MAX_EXPONENT": MAX_EXPONENT,
        "IS_PERSISTENT": blocks.is_persistent,
        "BLOCK_R": blocks.rows,
        "BLOCK_C": blocks.columns,
        "BLOCK_D": blocks.depth,
        "GROUP": blocks.group,
    }


def _specimen(arch: int, blocks: FusedTile, operand: str, flags: dict[str, bool], *, chosen: bool = True) -> Specimen:
    pointers: dict[str, str | None] = {
        "hidden": operand,
        "weight": operand,
        "kept": "bf16" if flags["STORE_E"] else None,
        "bias_ptr": operand if flags["HAS_BIAS"] else None,
        "targets_ptr": "i64",
        "tile_U_ptr": "fp32" if flags["HAS_ENTROPY"] else None,
    }
    vectors = ("inv_temperature_ptr", "offset_ptr", "tile_offset_ptr", "tile_S_ptr")
    words = [operand, *(name for name, is_on in flags.items() if is_on), *["persistent"] * blocks.is_persistent]
    size = f"{blocks.rows}x{blocks.columns}x{blocks.depth} w{blocks.num_warps} s{blocks.num_stages}"
    specimen = specimen_of(
        f"fused {size} sm_{arch} {' '.join(words)}",
        _fused_exp_kernel,
        pointers={**pointers, **dict.fromkeys(vectors, "fp32")},
        floats=("logit_scale", "softcap"),
        constexprs={**_blocks(blocks), **flags, "HAS_DESCRIPTORS": blocks.has_descriptors},
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    specimen = dataclasses.replace(specimen, uses_mma=True, chosen=chosen, archs=(arch,))
    if not blocks.has_descriptors:
        return specimen
    R, C, D = blocks.rows, blocks.columns, blocks.depth
    sides = {"hidden": [R, D], "weight": [C, D], "kept": [R, C]}
    descriptors = {name: f"tensordesc<{pointers[name]}{side}>" for name, side in sides.items() if pointers[name]}
    aligned = tuple(name for name in specimen.aligned if name not in sides)
    return dataclasses.replace(specimen, signature={**specimen.signature, **descriptors}, aligned=aligned)


def specimens() -> Iterator[Specimen]:
    """What the offline compiler builds of this file."""
    for has_entropy in (False, True):
        vectors = ("tile_offset_ptr", "tile_S_ptr", "offset_ptr", "S_ptr")
        entropy = dict.fromkeys(("tile_U_ptr", "U_ptr"), "fp32" if has_entropy else None)
        yield specimen_of(
            f"merge{', entropy' * has_entropy}",
            _merge_kernel,
            pointers={**dict.fromkeys(vectors, "fp32"), **entropy},
            constexprs={"HAS_ENTROPY": has_entropy, "BLOCK_R": MERGE_ROWS},
            num_warps=4,
        )
    for arch, tiles in FUSED.items():
        for keeps, has_bias, has_entropy in itertools.product((False, True), repeat=3):
            flags = {"STORE_E": keeps, "HAS_BIAS": has_bias, "HAS_ENTROPY": has_entropy}
            # a dtype changes the matrix instruction and nothing else
            for operand in ("bf16", "fp16") if has_bias == has_entropy else ("bf16",):
                yield _specimen(arch, tiles.plain, operand, {**flags, "HAS_SOFTCAP": False})
                yield _specimen(arch, tiles.capped, operand, {**flags, "HAS_SOFTCAP": True})
        for blocks, keeps in itertools.product(RIVALS[arch], (False, True)):
            flags = {"STORE_E": keeps, "HAS_BIAS": False, "HAS_ENTROPY": False, "HAS_SOFTCAP": False}
            yield _specimen(arch, blocks, "bf16", flags, chosen=False)
