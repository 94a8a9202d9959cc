"""How the [N, V] plane is cut so that its pieces stay in cache and the workspace within its bound.

Blocks of rows are the outer loop, tiles of columns (vocabulary) the middle one, tiles of rows the inner one. So a
weight tile is converted once per block, and its gradient is finished before the next tile is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# no tile is cut below this side, which bounds the smallest workspace
MIN_SIDE = 64

# rows and columns of a tile: 2 MB of fp32 fit a CPU's cache, 32 MB an accelerator's
CPU_TILE = (512, 1024)
DEVICE_TILE = (2048, 4096)

# rows whose exponentials a CPU keeps at once: more save nothing there, since tiles live in cache anyway
CPU_BLOCK = 1024

# rows of a block on an accelerator are a multiple of a matrix tile's
DEVICE_ROWS = 128


@dataclass(frozen=True)
class Plan:
    """One call's cut of the [N, V] plane.

    Attributes:
        N: Rows.
        V: Columns.
        block: Rows whose gradient sums, and exponentials if kept, are alive at once.
        rows: Rows of a tile.
        columns: Columns of a tile.
        keep: Whether a block's exponentials are kept from its logits to its gradients.
        is_striped: Whether each kept tile is contiguous; else each kept row is.
        sums_weight: Whether a weight's gradient of several blocks is added up block by block, in a buffer of the wide
            dtype if its own is narrower; else it takes a sweep of its own.
    """

    N: int
    V: int
    block: int
    rows: int
    columns: int
    keep: bool
    is_striped: bool
    sums_weight: bool

    @property
    def num_vocab_tiles(self) -> int:
        """Tiles along the vocabulary."""
        return -(-self.V // self.columns)

    @property
    def kept_width(self) -> int:
        """Elements of a kept row: a multiple of 128 bytes of bf16 where kernels and matrix products read whole rows."""
        return self.V if self.is_striped else -(-self.V // MIN_SIDE) * MIN_SIDE

    def blocks(self, within: slice | None = None) -> Iterator[slice]:
        """Slices of the N rows, or of a part of them."""
        within = within or slice(0, self.N)
        return _slices(within.start, within.stop, self.block)

    def vocab_tiles(self) -> Iterator[slice]:
        """Slices of the V columns."""
        return _slices(0, self.V, self.columns)

    def row_tiles(self, block: slice) -> Iterator[slice]:
        """Slices of a block's rows, in the numbering of all N."""
        return _slices(block.start, block.stop, self.rows)

    def groups(self, lengths: Sequence[int] | None) -> Iterator[slice]:
        """Rows whose loss is computed together: blocks, or as many whole sequences as fit one, or one that does not."""
        if lengths is None:
            yield from self.blocks()
            return
        start = stop = 0
        for length in lengths:
            if stop > start and stop + length - start > self.block:
                yield slice(start, stop)
                start = stop
            stop += length
        if stop > start:
            yield slice(start, stop)


def within(outer: slice, rows: slice) -> slice:
    """The same rows in the numbering of the slice that holds them."""
    return slice(rows.start - outer.start, rows.stop - outer.start)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


@dataclass(frozen=True)
class Kept:
    """The exponentials of one block, and what each tile of them is relative to.

    Attributes:
        plan: The call's.
        values: [block * width] in the narrow dtype.
        offsets: [vocabulary tiles, block], the rows' offsets when the tile was written.
    """

    plan: Plan
    values: Tensor
    offsets: Tensor

    @staticmethod
    def empty(plan: Plan, *, dtype: torch.dtype, wide: torch.dtype, device: torch.device) -> Kept:
        """Room for one block."""
        values = torch.empty(plan.block * plan.kept_width, dtype=dtype, device=device)
        return Kept(plan, values, torch.empty(plan.num_vocab_tiles, plan.block, dtype=wide, device=device))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The [rows, columns] view; rows in the numbering of the block."""
        plan = self.plan
        if not plan.is_striped:
            return self.values.view(plan.block, plan.kept_width)[rows, columns]
        stripe = self.values[columns.start * plan.block : columns.stop * plan.block]
        return stripe.view(plan.block, columns.stop - columns.start)[rows]


def narrow_dtype(operand: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of kept exponentials and gradient products: the operands', but for fp16, which lacks the range.

    Accelerators multiply fp16's values as bf16; a CPU, which gains nothing from that, as fp32.
    """
    if operand != torch.float16:
        return operand
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a plan is made for.

    Attributes:
        operand: The dtype products are taken in.
        device: Where.
        keeps: "none" of the exponentials, "all" of them if they fit the workspace, or those of a "block" at a time.
        keeps_wide: Whether they are kept in the wide dtype, so that their logarithms are good exponents.
        casts_weight: Whether tiles of the weight are copied to be rounded to the dtype of products or of gradients.
        rounds_weight_grad: Whether the weight's gradient is wanted in a dtype narrower than its sums.
        uses_kernels: Whether Triton kernels make the tiles; they read whole rows of what is kept.
        workspace: Bytes.
    """

    operand: torch.dtype
    device: torch.device
    keeps: str
    keeps_wide: bool = False
    casts_weight: bool
    rounds_weight_grad: bool
    uses_kernels: bool
    workspace: int


def make_plan(N: int, D: int, V: int, request: Request) -> Plan:
    """Cut tiles to a quarter of the workspace, then blocks to what is left of it.

    The byte counts are those of kernels/README.md, "Memory".
    """
    is_cpu = request.device.type == "cpu"
    rows, columns = CPU_TILE if is_cpu else DEVICE_TILE
    columns = min(columns, V)
    wide = 8 if request.operand == torch.float64 else 4
    narrow = narrow_dtype(request.operand, request.device).itemsize

    def tile_bytes() -> int:
        if is_cpu:
            return (3 * wide + narrow) * (rows * columns + columns * D + rows * D)
        weight = narrow * request.casts_weight + wide * request.rounds_weight_grad
        return (
            wide + narrow * (request.keeps != "block" or request.keeps_wide)
        ) * rows * columns + weight * columns * D

    while tile_bytes() > request.workspace // 4 and max(rows, columns) > MIN_SIDE:
        if columns >= rows:
            columns = max(columns // 2, MIN_SIDE)
        else:
            rows = max(rows // 2, MIN_SIDE)
    # only then, so that the columns, and with them the order of a row's sums, do not depend on N
    rows = max(min(rows, N), 1)
    row_bytes = (wide + 2 * narrow) * D
    kept_bytes = (wide if request.keeps_wide else narrow) * V + wide * -(-V // columns)
    left = max(request.workspace - tile_bytes(), 0)
    keep = request.keeps == "block" or (request.keeps == "all" and N * (row_bytes + kept_bytes) <= left)

    def fit(budget: int) -> int:
        block = budget // (row_bytes + (kept_bytes if keep else 0))
        if request.keeps == "block" and is_cpu:
            block = min(block, CPU_BLOCK)
        step = rows if block >= rows else MIN_SIDE if is_cpu else DEVICE_ROWS
        return min(max(block // step * step, min(rows, MIN_SIDE)), max(N, 1))

    block, sums_weight = fit(left), True
    if block < N and request.rounds_weight_grad:
        buffer_bytes = wide * V * D
        sums_weight = buffer_bytes <= left // 2
        block = fit(left - buffer_bytes) if sums_weight else block
    return Plan(
        N=N,
        V=V,
        block=block,
        rows=min(rows, block),
        columns=columns,
        keep=keep,
        is_striped=is_cpu and not request.uses_kernels,
        sums_weight=sums_weight,
    )
