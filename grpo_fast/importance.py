"""How far the sampler's probabilities, from which vLLM drew the tokens, are off the trainer's, and weights against it.

Letters: N scored tokens, R rows.
Source: TRL 1.16 `vllm_importance_sampling_mode`; truncated: https://fengyao.notion.site/off-policy-rl, masked: IcePop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.batch import Runs

# of the differences, by linear interpolation between the two nearest
TAIL = 0.99


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How importance weights are formed.

    Attributes:
        mode: "token_..." weighs tokens, "sequence_..." whole rows by the product over their tokens; "..._truncate"
            clamps a weight into the bounds, "..._mask" sets it to 0 outside them.
        clip_min: Lower bound, or None.
        clip_max: Upper bound, or None.
    """

    mode: str
    clip_min: float | None
    clip_max: float | None

    @property
    def weighs_rows(self) -> bool:
        """One weight a row, not one a token."""
        return self.mode.startswith("sequence")

    def bounded(self, ratio: Tensor) -> Tensor:
        """Ratios of trainer's over sampler's probability as weights."""
        if self.mode.endswith("truncate"):
            return ratio.clamp(self.clip_min, self.clip_max)
        is_inside = torch.ones_like(ratio, dtype=torch.bool)
        if self.clip_min is not None:
            is_inside &= ratio >= self.clip_min
        if self.clip_max is not None:
            is_inside &= ratio <= self.clip_max
        return torch.where(is_inside, ratio, 0.0)


@dataclass(frozen=True, kw_only=True)
class SamplerWeights:
    """`weights` [N] for the policy loss; `ratios` [R] or [N] and the same `unclipped` for metrics."""

    weights: Tensor
    ratios: Tensor
    unclipped: Tensor


def sampler_weights(
    log_ratios_N: Tensor, runs: Runs, correction: Correction, some: slice = slice(None)
) -> SamplerWeights:
    """Weights of trainer's over sampler's probability.

    Args:
        log_ratios_N: [N] fp32, the trainer's log-probs of the policy that sampled minus what the sampler reported; NaN
            counts as no difference. Not differentiated.
        runs: The rows that the tokens belong to.
        correction: Mode and bounds.
        some: The tokens that `log_ratios_N` is of, whole rows only; then the ratios of other rows mean nothing.
    """
    log_ratio = log_ratios_N.detach().nan_to_num(nan=0.0)
    if not correction.weighs_rows:
        unclipped = log_ratio.exp()
        ratio = correction.bounded(unclipped)
        return SamplerWeights(weights=ratio, ratios=ratio, unclipped=unclipped)
    unclipped = runs.sums(log_ratio, some).exp()
    ratio = correction.bounded(unclipped)
    return SamplerWeights(weights=ratio[runs.member[some]], ratios=ratio, unclipped=unclipped)


def mismatch_metrics(log_ratios: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer, over the tokens of all processes.

    With r the trainer's over the sampler's probability of a token that the sampler drew:

    - `sampling/sampling_logp_difference/...` of |log r|: `mean` (the mean of the processes' means) and `max` are TRL's,
      `p99` is the 99th percentile as `numpy.percentile` has it.
    - `sampling/effective_sample_size`: (sum r)^2 / (N sum r^2), in (0, 1]: the share of the tokens that as many equally
      weighted ones would be worth, were all weighted by r, unclipped (Kong 1992; Owen, Monte Carlo, ch. 9.3).
    - `sampling/kl_sampler_trainer`: KL(sampler || trainer), the mean of r - 1 - log r.
    - `sampling/kl_trainer_sampler`: KL(trainer || sampler), the mean of r log r - r + 1. Both estimators are unbiased
      and no term is below 0 (http://joschu.net/blog/kl-approx.html).

    Args:
        log_ratios: [processes, tokens] fp32, log r; NaN where the sampler reported nothing or there is no token.

    Returns:
        With no log-prob reported, `mean` and `max` are 0, as in TRL, and the others NaN.
    """
    # MPS has no float64
    log_ratios = log_ratios.cpu() if log_ratios.device.type == "mps" else log_ratios
    is_reported = ~log_ratios.isnan()
    # float64: for log r = 1e-5 a term of the KL is 5e-11, and fp32 rounds r to 6e-8
    values = log_ratios[is_reported].double()
    names = ("mean", "max", "p99", "effective_sample_size", "kl_sampler_trainer", "kl_trainer_sampler")
    if values.numel() == 0:
        results = [0.0, 0.0, *[math.nan] * 4]
    else:
        differences = values.abs()
        process_means = log_ratios.double().abs().nansum(1) / is_reported.sum(1).clamp(min=1)
        # any factor cancels, and this one keeps exp finite
        weights = (values - values.amax()).exp()
        excess = values.expm1()
        scalars = (
            process_means.mean(),
            differences.amax(),
            _quantile(differences, TAIL),
            weights.sum().square() / (weights.square().sum() * values.numel()),
            (excess - values).mean(),
            (values * (excess + 1) - excess).mean(),
        )
        results = torch.stack(scalars).tolist()
    prefixes = ["sampling/sampling_logp_difference/"] * 3 + ["sampling/"] * 3
    return {prefix + name: value for prefix, name, value in zip(prefixes, names, results, strict=True)}


def _quantile(values: Tensor, share: float) -> Tensor:
    """`torch.quantile`, which takes no more than 2^24 values and sorts them all. 0-dim."""
    place = share * (values.numel() - 1)
    below = math.floor(place)
    # descending: the last is the value at `below`
    top = values.topk(values.numel() - below).values
    return torch.lerp(top[-1], top[max(top.numel() - 2, 0)], place - below)
