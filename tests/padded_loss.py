"""TRL 1.16's loss of a padded micro-batch as its formulae stand: the reference of the composition matrix.

In the type of its inputs, float64 for the truth; with the advantages of a whole row or of every token. Shares nothing
with the code under test.

Letters: B rows, C padded completion length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOG_WEIGHT_MIN, LOG_WEIGHT_MAX = math.log(1e-8), 20.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields of the config that the loss reads; VESPO's and SAPO's shapes are TRL's defaults."""

    loss_type: str
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    off_policy_mask_threshold: float | None = None
    importance_mode: str | None = None
    clip_min: float | None = None
    clip_max: float | None = None
    max_completion_length: int
    entropy_coef: float = 0.0
    router_aux_loss_coef: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is known of a micro-batch beside the policy's scores.

    Attributes:
        mask: [B, C] bool, the tokens in the loss.
        advantages: [B, 1] or [B, C].
        old_logps: [B, C], of the policy that generated.
        ref_logps: [B, C] or None.
        sampling_logps: [B, C], NaN where not reported, or None.
        num_items: Tokens in the loss of the generation batch over the number of processes.
        accumulation: Micro-batches of the optimizer step.
        steps_per_generation: Micro-batches of a generation.
        entropy_threshold: Tokens of a smaller entropy are left out of the policy term and the bonus.
    """

    mask: Tensor
    advantages: Tensor
    old_logps: Tensor
    ref_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    num_items: float
    accumulation: int
    steps_per_generation: int
    entropy_threshold: float = -math.inf


@dataclass(frozen=True)
class Loss:
    """0-dim each: the loss, which carries the gradient, and the sum of its summands' sizes, a bound of its rounding."""

    value: Tensor
    size: Tensor


def padded_loss(logps: Tensor, entropies: Tensor, aux_loss: Tensor | None, inputs: Inputs, settings: Settings) -> Loss:
    """The loss of a micro-batch, scaled for gradient accumulation.

    Args:
        logps: [B, C].
        entropies: [B, C].
        aux_loss: 0-dim or None.
        inputs: The rest of the micro-batch.
        settings: What it is trained for.
    """
    mask = inputs.mask.to(logps.dtype)
    log_ratio = logps - inputs.old_logps
    if settings.importance_sampling_level == "sequence":
        ratio = ((log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
    else:
        ratio = log_ratio.exp()
    weights = sampler_weights(inputs, settings)

    terms = policy_terms(logps, log_ratio, ratio, weights, inputs, settings)
    if settings.off_policy_mask_threshold is not None:
        terms = terms * is_on_policy(logps, inputs, settings.off_policy_mask_threshold)
    is_uncertain = (entropies.detach() >= inputs.entropy_threshold).to(logps.dtype)
    terms = terms * is_uncertain
    if weights is not None and settings.loss_type != "vespo":
        terms = terms * weights
    sizes = terms.abs()
    if settings.beta:
        assert inputs.ref_logps is not None
        delta = inputs.ref_logps - logps
        factor = settings.beta * (ratio if settings.use_bias_correction_kl else 1)
        terms = terms + factor * (delta.exp() - delta - 1)
        sizes = sizes + factor * (delta.exp() + delta.abs() + 1)

    token_weight = mask * token_weights(inputs, settings)
    loss, size = (terms * token_weight).sum(), (sizes * token_weight).sum()
    if settings.entropy_coef:
        counted = mask * is_uncertain
        bonus = settings.entropy_coef * entropies * counted / counted.sum().clamp(min=1) / inputs.accumulation
        loss, size = loss - bonus.sum(), size + bonus.sum()
    if aux_loss is not None and settings.router_aux_loss_coef:
        share = settings.router_aux_loss_coef * aux_loss / inputs.accumulation
        loss, size = loss + share, size + share
    return Loss(loss, size.detach())


def policy_terms(
    logps: Tensor, log_ratio: Tensor, ratio: Tensor, weights: Tensor | None, inputs: Inputs, settings: Settings
) -> Tensor:
    """[B, C] or [B, 1], before any mask."""
    advantages, loss_type = inputs.advantages, settings.loss_type
    if loss_type == "cispo":
        return -ratio.clamp(max=settings.epsilon_high).detach() * advantages * logps
    if loss_type == "sapo":
        temperature = torch.where(advantages > 0, 1.0, 1.05).to(logps.dtype)
        return -advantages * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    if loss_type == "vespo":
        return -gamma_weight(log_ratio.detach(), weights, inputs) * advantages * logps
    clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def gamma_weight(log_ratio: Tensor, weights: Tensor | None, inputs: Inputs) -> Tensor:
    """VESPO's, of a row's importance weight and the sign of the advantage. [B, 1] or [B, C]."""
    log_weight = (log_ratio.clamp(-20, 20) * inputs.mask).sum(1, keepdim=True)
    if weights is not None:
        log_weight = log_weight + weights.log().clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX).sum(1, keepdim=True)
    log_weight = log_weight.clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)
    is_good = inputs.advantages >= 0
    k, rate = (torch.where(is_good, *values).to(log_ratio.dtype) for values in ((2.0, 3.0), (3.0, 2.0)))
    return (rate + k * log_weight - rate * log_weight.exp()).exp()


