"""The policy loss of a GRPO step, token by token: eight loss types, at token and sequence level.

Shapes: N = tokens, all sequences one after the other.
Source: kernels/README.md, "Policy loss", names the papers; the order of the terms is TRL 1.16's.
Spec: `grpo_kernels.reference.policy_loss`, same signature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import policy_terms
from grpo_kernels.checks import check_tokens
from grpo_kernels.dispatch import choose_impl
from grpo_kernels.options import PolicyOptions, Tokens
from grpo_kernels.policy_terms import PolicyLoss, PolicyTotals

__all__ = ["PolicyLoss", "PolicyTotals", "policy_loss", "run_policy_loss"]


def policy_loss(
    logps_N: Tensor,
    advantages_N: Tensor,
    *,
    weights: Tensor,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_weights: Tensor | None = None,
    sampling_logps: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    entropies: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    entropy_threshold: Tensor | None = None,
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
    impl: str = "auto",
) -> PolicyLoss:
    """Each token's share of the GRPO loss, with its slope; the scalar loss is the sum of the shares.

    `loss = (surrogate * off-policy mask * entropy mask * sampling_weights + beta * kl) * weights
    - entropy_weights * entropy mask * entropies`. With `ratio = exp(logps - old_logps)`, or at sequence level exp of
    that difference's mean over the sequence, `A` the advantage, `sg` a constant of the derivative:

    - grpo, bnpo, dr_grpo, dapo, luspo: `-min(min(ratio, delta) A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A)`
    - cispo: `-sg(min(ratio, epsilon_high)) A logps`
    - sapo: `-A 4/T sigmoid(T (ratio - 1))`, `T = sapo_temperature_pos` where `A > 0`, else `sapo_temperature_neg`
    - vespo: `-sg(phi) A logps`, `phi = exp(l + k log w - l w)`, `w` the product of `ratio * sampling_weights` over the
      sequence (logarithms bounded by log(1e-8) and 20), `k, l = vespo_k_pos, vespo_lambda_pos` where `A >= 0`, else
      the `neg` ones; the sampling weights are then no factor of their own

    With `d = ref_logps - logps` the KL is k1 `-d`, k2 `d^2 / 2` or k3 `exp(d) - d - 1`, times `ratio` with
    `bias_correction_kl`. Differentiable once in
    `logps_N` and, through the bonus, in `entropies`. A ratio on the edge of a clip keeps its slope.

    Args:
        logps_N: [N] float32 or float64, current policy.
        advantages_N: [N] like `logps_N`, the group-relative advantage repeated over its tokens, or one a token.
        weights: [N] like `logps_N`, what a token weighs in the scalar loss: `row_weights` of its row; 0 for tokens
            outside the loss.
        old_logps: [N] like `logps_N`, the policy the clip range is centred on; None means the current policy, whose
            ratio is 1 and still carries the gradient.
        ref_logps: [N] like `logps_N`, reference policy; given exactly when `beta` is not 0.
        sampling_weights: [N] like `logps_N`, importance weights that correct for the sampler.
        sampling_logps: [N] like `logps_N`, what the sampler reported, NaN where it did not; with
            `off_policy_mask_threshold` only, and without them the mask takes `old_logps`.
        sequence_ids: [N] int64, non-decreasing, the same for the tokens of one sequence; sequences are whole. Needed at
            sequence level, for "vespo" and for the off-policy mask.
        entropies: [N] like `logps_N`, of the current policy; with one of the next two only.
        entropy_weights: [N] like `logps_N`, what a token's entropy weighs in the bonus.
        entropy_threshold: [] like `logps_N`, from `entropy_quantile`: tokens of a smaller entropy lose surrogate and
            bonus, and keep their KL.
        loss_type: One of the eight above; the clipped five differ in their normaliser, `weights`.
        importance_sampling_level: "token" or "sequence" (GSPO). For "vespo" it decides the reported ratio and that of
            the bias-corrected KL.
        epsilon_low: Distance of the lower clip from 1; the clipped losses.
        epsilon_high: Distance of the upper clip from 1; the clipped losses. For "cispo" the upper clip itself.
        delta: Upper bound of the unclipped branch's ratio (the two-sided clip), or None; the clipped losses only.
        beta: Weight of the KL penalty.
        kl_estimator: "k1", "k2" or "k3".
        bias_correction_kl: Multiply the KL by the ratio, with its gradient; k3's slope is then the reverse KL's.
        sapo_temperature_pos: "sapo", above 0.
        sapo_temperature_neg: "sapo", above 0.
        vespo_k_pos: "vespo".
        vespo_lambda_pos: "vespo", at least 1e-4.
        vespo_k_neg: "vespo".
        vespo_lambda_neg: "vespo", at least 1e-4.
        off_policy_mask_threshold: Drop the surrogate of tokens with a negative advantage in sequences whose mean
            `sampling_logps - logps` exceeds it; None drops nothing.
        impl: "triton" (float32 on CUDA), "torch", "reference" (the same as "torch") or "auto": "triton" where it runs.

    Returns:
        A `PolicyLoss` of [N] tensors, like `logps_N` in dtype.

    Raises:
        ValueError: If a tensor has the wrong shape, dtype or device, a number is out of range, options exclude each
            other, one that is needed is missing or one that is given is not read, or `impl` does not run here.
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
    tokens.check(options, logps=logps_N)
    if (entropies is not None) != tokens.needs_entropies:
        given = "were not given" if entropies is None else "were given"
        raise ValueError(
            f"entropies are read exactly with entropy_weights or entropy_threshold, but {given} with "
            f"{'at least one' if tokens.needs_entropies else 'none'} of them"
        )
    check_tokens(logps_N=logps_N, entropies=entropies)
    return policy_loss_of(logps_N, tokens, options, entropies=entropies, impl=impl)


def policy_loss_of(
    logps_N: Tensor, tokens: Tokens, options: PolicyOptions, *, entropies: Tensor | None = None, impl: str = "auto"
) -> PolicyLoss:
    """`policy_loss` of tokens and options in one piece each, without its checks."""
    impl = choose_impl(impl, operand=logps_N.dtype, device=logps_N.device)
    if impl != "triton":
        return policy_terms.run_policy_loss(logps_N, tokens, options, entropies=entropies)
    from grpo_kernels.policy_loss_kernel import differentiable_policy_loss

    return differentiable_policy_loss(logps_N, tokens, options, entropies=entropies)


def run_policy_loss(
    logps_N: Tensor, tokens: Tokens, options: PolicyOptions, *, entropies: Tensor | None = None, impl: str = "auto"
) -> PolicyLoss:
    """`policy_loss` without its checks and without a graph: the slopes are the way to a gradient.

    `entropies` may be given though nothing reads them.
    """
    with torch.no_grad():
        impl = choose_impl(impl, operand=logps_N.dtype, device=logps_N.device)
        if impl != "triton":
            return policy_terms.run_policy_loss(logps_N, tokens, options, entropies=entropies)
        from grpo_kernels.policy_loss_kernel import launch_policy_loss

        entropies = None if entropies is None else entropies.contiguous()
        return launch_policy_loss(logps_N.contiguous(), tokens.contiguous(), options, entropies=entropies)
