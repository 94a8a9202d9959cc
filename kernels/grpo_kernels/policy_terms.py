"""The policy loss, defined once: each token's share of the GRPO loss from its log-prob, as the papers write it.

autograd derives the slopes. Runs on any device and float dtype; the reference and torch's path are this, and the Triton
kernel is tested against it.
Shapes: N = tokens, all sequences one after the other.
Source: GRPO, DeepSeekMath (arXiv:2402.03300); clip-higher, DAPO (arXiv:2503.14476); two-sided clip, INTELLECT-2
(arXiv:2505.07291); bias-corrected KL and off-policy mask, DeepSeek-V3.2 (arXiv:2512.02556); CISPO, MiniMax-M1
(arXiv:2506.13585); GSPO (arXiv:2507.18071); SAPO (arXiv:2511.20347); LUSPO (arXiv:2602.05261); VESPO
(arXiv:2602.10693); entropy quantile (arXiv:2506.01939); the order, TRL 1.16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.options import MAX_LOG_WEIGHT, MIN_LOG_WEIGHT, PolicyOptions, Tokens


@dataclass(frozen=True)
class PolicyTotals:
    """What a `PolicyLoss` says to metrics, 0-dim each; `+` joins the totals of two parts of the tokens.

    Attributes:
        low_clipped: Number of tokens clipped at the low side.
        high_clipped: Number of tokens clipped at the high side.
        kl: Sum of the KL over the tokens; 0 without one.
        ratio_min: Smallest ratio; plus infinity of no tokens.
        ratio_max: Largest ratio; minus infinity of no tokens.
    """

    low_clipped: Tensor
    high_clipped: Tensor
    kl: Tensor
    ratio_min: Tensor
    ratio_max: Tensor

    def __add__(self, other: PolicyTotals) -> PolicyTotals:
        return PolicyTotals(
            low_clipped=self.low_clipped + other.low_clipped,
            high_clipped=self.high_clipped + other.high_clipped,
            kl=self.kl + other.kl,
            ratio_min=torch.minimum(self.ratio_min, other.ratio_min),
            ratio_max=torch.maximum(self.ratio_max, other.ratio_max),
        )


@dataclass(frozen=True)
class PolicyLoss:
    """What `policy_loss` returns: [N] each; only `loss` carries a gradient.

    Attributes:
        loss: Each token's share of the scalar loss, which is the sum of them.
        slope: Derivative of that sum in each log-prob.
        entropy_slope: Derivative of that sum in each entropy, or None without an entropy bonus.
        ratio: pi/pi_old before any clip; at sequence level each token has its sequence's.
        kl: The KL to the reference policy as it enters the loss before `beta`, or None without one.
        is_low_clipped: The advantage is negative and the ratio, cut at `delta`, lies below `1 - epsilon_low`;
            False for "cispo", "sapo" and "vespo".
        is_high_clipped: The advantage is positive and the ratio, cut at `delta`, lies above `1 + epsilon_high`, for
            "cispo" above `epsilon_high`; False for "sapo" and "vespo".
        phi: "vespo" only: the weight of the token's sequence, else None.
    """

    loss: Tensor
    slope: Tensor
    entropy_slope: Tensor | None
    ratio: Tensor
    kl: Tensor | None
    is_low_clipped: Tensor
    is_high_clipped: Tensor
    phi: Tensor | None

    def totals(self) -> PolicyTotals:
        """Sums and extremes over the tokens, like `ratio` in dtype."""
        ratio, none = self.ratio, self.ratio.numel() == 0
        return PolicyTotals(
            low_clipped=self.is_low_clipped.sum(dtype=ratio.dtype),
            high_clipped=self.is_high_clipped.sum(dtype=ratio.dtype),
            kl=ratio.new_zeros(()) if self.kl is None else self.kl.sum(),
            ratio_min=ratio.new_full((), math.inf) if none else ratio.amin(),
            ratio_max=ratio.new_full((), -math.inf) if none else ratio.amax(),
        )


def run_policy_loss(
    logps_N: Tensor, tokens: Tokens, options: PolicyOptions, *, entropies: Tensor | None = None
) -> PolicyLoss:
    """`policy_loss` of tokens and options in one piece each; slopes are there with and without grad mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            entropies = None if entropies is None else entropies.clone()
            return run_policy_loss(logps_N.clone(), tokens.clone(), options, entropies=entropies)
    has_grad = torch.is_grad_enabled()

    def differentiable(tensor: Tensor) -> Tensor:
        return tensor if has_grad and tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        inputs = (
            [differentiable(logps_N)] if entropies is None else [differentiable(logps_N), differentiable(entropies)]
        )
        terms = _policy_terms(inputs[0], tokens, options, None if entropies is None else inputs[1])
        inputs = inputs if tokens.entropy_weights is not None else inputs[:1]
        slopes = torch.autograd.grad(terms.loss.sum(), inputs, retain_graph=has_grad)
    has_gradient = has_grad and (logps_N.requires_grad or (entropies is not None and entropies.requires_grad))
    return PolicyLoss(
        loss=terms.loss if has_gradient else terms.loss.detach(),
        slope=slopes[0],
        entropy_slope=slopes[1] if len(slopes) == 2 else None,
        ratio=terms.ratio.detach(),
        kl=None if terms.kl is None else terms.kl.detach(),
        is_low_clipped=terms.is_low_clipped,
        is_high_clipped=terms.is_high_clipped,
        phi=terms.phi,
    )


