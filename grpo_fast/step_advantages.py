"""Advantages of tokens from rewards of steps.

    z = (r - mean(R)) / (std(R) + 1e-4),   A_t = sum of z over the steps that end at token t or after it

R has the rewards of all steps of all completions of the group. Source: DeepSeekMath (arXiv:2402.03300), section 4.1.3;
the std is the sample's and has 1e-4 added, as TRL's of outcomes.

Letters: N completions over all processes, G completions a prompt (consecutive), S steps of all of them, B rows of this
process, C padded completion length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.advantages import EPS


@dataclass(frozen=True, kw_only=True)
class StepAdvantages:
    """The standardised rewards of one function's steps.

    Attributes:
        rows: [S] int64, the completion of each step.
        ends: [S] int64, how many tokens there are up to its end.
        values: [S] float64; exactly 0 in groups whose steps have equal rewards.
        is_equal: [N] bool, whether the row's group has no two steps with different rewards.
    """

    rows: Tensor
    ends: Tensor
    values: Tensor
    is_equal: Tensor

    def of_tokens(self, rows: slice, width: int) -> Tensor:
        """Advantages of the tokens of consecutive completions. [B, width] float64.

        Args:
            rows: Their places among the N.
            width: C.
        """
        is_here = (self.rows >= rows.start) & (self.rows < rows.stop)
        ending = torch.zeros(rows.stop - rows.start, width, dtype=torch.float64)
        places = (self.rows[is_here] - rows.start, self.ends[is_here] - 1)
        ending.index_put_(places, self.values[is_here], accumulate=True)
        return ending.flip(1).cumsum(1).flip(1)


def step_advantages(
    steps: Sequence[Sequence[tuple[int, float]]], *, num_generations: int, scale_rewards: str
) -> StepAdvantages:
    """Standardise the rewards of steps within their groups.

    Args:
        steps: For each of the N completions, the ends and rewards of its steps, possibly none.
        num_generations: G.
        scale_rewards: The std is that of the "group", of all steps of the "batch", or "none" divides. The mean is the
            group's.
    """
    rows = torch.tensor([row for row, some in enumerate(steps) for _ in some], dtype=torch.int64)
    ends = torch.tensor([end for some in steps for end, _ in some], dtype=torch.int64)
    rewards = torch.tensor([value for some in steps for _, value in some], dtype=torch.float64)
    values = torch.zeros_like(rewards)
    is_equal = torch.ones(len(steps), dtype=torch.bool)
    batch_std = _std(rewards)
    for start in range(0, len(steps), num_generations):
        of_group = (rows >= start) & (rows < start + num_generations)
        some = rewards[of_group]
        if some.numel() == 0 or some.min() == some.max():
            continue
        is_equal[start : start + num_generations] = False
        std = {"group": _std(some), "batch": batch_std}.get(scale_rewards)
        values[of_group] = (some - some.mean()) / (1.0 if std is None else std + EPS)
    return StepAdvantages(rows=rows, ends=ends, values=values, is_equal=is_equal)


def _std(values: Tensor) -> Tensor:
    return values.std() if values.numel() > 1 else torch.zeros((), dtype=values.dtype)
