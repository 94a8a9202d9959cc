"""Advantages: how much better a completion is than its group, from rewards that may be missing (NaN).

Letters: N completions over all processes, G completions a prompt (consecutive), K reward functions.
Source: DeepSeekMath (arXiv:2402.03300) section 4.1; batch scaling: arXiv:2508.08221; GDPO: arXiv:2601.05242.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-4  # TRL's guard against a zero std


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """Advantages [N], the rewards [N] they come from (NaN: nothing scored the row), and which std was zero [N]."""

    advantages: Tensor
    rewards: Tensor
    is_std_zero: Tensor


def nanstd(tensor: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """Standard deviation with Bessel's correction over what is not NaN; NaN where fewer than two values are left."""
    count = torch.sum(~tensor.isnan(), dim=dim, keepdim=keepdim)
    squares = (tensor - tensor.nanmean(dim=dim, keepdim=True)).square()
    variance = squares.nanmean(dim=dim, keepdim=keepdim)
    # of one value: 0 times infinity
    return (variance * (count / (count - 1))).sqrt()


def weighted_rewards(rewards_NK: Tensor, weights_K: Tensor) -> Tensor:
    """The weighted sum over the functions that scored a row; NaN where none did. [N]."""
    rewards_N = (rewards_NK * weights_K).nansum(dim=1)
    return torch.where(rewards_NK.isnan().all(dim=1), torch.nan, rewards_N)


def group_advantages(
    rewards_NK: Tensor, weights_K: Tensor, *, num_generations: int, scale_rewards: str, aggregation: str
) -> Advantages:
    """Group-relative advantages.

    Args:
        rewards_NK: [N, K] fp32, groups of `num_generations` consecutive rows; NaN where a function did not apply.
        weights_K: [K] fp32.
        num_generations: G; 1 only in evaluation.
        scale_rewards: Divide by the std of the "group", of the whole "batch", or "none".
        aggregation: "sum_then_normalize", or "normalize_then_sum", which standardises each function within its group,
            sums, and standardises over the batch whatever `scale_rewards` says.

    Returns:
        Advantages, 0 for a row that nothing scored.
    """
    rewards_N = weighted_rewards(rewards_NK, weights_K)
    if aggregation == "normalize_then_sum":
        grouped = rewards_NK.view(-1, num_generations, rewards_NK.shape[1])
        std = nanstd(grouped, dim=1, keepdim=True) if num_generations > 1 else torch.zeros(())
        z_NK = ((grouped - grouped.nanmean(dim=1, keepdim=True)) / (std + EPS)).view(rewards_NK.shape)
        rewards_N = torch.where(rewards_NK.isnan().all(dim=1), torch.nan, (z_NK * weights_K).nansum(dim=1))
        centred, std_N, is_scaled = rewards_N - rewards_N.nanmean(), _batch_std(rewards_N), True
    else:
        groups = rewards_N.view(-1, num_generations)
        centred = (groups - groups.nanmean(dim=1, keepdim=True)).flatten()
        std_N = _batch_std(rewards_N) if scale_rewards == "batch" else _group_std(groups)
        is_scaled = scale_rewards != "none"
    advantages = centred / (std_N + EPS) if is_scaled else centred
    return Advantages(
        advantages=advantages.nan_to_num(nan=0.0),
        rewards=rewards_N,
        is_std_zero=torch.isclose(std_N, torch.zeros_like(std_N)),
    )


def _batch_std(rewards_N: Tensor) -> Tensor:
    return nanstd(rewards_N).expand_as(rewards_N) if rewards_N.numel() > 1 else torch.zeros_like(rewards_N)


def _group_std(groups: Tensor) -> Tensor:
    std = nanstd(groups, dim=1) if groups.shape[1] > 1 else torch.zeros(groups.shape[0], device=groups.device)
    return std.repeat_interleave(groups.shape[1])