def is_on_policy(logps: Tensor, inputs: Inputs, threshold: float) -> Tensor:
    """1 where a row stays in the policy term. [B, 1] or [B, C]."""
    return ((inputs.advantages >= 0) | (mean_drift(logps, inputs) <= threshold)).to(logps.dtype)


def mean_drift(logps: Tensor, inputs: Inputs) -> Tensor:
    """How much less probable than to the sampler, or else the old policy, a row's tokens are. [B, 1]."""
    reference = inputs.old_logps if inputs.sampling_logps is None else inputs.sampling_logps
    drift = (reference - logps.detach()).nan_to_num(nan=0.0) * inputs.mask
    return drift.sum(1, keepdim=True) / inputs.mask.sum(1, keepdim=True).clamp(min=1)


def sampler_weights(inputs: Inputs, settings: Settings) -> Tensor | None:
    """Of trainer's over sampler's probability. [B, C] or [B, 1]."""
    mode = settings.importance_mode
    if mode is None:
        return None
    assert inputs.sampling_logps is not None
    difference = ((inputs.old_logps - inputs.sampling_logps) * inputs.mask).nan_to_num(nan=0.0)
    weights = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    low = -math.inf if settings.clip_min is None else settings.clip_min
    high = math.inf if settings.clip_max is None else settings.clip_max
    if mode.endswith("truncate"):
        return weights.clamp(low, high)
    return torch.where((weights < low) | (weights > high), 0.0, weights)


def token_weights(inputs: Inputs, settings: Settings) -> Tensor | float:
    """What a token counts for. [B, 1] or a number."""
    num_rows, lengths = len(inputs.mask), inputs.mask.sum(1, keepdim=True).to(inputs.advantages.dtype)
    if settings.loss_type in ("grpo", "sapo"):
        return 1 / (lengths.clamp(min=1) * num_rows * inputs.accumulation)
    if settings.loss_type == "bnpo":
        return 1 / (max(lengths.sum().item(), 1) * inputs.accumulation)
    if settings.loss_type == "dr_grpo":
        return 1 / (num_rows * settings.max_completion_length * inputs.accumulation)
    if settings.loss_type == "luspo":
        return 1 / (num_rows * inputs.accumulation)
    return inputs.steps_per_generation / (inputs.num_items * inputs.accumulation)


def bounds_of(logps: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """How far each quantity is from a bound at which the gradient jumps: where rounding decides, that is 0. [...]."""
    mask = inputs.mask.double()
    log_ratio = (logps - inputs.old_logps) * mask
    if settings.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    bounds = [1 - settings.epsilon_low, 1 + settings.epsilon_high, settings.delta or 1 + settings.epsilon_high]
    if settings.loss_type == "cispo":
        bounds = [settings.epsilon_high]
    gaps = [(log_ratio.exp() - bound).abs().flatten() for bound in bounds]
    if settings.importance_mode is not None:
        unclipped = sampler_weights(inputs, replace(settings, clip_min=None, clip_max=None))
        assert unclipped is not None
        gaps += [(unclipped - bound).abs().flatten() for bound in (settings.clip_min, settings.clip_max) if bound]
    if settings.off_policy_mask_threshold is not None:
        gaps.append((mean_drift(logps, inputs) - settings.off_policy_mask_threshold).abs().flatten())
    return torch.cat(gaps)
