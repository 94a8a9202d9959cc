"""The LM head and the policy loss in one sweep: the gradients are computed beside the loss, block by block.

Shapes: N tokens, D hidden width, V vocabulary.
Source: kernels/README.md, "Sweeps, products and what is kept"; the loss: "Policy loss".
Spec: `grpo_kernels.reference.linear_policy_loss`, same signature without `workspace_mib`, `weight_grad` and `impl`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import reference
from grpo_kernels.checks import (
    check_device,
    check_head,
    check_positive,
    check_share,
    check_temperature,
    check_weight_grad,
    describe,
    operand_dtype,
)
from grpo_kernels.dispatch import choose_impl, make_operands
from grpo_kernels.first_order import first_order
from grpo_kernels.head import Head, RowSums, Slopes
from grpo_kernels.normalisers import entropy_quantile
from grpo_kernels.operands import Block, Operands
from grpo_kernels.options import PolicyOptions, Tokens
from grpo_kernels.policy_loss import run_policy_loss
from grpo_kernels.policy_terms import PolicyLoss
from grpo_kernels.reference import LinearPolicyLoss
from grpo_kernels.sweeps import Gradients, forward_sweep, gradient_sweep, weight_sweep
from grpo_kernels.tiles import Kept, Request, make_plan, within

__all__ = ["LinearPolicyLoss", "linear_policy_loss"]


class _Sweep:
    """One call: every group of rows goes through logits, loss and gradients before the next is touched."""

    def __init__(
        self,
        operands: Operands,
        targets: Tensor,
        tokens: Tokens,
        options: PolicyOptions,
        gradients: Gradients | None,
        *,
        follows_unit: bool,
        top_entropy_quantile: float,
        impl: str,
    ) -> None:
        self.operands, self.targets, self.tokens, self.options = operands, targets, tokens, options
        self.gradients, self.top_entropy_quantile, self.impl = gradients, top_entropy_quantile, impl
        # the hidden gradient is d log-prob / d hidden, summed up with the logits, times the slope
        self.follows_unit = follows_unit
        self.plan, self.head = operands.plan, operands.head
        self.sums = RowSums.empty(operands.anchors(targets), with_entropy=True)
        self.kept = None
        if self.plan.keep:
            # the bonus takes the exponents from the exponentials, for which half precision is too coarse
            dtype = operands.narrow if tokens.entropy_weights is None else self.head.wide
            self.kept = Kept.empty(self.plan, dtype=dtype, wide=self.head.wide, device=targets.device)
        self.slopes: list[Slopes] = []

    def run(self) -> tuple[Tensor, Tensor, PolicyLoss]:
        """Log-probs, entropies and the loss's terms of all rows; fills the gradients."""
        parts = [self._group(group) for group in self._groups()]
        logps, entropies, terms = zip(*parts, strict=True)
        if self.gradients is not None and self.gradients.weight is not None and not self.plan.sums_weight:
            everything = self.operands.all_rows(self.targets, self.sums)
            weight_sweep(self.operands, everything, _joined(self.slopes), self.gradients)
        return torch.cat(logps), torch.cat(entropies), _joined(list(terms))

    def _groups(self) -> list[slice]:
        if self.plan.N == 0 or self.top_entropy_quantile < 1.0:
            return [slice(0, self.plan.N)]
        if not self.options.needs_sequences:
            return list(self.plan.groups(None))
        assert self.tokens.sequence_ids is not None
        # one wait for an accelerator: blocks end where sequences end
        lengths = torch.unique_consecutive(self.tokens.sequence_ids, return_counts=True)[1].tolist()
        return list(self.plan.groups(lengths))

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
        logps, entropies, terms, slopes = self._loss(group)
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
        logps, entropies, terms, slopes = self._loss(rows)
        self._finish(block, unit, slopes)
        return logps, entropies, terms

    def _loss(self, group: slice) -> tuple[Tensor, Tensor, PolicyLoss, Slopes]:
        sums, tokens = self.sums.at(group), self.tokens.rows(group)
        logps, entropies = sums.logps(), sums.entropy()
        if self.top_entropy_quantile < 1.0:
            threshold = entropy_quantile(entropies, self.top_entropy_quantile)
            tokens = dataclasses.replace(tokens, entropy_threshold=threshold)
        terms = run_policy_loss(logps, tokens, self.options, entropies=entropies, impl=self.impl)
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


