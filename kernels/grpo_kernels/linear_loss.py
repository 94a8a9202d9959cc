"""Any per-token loss of a language-model head's log-probs, with all gradients, in one pass over the logits.

Shapes: N tokens, D hidden width, V vocabulary.
Source: kernels/README.md, "Sweeps, products and what is kept".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.checks import check_lengths, check_positive, check_weight_grad
from grpo_kernels.dispatch import choose_impl, exactly_on, has_triton, make_operands
from grpo_kernels.first_order import first_order
from grpo_kernels.head import Head, RowSums, Slopes
from grpo_kernels.operands import Block, Operands
from grpo_kernels.policy_terms import PolicyLoss
from grpo_kernels.reference import LinearPolicyLoss
from grpo_kernels.rows import joined
from grpo_kernels.sweeps import Gradients, forward_sweep, gradient_sweep, weight_sweep
from grpo_kernels.tiles import Kept, Request, make_plan, narrow_dtype, within

# from the log-probs and entropies of some rows, and which rows they are, to their terms
RowsLoss = Callable[[Tensor, Tensor, slice], PolicyLoss]


class _Sweep:
    """One call: every group of rows goes through logits, loss and gradients before the next is touched."""

    def __init__(
        self,
        operands: Operands,
        targets: Tensor,
        loss: RowsLoss,
        gradients: Gradients | None,
        *,
        has_entropy_slope: bool,
        follows_unit: bool,
    ) -> None:
        self.operands, self.targets, self.loss, self.gradients = operands, targets, loss, gradients
        # the hidden gradient is d log-prob / d hidden, summed up with the logits, times the slope
        self.follows_unit, self.has_entropy_slope = follows_unit, has_entropy_slope
        self.plan, self.head = operands.plan, operands.head
        self.sums = RowSums.empty(operands.anchors(targets), with_entropy=True)
        self.kept = None
        if self.plan.keep:
            # the exponents are taken from the exponentials, for which half precision is too coarse
            dtype = self.head.wide if has_entropy_slope else operands.narrow
            self.kept = Kept.empty(self.plan, dtype=dtype, wide=self.head.wide, device=targets.device)
        self.slopes: list[Slopes] = []

    def run(self, lengths: Sequence[int] | None) -> tuple[Tensor, Tensor, PolicyLoss]:
        """Log-probs, entropies and the loss's terms of all rows; fills the gradients."""
        groups = list(self.plan.groups(lengths)) or [slice(0, 0)]
        logps, entropies, terms = zip(*(self._group(group) for group in groups), strict=True)
        if self.gradients is not None and self.gradients.weight is not None and not self.plan.sums_weight:
            everything = self.operands.all_rows(self.targets, self.sums)
            weight_sweep(self.operands, everything, joined(self.slopes), self.gradients)
        return torch.cat(logps), torch.cat(entropies), joined(terms)

    def _group(self, group: slice) -> tuple[Tensor, Tensor, PolicyLoss]:
        blocks = list(self.plan.blocks(group))
        if len(blocks) == 1 and self.follows_unit:
            return self._frozen_block(group)
        kept = self.kept if len(blocks) == 1 else None
        for rows in blocks:
            block = self._block(rows)
            unit = self._zeros(block) if self.follows_unit else None
            forward_sweep(self.operands, block, kept=kept, unit=unit)
            if unit is not None:
                self._finish(block, unit, Slopes.of_logps(block.head, block.sums))
        logps, entropies, terms, slopes = self._terms(group)
        if self.gradients is not None:
            for rows in blocks:
                own = within(group, rows)
                if self.follows_unit and self.gradients.hidden is not None:
                    self.gradients.hidden[rows] *= terms.slope[own, None]
                else:
                    gradient_sweep(self.operands, self._block(rows), slopes.at(own), self.gradients, kept=kept)
        return logps, entropies, terms

    def _frozen_block(self, rows: slice) -> tuple[Tensor, Tensor, PolicyLoss]:
        block = self._block(rows)
        unit = self._zeros(block)
        forward_sweep(self.operands, block, unit=unit)
        logps, entropies, terms, slopes = self._terms(rows)
        self._finish(block, unit, slopes)
        return logps, entropies, terms

    def _terms(self, group: slice) -> tuple[Tensor, Tensor, PolicyLoss, Slopes]:
        sums = self.sums.at(group)
        logps, entropies = sums.logps(), sums.entropy()
        terms = self.loss(logps, entropies, group)
        if terms.entropy_slope is not None and not self.has_entropy_slope:
            raise ValueError("loss returned an entropy_slope, which needs has_entropy_slope=True")
        slopes = Slopes.of(self.head.at(group), sums, entropies, terms.slope, terms.entropy_slope)
        self.slopes.append(slopes)
        return logps, entropies, terms, slopes

    def _block(self, rows: slice) -> Block:
        return self.operands.block(rows, self.targets, self.sums)

    def _zeros(self, block: Block) -> Tensor:
        return block.hidden.new_zeros(block.hidden.shape, dtype=self.head.wide)

    def _finish(self, block: Block, unit: Tensor, slopes: Slopes) -> None:
        assert self.gradients is not None
        assert self.gradients.hidden is not None
        self.operands.finish_hidden(unit, block, slopes, self.gradients.hidden[block.rows])


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients exist already; the backward hands them over, times the upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        gradients: list[Tensor | None],
        is_weight_given: bool,
    ) -> Tensor:
        ctx.gradients, ctx.is_weight_given = gradients, is_weight_given
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward() runs once: the gradients were handed over by an earlier pass")
        if ctx.is_weight_given:
            _check_upstream(dloss)
        for gradient in gradients:
            if gradient is not None:
                _multiply_(gradient, dloss)
        return *gradients, None, None, None


