"""The specification: every op in plain PyTorch, as its paper writes it; autograd derives the gradients.

Runs on any device and float dtype. N tokens, D hidden width, V vocabulary.
Source: GRPO, DeepSeekMath (arXiv:2402.03300); clip-higher, DAPO (arXiv:2503.14476); two-sided clip, INTELLECT-2
(arXiv:2505.07291); bias-corrected KL, DeepSeek-V3.2 (arXiv:2512.02556).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.checks import operand_dtype


@dataclass(frozen=True)
class PolicyLoss:
    """What `policy_loss` returns: [N] each, neither masked nor reduced; only `loss` carries a gradient.

    Attributes:
        loss: The clipped surrogate, weighted by the sampler's importance weights, plus `beta` times the KL.
        ratio: pi/pi_old before any clip.
        kl: k3 estimate of the KL to the reference policy as it enters the loss, or None without one.
        is_low_clipped: The advantage is negative and the ratio lies below `1 - epsilon_low`.
        is_high_clipped: The advantage is positive and the ratio, cut at `delta`, lies above `1 + epsilon_high`.
    """

    loss: Tensor
    ratio: Tensor
    kl: Tensor | None
    is_low_clipped: Tensor
    is_high_clipped: Tensor


def linear_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `grpo_kernels.linear_logps`: the same values from materialised logits, in float32 at least."""
    operand = operand_dtype(hidden_ND, weight_VD, bias)
    wide = torch.promote_types(operand, torch.float32)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        hidden, weight = hidden_ND.to(operand).to(wide), weight_VD.to(operand).to(wide)
        logits_NV = F.linear(hidden, weight, None if bias is None else bias.to(operand).to(wide))
        logits_NV = logits_NV * logit_scale
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        all_logps_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    logps_N = all_logps_NV.gather(1, targets_N[:, None])[:, 0]
    if not return_entropy:
        return logps_N
    return logps_N, -(all_logps_NV.exp() * all_logps_NV).sum(-1)


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
    """See `grpo_kernels.policy_loss`, which is this function behind the checks of its arguments."""
    ratio_N = torch.exp(logps_N - (logps_N.detach() if old_logps is None else old_logps))
    clipped_N = ratio_N.clamp(1 - epsilon_low, 1 + epsilon_high)
    bounded_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    loss_N = -torch.minimum(bounded_N * advantages_N, clipped_N * advantages_N)
    if sampling_weights is not None:
        loss_N = loss_N * sampling_weights
    kl_N = None
    if ref_logps is not None:
        log_ratio_N = ref_logps - logps_N
        kl_N = torch.exp(log_ratio_N) - log_ratio_N - 1
        if bias_correction_kl:
            kl_N = kl_N * ratio_N
        loss_N = loss_N + beta * kl_N
    return PolicyLoss(
        loss=loss_N,
        ratio=ratio_N.detach(),
        kl=None if kl_N is None else kl_N.detach(),
        is_low_clipped=(bounded_N.detach() < 1 - epsilon_low) & (advantages_N < 0),
        is_high_clipped=(bounded_N.detach() > 1 + epsilon_high) & (advantages_N > 0),
    )
