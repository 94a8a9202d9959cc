"""Rewards beside generation: which runs can have them, and how a finished group gets to the reward functions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils import logging

from grpo_fast.generation import Engine, VLLMEngine
from grpo_fast.generation.base import GroupCallback
from grpo_fast.rewards.classifier import ModelReward
from grpo_fast.rewards.early import EarlyRewards
from grpo_fast.trainer.base import replaced_methods
from grpo_fast.trainer.rewarding import RewardTrainer
from grpo_fast.trainer.tool_loop import ToolTrainer

logger = logging.get_logger(__name__)

MODELS = (nn.Module, ModelReward)


class OverlapTrainer(ToolTrainer, RewardTrainer):
    """The part of `GRPOTrainer` that honours `overlap_rewards`."""

    engine: Engine
    rollout_func: Any
    num_generations: int
    num_generations_eval: int
    _early_inputs: list[dict[str, Any]]

    @contextmanager
    def _rewards_overlapped(self, inputs: list[dict[str, Any]]) -> Iterator[None]:
        """Within, groups of these rows are scored as soon as they are generated, if the run asks for it and can."""
        if not self.args.overlap_rewards:
            yield
            return
        obstacle = self._overlap_obstacle()
        if obstacle is not None:
            logger.warning_once(f"overlap_rewards=True has no effect, functions are called once a batch: {obstacle}")
            yield
            return
        functions = {
            place: (function, name)
            for place, (function, _, name) in enumerate(self._reward_sources())
            # a model would wait for the device
            if not isinstance(function, MODELS)
        }
        self._early_inputs = inputs
        with EarlyRewards(functions, self.accelerator.device) as self._early_rewards:
            try:
                yield
            finally:
                self._early_rewards = None

    def _overlap_obstacle(self) -> str | None:
        """Why this run's rewards must wait for the whole batch, or None."""
        replaced = replaced_methods(self, OVERLAP_SEAMS)
        if not isinstance(self.engine, VLLMEngine):
            return f"the engine is {self.engine.name}, not vLLM in this process"
        if self.args.vllm_tensor_parallel_size > 1:
            return "groups of several processes end together (vllm_tensor_parallel_size)"
        if self.rollout_func is not None:
            return "rollout_func generates"
        if self.tools or self.toolbox is not None:
            return "tools and environments act after a completion"
        if self._is_vlm:
            return "the prompts may have images"
        if replaced:
            return f"{', '.join(replaced)} of {type(self).__name__} may change what is scored"
        if all(isinstance(function, MODELS) for function in self.reward_funcs):
            return "all rewards come from models"
        return None

    def _group_callback(self, prompt_ids: list[list[int]]) -> GroupCallback | None:
        """What the engine tells of each finished group; None where nobody listens."""
        return None if self._early_rewards is None else functools.partial(self._score_early, prompt_ids)

    def _score_early(self, prompt_ids: list[list[int]], first_row: int, completion_ids: list[list[int]]) -> None:
        """Start the reward functions on the rows from `first_row` on, group by group."""
        assert self._early_rewards is not None
        num_generations = self.num_generations if self._mode == "train" else self.num_generations_eval
        # groups are counted over all processes and may begin in the one before; two of them may have one prompt
        offset = self.accelerator.process_index * len(self._early_inputs)
        rows = range(first_row, first_row + len(completion_ids))
        for _, group in itertools.groupby(rows, key=lambda row: (offset + row) // num_generations):
            members = list(group)
            start, stop = members[0], members[-1] + 1
            inputs = self._early_inputs[start:stop]
            prompts = [row["prompt"] for row in inputs]
            ids = completion_ids[start - first_row : stop - first_row]
            completions = self._decode(prompts, prompt_ids[start:stop], ids)
            self._early_rewards.submit(self._reward_call(inputs, prompts, completions, ids, first_row=start))


# the seams that overlapped rewards go past, before anybody replaces them
OVERLAP_SEAMS: dict[str, Any] = {"_calculate_rewards": RewardTrainer._calculate_rewards}