def _check_upstream(dloss: Tensor) -> None:
    message = "with weight_grad the loss must go into backward() as it is, with an upstream gradient 1"
    if dloss.is_cuda:
        torch._assert_async(dloss == 1, message)
    elif dloss != 1:
        raise ValueError(f"{message}, got {dloss.item()}")


def _multiply_(gradient: Tensor, dloss: Tensor) -> None:
    """Multiply in place, without memory traffic where the factor is 1, and without a wait for the device."""
    if gradient.is_cuda and gradient.dtype != torch.float64 and has_triton():
        from grpo_kernels.row_kernels import scale_unless_one_

        scale_unless_one_(gradient, dloss)
    elif gradient.device.type != "cpu" or dloss != 1:
        gradient.mul_(dloss)


def linear_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    loss: RowsLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    sequence_lengths: Sequence[int] | None = None,
    has_entropy_slope: bool = False,
    weight_grad: Tensor | None = None,
    workspace_mib: int = 640,
    impl: str = "auto",
    candidate: str | None = None,
) -> LinearPolicyLoss:
    """What `linear_policy_loss` does, for any loss whose slopes are known as soon as its rows' log-probs are.

    Args:
        hidden_ND: As in `linear_logps`; so are `weight_VD`, `targets_N`, `bias`, `temperature`, `softcap` and
            `logit_scale`.
        weight_VD: [V, D].
        targets_N: [N] int64.
        loss: Called without grad mode, for one group of rows after the other, with their log-probs and entropies (fp32;
            float64 for float64 operands) and their slice of the N rows. Returns their terms; of those `loss`, `slope`
            and `entropy_slope` are read here.
        bias: [V].
        temperature: A number or [N].
        softcap: Or None.
        logit_scale: A number.
        sequence_lengths: Lengths that add up to N: `loss` then sees whole sequences only. A sequence that does not fit
            a block costs 8NDV. None: rows do not depend on each other.
        has_entropy_slope: Whether the terms have an `entropy_slope`.
        weight_grad: As in `linear_policy_loss`; so are the others.
        workspace_mib: In MiB.
        impl: "triton", "torch" or "auto".
        candidate: "tile", "fused" or None.

    Returns:
        A `LinearPolicyLoss`; only its `loss` carries a gradient, to `hidden_ND`, `weight_VD` and `bias`.

    Raises:
        ValueError: As `linear_policy_loss`.
        RuntimeError: If `backward()` runs twice.
    """
    head = Head.of(
        hidden_ND, weight_VD, targets_N, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    check_positive(workspace_mib=workspace_mib)
    N, D = hidden_ND.shape
    check_lengths(N, sequence_lengths=sequence_lengths)
    # kernels read these element by element
    targets_N, bias = targets_N.contiguous(), None if bias is None else bias.contiguous()
    has_grad = torch.is_grad_enabled()
    needs = (
        has_grad and hidden_ND.requires_grad,
        has_grad and weight_VD.requires_grad,
        has_grad and bias is not None and bias.requires_grad,
    )
    check_weight_grad(weight_grad, weight_VD, is_wanted=needs[1])
    impl = choose_impl(impl, operand=head.operand, device=hidden_ND.device, candidate=candidate)
    if impl == "reference":
        raise ValueError("impl='reference' has no sweep: it is linear_policy_loss's and linear_logps's")
    grad_dtype = weight_VD.dtype if weight_grad is None else weight_grad.dtype
    needs_products = any(needs[1:]) or (needs[0] and has_entropy_slope)
    # kept exponentials hold the soft cap's slope, and then their logarithms are not the exponents
    can_keep = softcap is None or not has_entropy_slope
    request = Request(
        operand=head.operand,
        device=hidden_ND.device,
        keeps="block" if needs_products and can_keep else "none",
        keeps_wide=has_entropy_slope,
        casts_weight=weight_VD.dtype != narrow_dtype(head.operand, hidden_ND.device),
        rounds_weight_grad=needs[1] and grad_dtype.itemsize < head.wide.itemsize,
        uses_kernels=impl == "triton",
        workspace=workspace_mib << 20,
    )
    plan = make_plan(N, D, weight_VD.shape[0], request)
    with torch.no_grad(), exactly_on(hidden_ND.device):
        operands = make_operands(impl, head, plan, hidden_ND, weight_VD, bias, candidate=candidate)
        gradients = Gradients(operands, needs, into=weight_grad) if any(needs) else None
        follows_unit = needs[0] and not needs_products
        sweep = _Sweep(
            operands, targets_N, loss, gradients, has_entropy_slope=has_entropy_slope, follows_unit=follows_unit
        )
        logps, entropies, terms = sweep.run(sequence_lengths)
        total = terms.loss.sum()
    if gradients is not None:
        dweight = gradients.finished_weight(weight_VD.dtype)
        dbias = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        computed = [gradients.hidden, dweight, dbias]
        total = _WithGradients.apply(hidden_ND, weight_VD, bias, total, computed, weight_grad is not None)
    return LinearPolicyLoss(loss=total, logps=logps, entropy=entropies, terms=terms)