class _Terms(NamedTuple):
    """As in `PolicyLoss`, with their graph."""

    loss: Tensor
    ratio: Tensor
    kl: Tensor | None
    is_low_clipped: Tensor
    is_high_clipped: Tensor
    phi: Tensor | None


def _policy_terms(logps: Tensor, tokens: Tokens, options: PolicyOptions, entropies: Tensor | None) -> _Terms:
    """Per-token terms in TRL 1.16's order: surrogate, masks, sampler's weights, KL, weights, entropy bonus."""
    advantages = tokens.advantages
    log_ratio = logps - (logps.detach() if tokens.old_logps is None else tokens.old_logps)
    sequences = _Sequences(tokens.sequence_ids) if tokens.sequence_ids is not None else None
    ratio = _ratio(log_ratio, sequences, options)
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)

    phi, low, high = None, -math.inf, math.inf
    if options.loss_type == "cispo":
        high = options.epsilon_high
        loss = -ratio.clamp(max=high).detach() * advantages * logps
    elif options.loss_type == "sapo":
        loss = -_soft_gate(ratio, advantages, options) * advantages
    elif options.loss_type == "vespo":
        phi = _vespo_weight(log_ratio.detach(), tokens, sequences, options)
        loss = -phi * advantages * logps
    else:
        low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
        loss = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)

    if options.off_policy_mask_threshold is not None:
        loss = loss * _is_on_policy(logps.detach(), tokens, sequences, options.off_policy_mask_threshold)
    keep = None
    if entropies is not None and tokens.entropy_threshold is not None:
        keep = (entropies.detach() >= tokens.entropy_threshold).to(loss.dtype)
        loss = loss * keep
    if tokens.sampling_weights is not None and options.loss_type != "vespo":
        loss = loss * tokens.sampling_weights
    kl = None
    if tokens.ref_logps is not None:
        kl = _kl(tokens.ref_logps - logps, options.kl_estimator)
        kl = kl * ratio if options.bias_correction_kl else kl
        loss = loss + options.beta * kl
    loss = loss * tokens.weights
    if entropies is not None and tokens.entropy_weights is not None:
        bonus = tokens.entropy_weights * entropies
        loss = loss - (bonus if keep is None else bonus * keep)
    is_low = (bounded.detach() < low) & (advantages < 0)
    is_high = (bounded.detach() > high) & (advantages > 0)
    return _Terms(loss, ratio, kl, is_low, is_high, phi)


