"""Clipped GRPO policy loss with a k3 KL penalty, per token.

Source: DeepSeekMath (arXiv:2402.03300) eq. 3-4; clip-higher from DAPO (arXiv:2503.14476).
Spec: `grpo_kernels.reference.policy_loss`, same signature.
"""

from __future__ import annotations

from torch import Tensor

from grpo_kernels import reference
from grpo_kernels.checks import check_positive, check_tokens
from grpo_kernels.reference import PolicyLoss

__all__ = ["PolicyLoss", "policy_loss"]


def policy_loss(
    logps_N: Tensor,
    advantages_N: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    sampling_weights: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    bias_correction_kl: bool = True,
) -> PolicyLoss:
    """Per-token clipped surrogate plus `beta` times the k3 KL to the reference policy.

    With `ratio = exp(logps - old_logps)` and `k3 = exp(ref - logps) - (ref - logps) - 1`:
    `loss = -min(min(ratio, delta) * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A) * sampling_weights
    + beta * k3 * ratio`.

    Args:
        logps_N: [N] float32 or float64, current policy.
        advantages_N: [N] like `logps_N`, the group-relative advantage repeated over its tokens.
        old_logps: [N] like `logps_N`, the policy the clip range is centred on; None means the current policy, whose
            ratio is 1 and still carries the gradient.
        ref_logps: [N] like `logps_N`, reference policy; given exactly when `beta` is not 0.
        sampling_weights: [N] like `logps_N`, importance weights that correct for the sampler; they multiply the
            surrogate, not the KL.
        epsilon_low: The ratio is clipped below at `1 - epsilon_low`.
        epsilon_high: The ratio is clipped above at `1 + epsilon_high`.
        delta: Upper bound of the unclipped branch's ratio (the two-sided clip); None sets no bound.
        beta: Weight of the KL penalty.
        bias_correction_kl: Multiply the KL by the ratio, with its gradient, which makes the KL's gradient that of the
            reverse KL.

    Returns:
        A `PolicyLoss` of [N] tensors, neither masked nor reduced: normalisation is the caller's.

    Raises:
        ValueError: If a tensor has the wrong shape, dtype or device, an epsilon is negative, `delta` is not positive,
            or `beta` and `ref_logps` disagree.
    """
    check_tokens(
        logps_N=logps_N,
        advantages_N=advantages_N,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_weights=sampling_weights,
    )
    check_positive(delta=delta)
    for name, epsilon in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high)):
        if not epsilon >= 0:
            raise ValueError(f"{name} must be at least 0, got {epsilon}")
    if (beta != 0.0) != (ref_logps is not None):
        given = "was not given" if ref_logps is None else "was given"
        raise ValueError(f"ref_logps is needed exactly when beta is not 0, but beta={beta} and ref_logps {given}")
    return reference.policy_loss(
        logps_N,
        advantages_N,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampling_weights=sampling_weights,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        bias_correction_kl=bias_correction_kl,
    )
