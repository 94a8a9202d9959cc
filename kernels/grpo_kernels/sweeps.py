"""The loops over tiles: from operands to row sums, and from row sums to gradients.

Derivation: kernels/README.md, "Sweeps, products and what is kept".
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.gemm import add_product_, add_rows_, widen
from grpo_kernels.head import Slopes
from grpo_kernels.operands import Block, Operands
from grpo_kernels.tiles import MIN_SIDE, Kept


def forward_sweep(operands: Operands, block: Block, *, kept: Kept | None = None, unit: Tensor | None = None) -> None:
    """One pass over a block's logits, which fills its sums.

    Args:
        operands: The call's.
        block: The rows.
        kept: Where to keep the exponentials, or None.
        unit: [block, D] wide, zeros: becomes `sum_j coefficient_j * w_j` relative to the final offsets, or None.
    """
    plan = operands.plan
    # rows start at a multiple of 128 bytes, as those of kept exponentials do: kernels then run the same machine code
    width = -(-plan.columns // MIN_SIDE) * MIN_SIDE
    scratch = None if unit is None else torch.empty(plan.rows, width, dtype=operands.narrow, device=unit.device)
    for tile, columns in enumerate(plan.vocab_tiles()):
        weight_tile = operands.weight_tile(columns)
        wide_tile = widen(weight_tile)
        for rows in plan.row_tiles(slice(0, block.size)):
            out = None if kept is None else kept.tile(rows, columns)
            if unit is None or scratch is None:
                operands.fold(block, rows, columns, wide_tile, out)
                continue
            exps = scratch[: rows.stop - rows.start, : columns.stop - columns.start]
            before = block.sums.offset[rows].clone()
            operands.fold(block, rows, columns, wide_tile, exps)
            unit[rows] *= torch.exp(before - block.sums.offset[rows])[:, None]
            add_product_(unit[rows], exps, weight_tile.to(operands.narrow))
        if kept is not None:
            kept.offsets[tile, : block.size] = block.sums.offset


class Gradients:
    """The gradients of one call; one that nobody asked for is None and costs nothing.

    Attributes:
        hidden: [N, D] like the hidden states.
        weight: [V, D], what the weight's gradient is added into.
        bias: [V] in the wide dtype.
        rounds: Whether `weight` is too narrow to be added into tile by tile: each of its rows is written once.
    """

    def __init__(self, operands: Operands, needs: tuple[bool, ...], *, into: Tensor | None = None) -> None:
        plan, hidden, weight, wide = operands.plan, operands.hidden, operands.weight, operands.head.wide
        self.hidden = hidden.new_empty(hidden.shape) if needs[0] else None
        self.weight = None
        self.given = into
        self.rounds = False
        if needs[1]:
            dtype = weight.dtype if into is None else into.dtype
            is_narrow = dtype.itemsize < wide.itemsize
            self.rounds = is_narrow and (plan.block >= plan.N or not plan.sums_weight)
            dtype = dtype if self.rounds or not is_narrow else wide
            is_given = into is not None and into.dtype == dtype
            self.weight = into if is_given else torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        self.bias = weight.new_zeros(plan.V, dtype=wide) if needs[2] else None

    def finished_weight(self, dtype: torch.dtype) -> Tensor | None:
        """The weight's gradient, unless it went into a given buffer."""
        if self.given is None:
            return None if self.weight is None else self.weight.to(dtype)
        if self.weight is not None and self.weight is not self.given:
            self.given += self.weight
        return None


class _TargetTerms:
    """The targets' own terms of the weight's gradient: one row each, added in the wide dtype and never rounded."""

    def __init__(self, operands: Operands, block: Block, slopes: Slopes) -> None:
        self.operands, self.block = operands, block
        self.factors = slopes.scale * slopes.at_target
        self.order = block.targets.argsort(stable=True)
        columns, V = operands.plan.columns, operands.plan.V
        edges = torch.arange(0, V + columns, columns, device=block.targets.device)
        self.bounds = torch.searchsorted(block.targets[self.order], edges).tolist()

    def add_to_tile_(self, dweight: Tensor, tile: int, columns: slice) -> None:
        for few in self.order[self.bounds[tile] : self.bounds[tile + 1]].split(self.operands.plan.rows):
            hidden = self.block.hidden[few].to(self.operands.head.operand)
            add_rows_(dweight, self.block.targets[few] - columns.start, self.factors[few, None] * hidden)


