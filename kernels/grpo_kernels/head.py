"""The arithmetic of one head: from products to logits, from logits to row sums, from row sums to coefficients.

Everything here works on one tile or on [N] vectors; the loops over tiles are in `sweeps`.
The formulas are derived in kernels/README.md, "The anchored softmax".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_kernels.checks import check_head, check_positive, check_temperature, operand_dtype
from grpo_kernels.rows import cut

# a row's offset follows its largest logit only past this distance: exponentials stay below e**30, their sum finite
MAX_EXPONENT = 30.0


@dataclass(frozen=True)
class Head:
    """What lies between a product `h . w` and a logit; operands are rounded to `operand`, all else is `wide`.

    `temperature` is one number, or [N] in the wide dtype: one a row.
    """

    operand: torch.dtype
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        *,
        temperature: float | Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> Head:
        """The head of a call's arguments; ValueError for what does not fit."""
        check_head(hidden, weight, targets, bias)
        check_positive(softcap=softcap, logit_scale=logit_scale)
        operand = operand_dtype(hidden, weight, bias)
        temperature = check_temperature(temperature, targets.numel(), operand=operand, device=hidden.device)
        return Head(operand, temperature, softcap, logit_scale)

    def at(self, rows: slice) -> Head:
        """The head of these rows."""
        if isinstance(self.temperature, float):
            return self
        return replace(self, temperature=self.temperature[rows])

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums: fp32, or float64 for float64 operands."""
        return torch.promote_types(self.operand, torch.float32)

    def logits_(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Turn products [rows] or [rows, columns] into logits in place; `bias` is broadcast to them."""
        if bias is not None:
            products.add_(bias)
        temperature = self._temperature(products)
        if self.softcap is not None:
            products.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / temperature)
        elif isinstance(temperature, Tensor) or self.logit_scale != temperature:
            products.mul_(self.logit_scale / temperature)
        return products

    def cap_slope(self, logits: Tensor) -> Tensor:
        """The soft cap's part of d logit / d product, `1 - tanh**2`, from the logits."""
        assert self.softcap is not None
        return logits.mul(self._temperature(logits) / self.softcap).square_().neg_().add_(1)

    def _temperature(self, logits: Tensor) -> float | Tensor:
        is_tile = isinstance(self.temperature, Tensor) and logits.ndim == 2
        return self.temperature[:, None] if is_tile else self.temperature  # type: ignore[index]


@dataclass
class RowSums:
    """The softmax of each row relative to its offset; [N] in the wide dtype.

    Attributes:
        anchor: The target's logit.
        offset: What the exponents are relative to: the anchor, or a logit far above it.
        S: The sum of the exponentials without the target's.
        U: The sum of exponential times exponent without the target's, or None if no entropy is wanted.
    """

    anchor: Tensor
    offset: Tensor
    S: Tensor
    U: Tensor | None = None

    @staticmethod
    def empty(anchor: Tensor, *, with_entropy: bool) -> RowSums:
        """Empty sums relative to the targets' logits."""
        U = torch.zeros_like(anchor) if with_entropy else None
        return RowSums(anchor=anchor, offset=anchor.clone(), S=torch.zeros_like(anchor), U=U)

    def at(self, rows: slice) -> RowSums:
        """Views of these rows' sums."""
        return cut(self, rows)

    def add_tile(self, logits: Tensor, exps: Tensor, columns: slice, targets: Tensor) -> None:
        """Add a tile's columns; writes its exponentials into `exps`, 0 at the targets, and overwrites the logits."""
        peak = logits.amax(1)
        offset = torch.where(peak > self.offset + MAX_EXPONENT, peak, self.offset)
        step = offset - self.offset
        shrink = torch.exp(-step)
        exponents = logits.sub_(offset[:, None])
        torch.exp(exponents, out=exps)
        put_targets_(exps, targets, columns, 0.0)
        if self.U is not None:
            self.U.sub_(step * self.S).mul_(shrink).add_(torch.linalg.vecdot(exps, exponents))
        self.S.mul_(shrink).add_(exps.sum(1))
        self.offset.copy_(offset)

    @property
    def lead(self) -> Tensor:
        """How far the offset lies above the target's logit, 0 for all but very unlikely targets."""
        return self.offset - self.anchor

    @property
    def Z(self) -> Tensor:
        """The sum of all exponentials, the target's included."""
        return torch.exp(-self.lead) + self.S

    def log_Z(self) -> Tensor:
        """Its logarithm."""
        # log1p keeps the relative accuracy of a confident target's log-prob
        return torch.where(self.lead == 0, torch.log1p(self.S), torch.log(self.Z))

    def logps(self) -> Tensor:
        """The targets' log-probs, never above 0."""
        return -(self.lead + self.log_Z())

    def entropy(self) -> Tensor:
        """The entropy of each row, in nat."""
        assert self.U is not None
        return self.log_Z() - (self.U - self.lead * torch.exp(-self.lead)) / self.Z


