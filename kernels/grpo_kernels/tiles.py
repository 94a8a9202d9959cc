"""How the [N, V] plane is cut so that its pieces stay in cache and the workspace within its bound.

Blocks of rows are the outer loop, tiles of columns (vocabulary) the middle one, tiles of rows the inner one. So a
weight tile is converted once per block, and its gradient is finished before the next tile is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# no tile is cut below this side, which bounds the smallest workspace
MIN_SIDE = 64

# rows and columns of a tile: 2 MB of fp32 fit a CPU's cache, 32 MB an accelerator's
CPU_TILE = (512, 1024)
DEVICE_TILE = (2048, 4096)


@dataclass(frozen=True)
class Plan:
    """One call's cut of the [N, V] plane.

    Attributes:
        N: Rows.
        V: Columns.
        block: Rows whose gradient sums are alive at once.
        rows: Rows of a tile.
        columns: Columns of a tile.
        keep: Whether the forward keeps its N * V exponentials for the backward; then there is one block.
    """

    N: int
    V: int
    block: int
    rows: int
    columns: int
    keep: bool

    @property
    def num_vocab_tiles(self) -> int:
        """Tiles along the vocabulary."""
        return -(-self.V // self.columns)

    def blocks(self) -> Iterator[slice]:
        """Slices of the N rows."""
        return _slices(0, self.N, self.block)

    def vocab_tiles(self) -> Iterator[slice]:
        """Slices of the V columns."""
        return _slices(0, self.V, self.columns)

    def row_tiles(self, block: slice) -> Iterator[slice]:
        """Slices of a block's rows, in the numbering of all N."""
        return _slices(block.start, block.stop, self.rows)

    def within(self, block: slice, rows: slice) -> slice:
        """The same rows in the numbering of their block."""
        return slice(rows.start - block.start, rows.stop - block.start)

    def kept_tile(self, kept: Tensor, rows: slice, columns: slice) -> Tensor:
        """The [rows, columns] view of the flat buffer of exponentials, in which every tile is contiguous."""
        stripe = kept[columns.start * self.N : columns.stop * self.N]
        return stripe.view(self.N, columns.stop - columns.start)[rows]


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def narrow_dtype(operand: torch.dtype) -> torch.dtype:
    """The dtype of kept exponentials and gradient products: the operands', but fp32 for fp16, which lacks the range."""
    return torch.float32 if operand == torch.float16 else operand


def make_plan(
    N: int, D: int, V: int, *, operand: torch.dtype, device: torch.device, may_keep: bool, workspace: int
) -> Plan:
    """Cut tiles to a quarter of `workspace` bytes, then blocks, then see whether the exponentials fit beside them.

    The byte counts are those of kernels/README.md, "Memory".
    """
    rows, columns = CPU_TILE if device.type == "cpu" else DEVICE_TILE
    columns = min(columns, V)
    wide = 8 if operand == torch.float64 else 4
    narrow = narrow_dtype(operand).itemsize

    def tile_bytes() -> int:
        return (3 * wide + narrow) * (rows * columns + columns * D + rows * D)

    while tile_bytes() > workspace // 4 and max(rows, columns) > MIN_SIDE:
        if columns >= rows:
            columns = max(columns // 2, MIN_SIDE)
        else:
            rows = max(rows // 2, MIN_SIDE)
    # only then, so that the columns, and with them the order of a row's sums, do not depend on N
    rows = max(min(rows, N), 1)
    row_bytes = 2 * (wide + narrow) * D
    left = max(workspace - tile_bytes(), 0)
    block = max(left // row_bytes // rows * rows, rows)
    kept_bytes = N * (narrow * V + wide * -(-V // columns))
    keep = may_keep and N * row_bytes + kept_bytes <= left
    return Plan(N=N, V=V, block=min(block, max(N, 1)), rows=rows, columns=columns, keep=keep)
