"""The LM head and the policy loss in one sweep: the gradients are computed beside the loss, block by block.

Shapes: N tokens, D hidden width, V vocabulary.
Source: kernels/README.md, "Sweeps, products and what is kept"; the loss: "Policy loss".
Spec: `grpo_kernels.reference.linear_policy_loss`, same signature without `weight_grad`, `workspace_mib`, `impl` and
`candidate`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from grpo_kernels import reference
from grpo_kernels.checks import check_device, check_share, describe
from grpo_kernels.dispatch import choose_impl
from grpo_kernels.head import Head
from grpo_kernels.linear_loss import linear_loss
from grpo_kernels.normalisers import entropy_quantile
from grpo_kernels.options import PolicyOptions, Tokens
from grpo_kernels.policy_loss import run_policy_loss
from grpo_kernels.policy_terms import PolicyLoss
from grpo_kernels.reference import LinearPolicyLoss

__all__ = ["LinearPolicyLoss", "linear_policy_loss"]


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
    head = Head.of(
        hidden_ND, weight_VD, targets_N, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    check_share(top_entropy_quantile=top_entropy_quantile)
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
    impl = choose_impl(impl, operand=head.operand, device=hidden_ND.device, candidate=candidate)
    if impl == "reference":
        if weight_grad is not None:
            raise ValueError("weight_grad is not read by impl='reference', whose gradients are autograd's")
        return reference.run_linear_policy_loss(
            hidden_ND,
            weight_VD,
            targets_N,
            tokens,
            options,
            bias=bias,
            temperature=head.temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            top_entropy_quantile=top_entropy_quantile,
        )

    def loss(logps: Tensor, entropies: Tensor, rows: slice) -> PolicyLoss:
        own = tokens.rows(rows)
        if top_entropy_quantile < 1.0:
            own = dataclasses.replace(own, entropy_threshold=entropy_quantile(entropies, top_entropy_quantile))
        return run_policy_loss(logps, own, options, entropies=entropies, impl=impl)

    return linear_loss(
        hidden_ND,
        weight_VD,
        targets_N,
        loss,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        sequence_lengths=_dependent_rows(tokens, options, is_one_group=top_entropy_quantile < 1.0),
        has_entropy_slope=entropy_weights is not None,
        weight_grad=weight_grad,
        workspace_mib=workspace_mib,
        impl=impl,
        candidate=candidate,
    )


def _dependent_rows(tokens: Tokens, options: PolicyOptions, *, is_one_group: bool) -> list[int] | None:
    """Lengths of the runs of rows whose losses depend on each other, or None; waits for an accelerator once."""
    if is_one_group:
        return [tokens.advantages.numel()]
    if not options.needs_sequences or tokens.sequence_ids is None:
        return None
    return torch.unique_consecutive(tokens.sequence_ids, return_counts=True)[1].tolist()
