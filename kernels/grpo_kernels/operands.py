"""One call's operands, tile by tile: what is multiplied, and what torch makes of the products.

Shapes: N rows, D hidden width, V vocabulary; a block is some of the rows, and within it rows count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.gemm import mm_wide, widen
from grpo_kernels.head import Head, RowSums, Slopes, put_targets_
from grpo_kernels.tiles import Kept, Plan, narrow_dtype


@dataclass(frozen=True)
class Block:
    """Some rows of a call: [block, D] hidden states in the operand dtype, their targets, head and sums."""

    rows: slice
    hidden: Tensor
    targets: Tensor
    head: Head
    sums: RowSums

    @property
    def size(self) -> int:
        """Rows."""
        return self.hidden.shape[0]


class Operands:
    """Hidden states, weight and bias, rounded to the operand dtype one piece at a time; tiles are torch's."""

    def __init__(self, head: Head, plan: Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.head, self.plan = head, plan
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.narrow = narrow_dtype(head.operand, hidden.device)
        self.products_buffer = self._tile_buffer(head.wide)
        self._exps_buffer: Tensor | None = None

    def _tile_buffer(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.plan.rows * self.plan.columns, dtype=dtype, device=self.hidden.device)

    def block(self, rows: slice, targets: Tensor, sums: RowSums) -> Block:
        """The block of these rows of all N, from the targets and sums of all N."""
        hidden = self.hidden[rows].to(self.head.operand).contiguous()
        return Block(rows=rows, hidden=hidden, targets=targets[rows], head=self.head.at(rows), sums=sums.at(rows))

    def all_rows(self, targets: Tensor, sums: RowSums) -> Block:
        """All N rows as one block whose hidden states are not rounded: tiles of it are blocks of their own."""
        return Block(rows=slice(0, self.plan.N), hidden=self.hidden, targets=targets, head=self.head, sums=sums)

    def weight_tile(self, columns: slice) -> Tensor:
        """[columns, D] rows of the weight in the operand dtype."""
        return self.weight[columns].to(self.head.operand)

    def target_rows(self, targets: Tensor) -> Tensor:
        """[rows, D] the targets' rows of the weight in the operand dtype."""
        return self.weight[targets].to(self.head.operand)

    def anchors(self, targets: Tensor) -> Tensor:
        """[N] the targets' logits."""
        wide = self.head.wide
        anchors = torch.empty(self.plan.N, dtype=wide, device=targets.device)
        for rows in self.plan.row_tiles(slice(0, self.plan.N)):
            hidden = self.hidden[rows].to(self.head.operand).to(wide)
            products = hidden.mul(self.target_rows(targets[rows])).sum(1)
            anchors[rows] = self.head.at(rows).logits_(products, self._bias(targets[rows]))
        return anchors

    def fold(self, block: Block, rows: slice, columns: slice, wide_tile: Tensor, out: Tensor | None) -> None:
        """Add a tile to its rows' sums; with `out` [rows, columns] also write its coefficients, 0 at the targets.

        The coefficients are the exponentials relative to the rows' offsets after the tile, times the soft cap's slope.
        """
        sums, head = block.sums.at(rows), block.head.at(rows)
        logits = self._logits(block, rows, columns, wide_tile)
        cap_slope = None if out is None or head.softcap is None else head.cap_slope(logits)
        if self._exps_buffer is None:
            self._exps_buffer = self._tile_buffer(head.wide)
        exps = self._exps_buffer[: logits.numel()].view_as(logits)
        sums.add_tile(logits, exps, columns, block.targets[rows])
        if out is not None:
            out.copy_(exps if cap_slope is None else exps.mul_(cap_slope))

    def coefficients(self, block: Block, rows: slice, columns: slice, wide_tile: Tensor, slopes: Slopes) -> Tensor:
        """[rows, columns] coefficients computed once more from the logits, 0 at the targets, in the narrow dtype."""
        logits = self._logits(block, rows, columns, wide_tile)
        values = slopes.at(rows).coefficients_(block.head.at(rows), logits, block.sums.offset[rows])
        put_targets_(values, block.targets[rows], columns, 0.0)
        return values.to(self.narrow)

    def kept_coefficients(self, kept: Kept, block: Block, slopes: Slopes) -> KeptCoefficients:
        """What the block's kept exponentials make of its slopes, tile by tile."""
        return KeptCoefficients(kept, block, slopes, dtype=self.narrow)

    def scaled(self, block: Block, rows: slice, slopes: Slopes) -> Tensor:
        """[rows, D] hidden states times the rows' scale, in the narrow dtype."""
        return (block.hidden[rows] * slopes.scale[rows, None]).to(self.narrow)

    def finish_hidden(self, total: Tensor, block: Block, slopes: Slopes, out: Tensor) -> None:
        """From a block's sum of products to its hidden gradient: the targets' terms, the scale, `out`'s dtype."""
        for rows in self.plan.row_tiles(slice(0, block.size)):
            chosen = self.target_rows(block.targets[rows])
            total[rows] += slopes.at_target[rows, None] * chosen
        out.copy_(total.mul_(slopes.scale[:, None]))

    def _logits(self, block: Block, rows: slice, columns: slice, wide_tile: Tensor) -> Tensor:
        return block.head.at(rows).logits_(self.products(block.hidden[rows], wide_tile), self._bias(columns))

    def products(self, hidden: Tensor, wide_tile: Tensor) -> Tensor:
        """[rows, columns] products in the wide dtype; the next call overwrites them."""
        shape = hidden.shape[0], wide_tile.shape[0]
        out = self.products_buffer[: shape[0] * shape[1]].view(shape)
        return mm_wide(widen(hidden), wide_tile.t(), out=out, operand=self.head.operand)

    def _bias(self, columns: slice | Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias[columns].to(self.head.operand).to(self.head.wide)


class KeptCoefficients:
    """Tiles of coefficients made of kept exponentials, which stay as they are."""

    def __init__(self, kept: Kept, block: Block, slopes: Slopes, *, dtype: torch.dtype) -> None:
        self.kept, self.slopes, self.dtype = kept, slopes, dtype
        drift = kept.offsets[:, : block.size] - block.sums.offset
        # offsets move only where a rival is e**30 times likelier than the target; to look waits for a device
        is_moved = drift.device.type != "cpu" or bool((drift != 0).any())
        self.drift = drift if is_moved else None

    def tile(self, rows: slice, columns: slice, tile: int) -> Tensor:
        """[rows, columns] coefficients in the narrow dtype, 0 at the targets."""
        values = self.kept.tile(rows, columns)
        if self.drift is not None:
            values = (values * torch.exp(self.drift[tile, rows])[:, None]).to(values.dtype)
        return self.slopes.at(rows).of_kept(values).to(self.dtype)