@dataclass(frozen=True)
class Slopes:
    """What the upstream gradients make of a row: `d loss / d product_j = scale * coefficient_j`.

    `coefficient_j = exp_j * (constant + at_entropy * exponent_j)`, times the soft cap's slope, and `at_target` for the
    target. Without an entropy gradient the coefficients are the exponentials themselves and the upstream gradient is
    in `scale`.
    """

    scale: Tensor
    at_target: Tensor
    constant: Tensor | None = None
    at_entropy: Tensor | None = None

    @staticmethod
    def of(head: Head, sums: RowSums, entropy: Tensor | None, dlogps: Tensor | None, dentropy: Tensor | None) -> Slopes:
        """The slopes for upstream gradients of which at least one is given."""
        scale = -head.logit_scale / head.temperature / sums.Z
        cap_slope = 1.0 if head.softcap is None else head.cap_slope(sums.anchor)
        if dentropy is None or entropy is None:
            assert dlogps is not None
            return Slopes(scale=scale * dlogps, at_target=-sums.S * cap_slope)
        if dlogps is None:
            dlogps = torch.zeros_like(dentropy)
        shift = entropy - sums.log_Z()
        own = torch.exp(-sums.lead) * (shift - sums.lead)
        return Slopes(
            scale=scale,
            at_target=(dentropy * own - dlogps * sums.S) * cap_slope,
            constant=dlogps + dentropy * shift,
            at_entropy=dentropy,
        )

    @staticmethod
    def of_logps(head: Head, sums: RowSums) -> Slopes:
        """The slopes of the log-probs themselves."""
        return Slopes.of(head, sums, None, torch.ones_like(sums.S), None)

    def at(self, rows: slice) -> Slopes:
        """These rows' slopes."""
        return cut(self, rows)

    def coefficients_(self, head: Head, logits: Tensor, offset: Tensor) -> Tensor:
        """A tile's coefficients from its logits, in their memory; the targets' elements are not `at_target` yet."""
        cap_slope = None if head.softcap is None else head.cap_slope(logits)
        values = logits.sub_(offset[:, None])
        if self.constant is None or self.at_entropy is None:
            values.exp_()
        else:
            exps = torch.exp(values)
            values.mul_(self.at_entropy[:, None]).add_(self.constant[:, None]).mul_(exps)
        return values if cap_slope is None else values.mul_(cap_slope)

    def of_kept(self, exps: Tensor) -> Tensor:
        """A tile's coefficients from its exponentials, whose logarithms are the exponents; 0 stays 0."""
        if self.constant is None or self.at_entropy is None:
            return exps
        exponents = torch.log(exps.clamp(min=torch.finfo(exps.dtype).tiny))
        return exponents.mul_(self.at_entropy[:, None]).add_(self.constant[:, None]).mul_(exps)


def put_targets_(tile: Tensor, targets: Tensor, columns: slice, value: float) -> None:
    """Write `value` into the targets' elements of a tile, without waiting for the device."""
    local = targets - columns.start
    is_here = (local >= 0) & (local < tile.shape[1])
    index = local.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, index, tile.gather(1, index).masked_fill_(is_here[:, None], value))
