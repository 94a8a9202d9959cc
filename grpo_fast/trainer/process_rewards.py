"""Rewards of steps on their way to the loss: gathered, standardised, and added to the advantages of outcomes.

A token's advantage is that of its completion's outcome rewards, plus for each process reward its weight times the sum
of the standardised rewards of the steps that end there or later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from grpo_fast.advantages import Advantages
from grpo_fast.rewards.steps import Steps, returns_steps
from grpo_fast.step_advantages import StepAdvantages, step_advantages
from grpo_fast.trainer.base import BaseTrainer


@dataclass(frozen=True, kw_only=True)
class GatheredSteps:
    """The steps of a generation, of all N completions of all processes.

    Attributes:
        parts: Each process reward's weight and its steps.
        lengths: [N] int64, the completions' tokens.
    """

    parts: list[tuple[float, StepAdvantages]]
    lengths: Tensor

    def of_tokens(self, rows: slice, width: int) -> Tensor:
        """What the steps add to the advantages of the tokens of some completions. [B, width] float64."""
        total = torch.zeros(rows.stop - rows.start, width, dtype=torch.float64)
        for weight, part in self.parts:
            total += weight * part.of_tokens(rows, width)
        return total

    @property
    def is_equal(self) -> Tensor:
        """[N] bool: the steps of the row's group are all as good, or do not count."""
        return torch.stack([part.is_equal | (weight == 0) for weight, part in self.parts]).all(0)


class ProcessRewardTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that turns rewards of steps into advantages of tokens."""

    reward_funcs: list[Any]
    reward_func_names: list[str]
    reward_weights: Tensor
    num_generations: int
    num_generations_eval: int
    scale_rewards: str
    # of this process's rows, by the name of the function, since the last call of reward functions
    _steps: dict[str, list[Steps]]
    _gathered_steps: GatheredSteps | None = None

    def _gather_steps(self, completion_ids: list[list[int]]) -> None:
        """Collect what the process rewards said of a generation; collective, if there are any.

        Raises:
            ValueError: If they were called for other completions than these, as by a `_calculate_rewards` that calls
                its parent for parts of a batch.
        """
        self._gathered_steps = None
        places = [i for i, function in enumerate(self.reward_funcs) if returns_steps(function)]
        if not places:
            return
        by_function = [self._steps.get(self.reward_func_names[i], []) for i in places]
        for i, rows in zip(places, by_function, strict=True):
            if len(rows) != len(completion_ids):
                raise ValueError(
                    f"reward function {self.reward_func_names[i]!r} gives rewards of steps, so it must be called for "
                    f"all {len(completion_ids)} completions of a batch at a time, by _calculate_rewards of the "
                    f"trainer; the last call had {len(rows)}"
                )
        num_generations = self.num_generations if self._mode == "train" else self.num_generations_eval
        gathered = gather_object(list(zip(map(len, completion_ids), *by_function, strict=True)))
        lengths, *by_function = (list(column) for column in zip(*gathered, strict=True))
        self._gathered_steps = GatheredSteps(
            parts=[
                (
                    float(self.reward_weights[i]),
                    step_advantages(rows, num_generations=num_generations, scale_rewards=self.scale_rewards),
                )
                for i, rows in zip(places, by_function, strict=True)
            ],
            lengths=torch.tensor(lengths),
        )

    def _outcomes(self, rewards: Tensor) -> Tensor:
        """Rewards [N, functions] with NaN for the functions that give rewards of steps."""
        is_process = torch.tensor([returns_steps(function) for function in self.reward_funcs], device=rewards.device)
        return rewards.masked_fill(is_process, torch.nan) if is_process.any() else rewards

    def _shown(self, result: Advantages) -> Advantages:
        """Outcome advantages [N] as metrics and the completions table have them: with the mean of a row's tokens."""
        steps = self._gathered_steps
        if steps is None or len(steps.lengths) != len(result.advantages):
            return result
        width = int(steps.lengths.max()) if len(steps.lengths) else 0
        of_tokens = steps.of_tokens(slice(0, len(steps.lengths)), width)
        means = of_tokens.sum(1) / steps.lengths.clamp(min=1)
        is_zero = (result.is_std_zero | result.rewards.isnan()) & steps.is_equal
        return replace(result, advantages=result.advantages + means.to(result.advantages), is_std_zero=is_zero)

    def _with_steps(self, advantages: Tensor, width: int) -> Tensor:
        """This process's advantages [B]; with process rewards those of its tokens, [B, width]."""
        steps, self._gathered_steps = self._gathered_steps, None
        if steps is None:
            return advantages
        start = self.accelerator.process_index * len(advantages)
        of_tokens = steps.of_tokens(slice(start, start + len(advantages)), width)
        return advantages[:, None] + of_tokens.to(advantages)