def _joined(parts: list[Any]) -> Any:
    """Dataclasses of row tensors joined into one; a field that is None stays None."""
    fields = [field.name for field in dataclasses.fields(parts[0])]
    columns = {name: [getattr(part, name) for part in parts] for name in fields}
    joined = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    return type(parts[0])(**joined)


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
            raise RuntimeError("linear_policy_loss: its gradients were handed over by an earlier backward pass")
        if ctx.is_weight_given:
            _check_upstream(dloss)
        for gradient in gradients:
            if gradient is not None:
                _multiply_(gradient, dloss)
        return *gradients, None, None, None


def _check_upstream(dloss: Tensor) -> None:
    message = "linear_policy_loss: with weight_grad the loss must go into backward() as it is, upstream gradient 1"
    if dloss.is_cuda:
        torch._assert_async(dloss == 1, message)
    elif dloss != 1:
        raise ValueError(f"{message}, got {dloss.item()}")


def _multiply_(gradient: Tensor, dloss: Tensor) -> None:
    """Multiply in place, without memory traffic where the factor is 1, and without a wait for the device."""
    if gradient.is_cuda and gradient.dtype != torch.float64:
        from grpo_kernels.row_kernels import scale_unless_one_

        scale_unless_one_(gradient, dloss)
    elif gradient.is_cuda or dloss != 1:
        gradient.mul_(dloss)


def linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    advantages_N: Tensor,
    *,
    weights: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_weights: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    entropy_threshold: Tensor | None = None,
    top_entropy_quantile: float = 1.0,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    bias_correction_kl: bool = True,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    off_policy_mask_threshold: float | None = None,
    weight_grad: Tensor | None = None,
    workspace_mib: int = 640,
    impl: str = "auto",
    candidate: str | None = None,
) -> LinearPolicyLoss:
    """GRPO's loss from hidden states, and all of its gradients, in one pass over logits that never exist as a whole.

    The same as `linear_logps` followed by `policy_loss` and a sum, with 6NDV of products instead of 8NDV: a block's
    exponentials are still there when its loss, and with it the coefficients of its gradients, is known. So the
    gradients are computed by this call, and `loss.backward()`, which can run once, hands them over. Do not wrap the
    call in activation checkpointing: it would be computed twice.

    Args:
        hidden_ND: As in `linear_logps`; so are `weight_VD`, `targets_N`, `bias`, `temperature`, `softcap` and
            `logit_scale`.
        weight_VD: [V, D].
        targets_N: [N] int64.
        advantages_N: [N] float32 (float64 for float64 operands), as in `policy_loss`; so are all other tensors [N] and
            options not named here.
        weights: [N], what a token weighs in the loss.
        bias: [V].
        temperature: A number or [N].
        softcap: Or None.
        logit_scale: A number.
        old_logps: [N] or None.
        ref_logps: [N] or None.
        sampling_weights: [N] or None.
        sampling_logps: [N] or None.
        sequence_ids: [N] int64 or None. A sequence that does not fit a block costs 8NDV.
        entropy_weights: [N], what a token's entropy weighs in the bonus, or None.
        entropy_threshold: [] or None: tokens of a smaller entropy lose surrogate and bonus.
        top_entropy_quantile: Instead of a threshold: the share of this call's tokens, those of the largest entropies,
            that keep theirs. Below 1 every entropy is needed before the first gradient: 8NDV beyond one block.
        loss_type: See `policy_loss`.
        importance_sampling_level: See `policy_loss`.
        epsilon_low: See `policy_loss`.
        epsilon_high: See `policy_loss`.
        delta: See `policy_loss`.
        beta: See `policy_loss`.
        kl_estimator: See `policy_loss`.
        bias_correction_kl: See `policy_loss`.
        sapo_temperature_pos: See `policy_loss`.
        sapo_temperature_neg: See `policy_loss`.
        vespo_k_pos: See `policy_loss`.
        vespo_lambda_pos: See `policy_loss`.
        vespo_k_neg: See `policy_loss`.
        vespo_lambda_neg: See `policy_loss`.
        off_policy_mask_threshold: See `policy_loss`.
        weight_grad: [V, D] float32 or like `weight_VD`, usually its `.grad`: the weight's gradient is added into it by
            this call, and autograd gets none. The loss must then go into `backward()` as it is.
        workspace_mib: As in `linear_logps`. It also has to hold the fp32 sum of a half-precision weight's gradient
            where that takes several blocks, `4 V D`; else that gradient takes a sweep of its own, 8NDV in all.
        impl: As in `linear_logps`.
        candidate: As in `linear_logps`.

    Returns:
        A `LinearPolicyLoss`; only its `loss` carries a gradient, to `hidden_ND`, `weight_VD` and `bias`.

    Raises:
        ValueError: As `linear_logps` and `policy_loss`; if `entropy_threshold` and `top_entropy_quantile` are both
            given; if `weight_grad` does not fit the weight or no gradient is wanted for it; in `backward()` on a CPU
            if the upstream gradient is not 1 with `weight_grad`.
        RuntimeError: If `backward()` runs twice.
    """
    options = PolicyOptions(
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        kl_estimator=kl_estimator,
        bias_correction_kl=bias_correction_kl,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
        off_policy_mask_threshold=off_policy_mask_threshold,
    )
    tokens = Tokens(
        advantages=advantages_N,
        weights=weights,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_weights=sampling_weights,
        sampling_logps=sampling_logps,
        sequence_ids=sequence_ids,
        entropy_weights=entropy_weights,
        entropy_threshold=entropy_threshold,
    )
    check_head(hidden_ND, weight_VD, targets_N, bias)
    check_positive(softcap=softcap, logit_scale=logit_scale, workspace_mib=workspace_mib)
    check_share(top_entropy_quantile=top_entropy_quantile)
    operand = operand_dtype(hidden_ND, weight_VD, bias)
    temperature = check_temperature(temperature, targets_N.numel(), operand=operand, device=hidden_ND.device)
    head = Head(operand, temperature, softcap, logit_scale)
    if advantages_N.shape != targets_N.shape or advantages_N.dtype != head.wide:
        raise ValueError(
            f"advantages_N must be [{targets_N.numel()}] {head.wide} like the log-probs, got {describe(advantages_N)}"
        )
    check_device(hidden_ND=hidden_ND, advantages_N=advantages_N)
    tokens.check(options)
    if entropy_threshold is not None and top_entropy_quantile < 1.0:
        raise ValueError(
            f"entropy_threshold and top_entropy_quantile={top_entropy_quantile} exclude each other, both were given"
        )
    has_grad = torch.is_grad_enabled()
    needs = (
        has_grad and hidden_ND.requires_grad,
        has_grad and weight_VD.requires_grad,
        has_grad and bias is not None and bias.requires_grad,
    )
    check_weight_grad(weight_grad, weight_VD, is_wanted=needs[1])
    impl = choose_impl(impl, operand=operand, device=hidden_ND.device)
    if impl == "reference":
        return reference.run_linear_policy_loss(
            hidden_ND,
            weight_VD,
            targets_N,
            tokens,
            options,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            top_entropy_quantile=top_entropy_quantile,
        )
    grad_dtype = weight_VD.dtype if weight_grad is None else weight_grad.dtype
    needs_products = any(needs[1:]) or (needs[0] and entropy_weights is not None)
    # kept exponentials hold the soft cap's slope, and then their logarithms are not the exponents
    can_keep = softcap is None or entropy_weights is None
    request = Request(
        operand=operand,
        device=hidden_ND.device,
        keeps="block" if needs_products and can_keep else "none",
        keeps_wide=entropy_weights is not None,
        casts_weight=weight_VD.dtype != operand,
        rounds_weight_grad=needs[1] and grad_dtype.itemsize < head.wide.itemsize,
        uses_kernels=impl == "triton",
        workspace=workspace_mib << 20,
    )
    N, D = hidden_ND.shape
    plan = make_plan(N, D, weight_VD.shape[0], request)
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        operands = make_operands(impl, head, plan, hidden_ND, weight_VD, bias, candidate=candidate)
        gradients = Gradients(operands, needs, into=weight_grad) if any(needs) else None
        sweep = _Sweep(
            operands,
            targets_N,
            tokens,
            options,
            gradients,
            follows_unit=needs[0] and not needs_products,
            top_entropy_quantile=top_entropy_quantile,
            impl=impl,
        )
        logps, entropies, terms = sweep.run()
        loss = terms.loss.sum()
    if gradients is not None:
        dweight = gradients.finished_weight(weight_VD.dtype)
        dbias = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        computed = [gradients.hidden, dweight, dbias]
        loss = _WithGradients.apply(hidden_ND, weight_VD, bias, loss, computed, weight_grad is not None)
    return LinearPolicyLoss(loss=loss, logps=logps, entropies=entropies, terms=terms)
