"""Which groups have no signal: the policy loss cannot tell their completions apart.

The advantages say it: a group is silent if none of its tokens in the loss has one other than 0 (`silent_groups`),
whoever computed them, and also if rewards differ but every completion with an advantage is masked.

For that, groups of equal rewards (`equal_rewards`) need exact zeros, which fp32 does not give: the mean of eight times
0.1 is not 0.1, and `normalize_then_sum` subtracts the rounded mean of a batch. What is left over is noise, blown up by
the division by a std of 0 plus 1e-4.

Letters: B rows, G completions a prompt (consecutive rows), C padded completion length, N rows of all processes,
K reward functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_fast.advantages import weighted_rewards


def in_loss(batch: dict[str, Any]) -> Tensor:
    """The tokens of a padded dict that count in the loss, other than 0. [B, C]."""
    mask: Tensor = batch["completion_mask"] * batch.get("tool_mask", 1)
    return mask


def check_rows(batch: dict[str, Any], num_rows: int, num_generations: int) -> None:
    """Refuse a padded dict that has other rows than were asked for, so that groups cannot be told (ValueError)."""
    for name in ("completion_mask", "advantages"):
        value = batch.get(name)
        if not isinstance(value, Tensor) or len(value) != num_rows:
            found = f"{len(value)} rows" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"dynamic_sampling_rounds replaces whole groups, of num_generations={num_generations} rows each, in "
                f"what _generate_and_score_completions returns: its {name} must be a tensor of {num_rows} rows, one "
                f"for each that it was given; it is {found}"
            )


def silent_groups(batch: dict[str, Any], num_generations: int) -> Tensor:
    """Which groups have no token in the loss with an advantage other than 0. [B / G] bool.

    Args:
        batch: A padded dict; `advantages` are of rows, [B], or of tokens, [B, 1] or [B, C].
        num_generations: G.
    """
    advantages = batch["advantages"]
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    has_signal_B = ((advantages != 0) & in_loss(batch).bool()).any(1)
    return ~has_signal_B.view(-1, num_generations).any(1)


def equal_rewards(rewards_NK: Tensor, weights_K: Tensor, *, num_generations: int, aggregation: str) -> Tensor:
    """Which groups have rewards that give no row an advantage over another. [N / G] bool.

    Args:
        rewards_NK: [N, K] fp32; NaN where a function did not apply.
        weights_K: [K] fp32.
        num_generations: G.
        aggregation: "sum_then_normalize": the weighted sums of the rows that something scored are equal, but for the
            rounding of sums. "normalize_then_sum": every function with a weight gave the same to all rows that it
            scored. There equal sums are not enough, because each function is divided by a std of its own.
    """
    K = rewards_NK.shape[1]
    slack = torch.zeros((), dtype=torch.float64)
    if aggregation == "normalize_then_sum":
        values = rewards_NK[:, weights_K != 0]
    else:
        values = weighted_rewards(rewards_NK, weights_K)[:, None]
        if K > 1:
            # two sums of K rounded products
            sizes = (rewards_NK * weights_K).nan_to_num(nan=0.0).abs().double().sum(1)
            slack = K * torch.finfo(torch.float32).eps * sizes.view(-1, num_generations).amax(1, keepdim=True)
    groups = values.double().view(-1, num_generations, values.shape[1])
    highest = torch.where(groups.isnan(), -torch.inf, groups).amax(1)
    lowest = torch.where(groups.isnan(), torch.inf, groups).amin(1)
    return (highest <= lowest + slack).all(1)
