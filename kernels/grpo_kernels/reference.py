"""The specification: every op in plain PyTorch, as its paper writes it; autograd derives the gradients.

Runs on any device and float dtype. N tokens, D hidden width, V vocabulary. The loss of one token is in `policy_terms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.checks import operand_dtype
from grpo_kernels.normalisers import entropy_quantile
from grpo_kernels.options import PolicyOptions, Tokens
from grpo_kernels.policy_terms import PolicyLoss, PolicyTotals, run_policy_loss


@dataclass(frozen=True)
class LinearPolicyLoss:
    """What `linear_policy_loss` returns; only `loss` carries a gradient.

    Attributes:
        loss: 0-dim, the sum of the tokens' shares.
        logps: [N], the targets' log-probs.
        entropy: [N], of each token's softmax, in nat.
        terms: [N] each, the shares and what metrics want of each token.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    terms: PolicyLoss

    @property
    def totals(self) -> PolicyTotals:
        """Clipped tokens by side, the KL's sum, the range of the ratio."""
        return self.terms.totals()


def linear_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
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
        temperature = temperature[:, None].to(wide) if isinstance(temperature, Tensor) else temperature
        all_logps_NV = torch.log_softmax(logits_NV / temperature, dim=-1)
    logps_N = all_logps_NV.gather(1, targets_N[:, None])[:, 0]
    if not return_entropy:
        return logps_N
    return logps_N, -(all_logps_NV.exp() * all_logps_NV).sum(-1)


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
) -> PolicyLoss:
    """See `grpo_kernels.policy_loss`: the same with the slopes left to autograd."""
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
    return run_policy_loss(logps_N, tokens, options, entropies=entropies)


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
) -> LinearPolicyLoss:
    """See `grpo_kernels.linear_policy_loss`: `linear_logps`, `policy_loss` and a sum, differentiated by autograd."""
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
    return run_linear_policy_loss(
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


def run_linear_policy_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    tokens: Tokens,
    options: PolicyOptions,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    top_entropy_quantile: float,
) -> LinearPolicyLoss:
    """`linear_policy_loss` of tokens and options in one piece each."""
    logps_N, entropies_N = linear_logps(
        hidden_ND,
        weight_VD,
        targets_N,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        return_entropy=True,
    )
    if top_entropy_quantile < 1.0:
        threshold = entropy_quantile(entropies_N.detach(), top_entropy_quantile)
        tokens = replace(tokens, entropy_threshold=threshold)
    terms = run_policy_loss(logps_N, tokens, options, entropies=entropies_N)
    return LinearPolicyLoss(
        loss=terms.loss.sum(),
        logps=logps_N.detach(),
        entropy=entropies_N.detach(),
        terms=replace(terms, loss=terms.loss.detach()),
    )


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    shadows: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """See `grpo_kernels.adamw_step`: algorithm 2 of the paper, tensor by tensor, then the copies."""
    if found_inf is not None and found_inf.item() == 1:
        return
    beta1, beta2 = betas
    for i, (theta, m, v, t) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        wide = torch.promote_types(theta.dtype, torch.float32)
        t += 1
        g = grads[i].to(wide)
        if grad_scale is not None:
            g = g / grad_scale.reshape(())
            grads[i].copy_(g)
        if maximize:
            g = -g
        new_m = beta1 * m.to(wide) + (1 - beta1) * g
        new_v = beta2 * v.to(wide) + (1 - beta2) * g.square()
        m_hat = new_m / (1 - beta1 ** t.item())
        v_hat = new_v / (1 - beta2 ** t.item())
        decayed = theta.to(wide) * (1 - lr * weight_decay)
        theta.copy_(decayed - lr * m_hat / (v_hat.sqrt() + eps))
        m.copy_(new_m)
        v.copy_(new_v)
        if shadows is not None and (shadow := shadows[i]) is not None:
            shadow.copy_(theta)