class _Sequences:
    """Sums over the tokens of each sequence, handed back to each of its tokens; in a fixed order on every device."""

    def __init__(self, ids_N: Tensor) -> None:
        # as many sequences as tokens, the last ones empty: to count them would wait for the device
        changes = torch.zeros_like(ids_N)
        changes[1:] = ids_N[1:] != ids_N[:-1]
        self.member_N = changes.cumsum(0)
        self.lengths_S = torch.zeros_like(ids_N).index_add(0, self.member_N, torch.ones_like(ids_N))

    def sum(self, values_N: Tensor) -> Tensor:
        return _SequenceSum.apply(values_N, self.lengths_S, self.member_N)

    def mean(self, values_N: Tensor) -> Tensor:
        return self.sum(values_N) / self.lengths_S[self.member_N]


class _SequenceSum(torch.autograd.Function):
    """Being a symmetric matrix, it is its own derivative; indexing's derivative would add with atomics on CUDA."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, lengths_S: Tensor, member_N: Tensor) -> Tensor:
        ctx.save_for_backward(lengths_S, member_N)
        # the lengths are right by construction: to check them would wait for the device, and fails without tokens
        return torch.segment_reduce(values_N, "sum", lengths=lengths_S, unsafe=True)[member_N]

    @staticmethod
    def backward(ctx: Any, dsums_N: Tensor) -> tuple[Tensor, None, None]:
        return _SequenceSum.apply(dsums_N.contiguous(), *ctx.saved_tensors), None, None


def _ratio(log_ratio: Tensor, sequences: _Sequences | None, options: PolicyOptions) -> Tensor:
    """pi/pi_old of the token, or the geometric mean of its sequence's (GSPO)."""
    if options.is_sequence_level:
        assert sequences is not None
        log_ratio = sequences.mean(log_ratio)
    return torch.exp(log_ratio)


def _soft_gate(ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> Tensor:
    """SAPO: a sigmoid around ratio 1 instead of a clip, with slope 1 there."""
    temperature = torch.where(
        advantages > 0,
        _number(options.sapo_temperature_pos, ratio),
        _number(options.sapo_temperature_neg, ratio),
    )
    return torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature


def _vespo_weight(log_ratio: Tensor, tokens: Tokens, sequences: _Sequences | None, options: PolicyOptions) -> Tensor:
    """VESPO: e^lambda w^k e^(-lambda w) of the sequence's importance weight w, sampler's correction included."""
    assert sequences is not None
    log_weight = sequences.sum(log_ratio.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT))
    if tokens.sampling_weights is not None:
        log_weight = log_weight + sequences.sum(tokens.sampling_weights.log().clamp(MIN_LOG_WEIGHT, MAX_LOG_WEIGHT))
    log_weight = log_weight.clamp(MIN_LOG_WEIGHT, MAX_LOG_WEIGHT)
    is_pos = tokens.advantages >= 0
    k = torch.where(is_pos, _number(options.vespo_k_pos, log_ratio), _number(options.vespo_k_neg, log_ratio))
    rate = torch.where(
        is_pos, _number(options.vespo_lambda_pos, log_ratio), _number(options.vespo_lambda_neg, log_ratio)
    )
    log_phi = rate + k * log_weight - rate * log_weight.exp()
    return log_phi.exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _number(value: float, like: Tensor) -> Tensor:
    """A 0-dim tensor; filled on the device, where a copy from the host would wait."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _is_on_policy(logps: Tensor, tokens: Tokens, sequences: _Sequences | None, threshold: float) -> Tensor:
    """1 where the advantage is not negative or the sequence's mean log-ratio to the sampler is within the threshold."""
    assert sequences is not None
    sampling_logps = tokens.sampling_logps
    if sampling_logps is None:
        sampling_logps = logps if tokens.old_logps is None else tokens.old_logps
    kl = sequences.mean((sampling_logps - logps).nan_to_num(nan=0.0))
    return ((tokens.advantages >= 0) | (kl <= threshold)).to(logps.dtype)


def _kl(log_ratio: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) from log(reference / policy)."""
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.exp(log_ratio) - log_ratio - 1