def gradient_sweep(
    operands: Operands, block: Block, slopes: Slopes, gradients: Gradients, *, kept: Kept | None = None
) -> None:
    """One pass over a block's coefficients: each tile of them meets the weight tile and the scaled hidden rows.

    Args:
        operands: The call's.
        block: The rows, their sums complete.
        slopes: The block's.
        gradients: Receive the block's share. A weight gradient that takes a sweep of its own is left out.
        kept: The block's exponentials; without them logits are computed once more.
    """
    plan, narrow = operands.plan, operands.narrow
    needs_weight = gradients.weight is not None and plan.sums_weight
    if gradients.hidden is None and gradients.bias is None and not needs_weight:
        return
    coefficients = None if kept is None else operands.kept_coefficients(kept, block, slopes)
    scaled = operands.scaled(block, slice(0, block.size), slopes) if needs_weight else None
    total = (
        block.hidden.new_zeros(block.hidden.shape, dtype=operands.head.wide) if gradients.hidden is not None else None
    )
    terms = _TargetTerms(operands, block, slopes) if needs_weight and gradients.rounds else None
    for tile, columns in enumerate(plan.vocab_tiles()):
        weight_tile = operands.weight_tile(columns) if total is not None or coefficients is None else None
        wide_tile = None if weight_tile is None or coefficients is not None else widen(weight_tile)
        narrow_tile = None if weight_tile is None or total is None else weight_tile.to(narrow)
        dweight = _weight_tile(operands, gradients, columns) if needs_weight else None
        for rows in plan.row_tiles(slice(0, block.size)):
            if coefficients is not None:
                values = coefficients.tile(rows, columns, tile)
            else:
                assert wide_tile is not None
                values = operands.coefficients(block, rows, columns, wide_tile, slopes)
            if total is not None and narrow_tile is not None:
                add_product_(total[rows], values, narrow_tile)
            if dweight is not None and scaled is not None:
                add_product_(dweight, values.t(), scaled[rows])
            if gradients.bias is not None:
                gradients.bias[columns] += torch.mv(values.t().to(operands.head.wide), slopes.scale[rows])
        if terms is not None and dweight is not None and gradients.weight is not None:
            terms.add_to_tile_(dweight, tile, columns)
            gradients.weight[columns] += dweight
    if total is not None and gradients.hidden is not None:
        operands.finish_hidden(total, block, slopes, gradients.hidden[block.rows])
    factors = slopes.scale * slopes.at_target
    if needs_weight and terms is None and gradients.weight is not None:
        for rows in plan.row_tiles(slice(0, block.size)):
            values = factors[rows, None] * block.hidden[rows]
            add_rows_(gradients.weight, block.targets[rows], values)
    if gradients.bias is not None:
        add_rows_(gradients.bias, block.targets, factors)


def _weight_tile(operands: Operands, gradients: Gradients, columns: slice) -> Tensor:
    """Where a tile of the weight's gradient adds up: a buffer if it has to be rounded once, else its own rows."""
    assert gradients.weight is not None
    if not gradients.rounds:
        return gradients.weight[columns]
    shape = columns.stop - columns.start, operands.weight.shape[1]
    return torch.zeros(shape, dtype=operands.head.wide, device=operands.weight.device)


def weight_sweep(operands: Operands, everything: Block, slopes: Slopes, gradients: Gradients) -> None:
    """The weight's gradient alone, tile by tile of it, each from all rows: 4NDV, and rounded once.

    Args:
        operands: The call's.
        everything: All rows, their hidden states not rounded yet, their sums complete.
        slopes: Those of all rows.
        gradients: Receive it.
    """
    plan = operands.plan
    assert gradients.weight is not None
    terms = _TargetTerms(operands, everything, slopes)
    for tile, columns in enumerate(plan.vocab_tiles()):
        wide_tile = widen(operands.weight_tile(columns))
        dweight = _weight_tile(operands, gradients, columns)
        for rows in plan.row_tiles(slice(0, plan.N)):
            block = operands.block(rows, everything.targets, everything.sums)
            own, few = slopes.at(rows), slice(0, block.size)
            values = operands.coefficients(block, few, columns, wide_tile, own)
            add_product_(dweight, values.t(), operands.scaled(block, few, own))
        terms.add_to_tile_(dweight, tile, columns)
        gradients.weight[columns] += dweight
