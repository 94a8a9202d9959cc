"""Importance weights that correct for the sampler: vLLM drew the tokens from probabilities slightly off the trainer's.

Letters: N scored tokens, R rows.
Source: TRL 1.16 `vllm_importance_sampling_mode`; truncated: https://fengyao.notion.site/off-policy-rl, masked: IcePop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """`weights` [N] for the policy loss; `ratios` [R] or [N] and `differences` [N] (NaN: not reported) for metrics."""

    weights: Tensor
    ratios: Tensor
    differences: Tensor


def sampler_weights(
    logps_N: Tensor, sampling_logps_N: Tensor, rows_N: Tensor, correction: Correction
) -> SamplerWeights:
    """Weights of trainer's over sampler's probability.

    Args:
        logps_N: [N] fp32, the trainer's log-probs of the policy that sampled; not differentiated.
        sampling_logps_N: [N] fp32, what the sampler reported; NaN counts as no difference.
        rows_N: [N] int64, the row of each token, ascending; whole rows only.
        correction: Mode and bounds.
    """
    differences = logps_N.detach() - sampling_logps_N
    log_ratio = differences.nan_to_num(nan=0.0)
    token_row = None
    if correction.weighs_rows:
        unique_rows, token_row = torch.unique_consecutive(rows_N, return_inverse=True)
        log_ratio = torch.zeros_like(unique_rows, dtype=log_ratio.dtype).index_add(0, token_row, log_ratio)
    ratio = correction.bounded(log_ratio.exp())
    weights = ratio if token_row is None else ratio[token_row]
    return SamplerWeights(weights=weights, ratios=ratio, differences=differences.abs())
