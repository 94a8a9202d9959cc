"""Rollouts in rounds: dynamic sampling (DAPO, arXiv:2503.14476, section 3.2).

A training rollout with groups that have no signal (`grpo_fast.refill.groups`) is followed by rollouts of as many
further prompts as there are such groups, through the same seam, until none is left or `dynamic_sampling_rounds` have
passed. Useful groups of these take the places of silent ones. Metrics are of all rows that were rolled out, for the
kept ones are chosen by their rewards.

Each process fills its own places, with whole groups. All roll out as many prompts as the one that misses most, because
in a rollout processes exchange tensors of equal sizes.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from grpo_fast.advantages import Advantages
from grpo_fast.data import Prompt
from grpo_fast.metrics import RowMean
from grpo_fast.refill import (
    Entries,
    PromptPass,
    can_merge,
    check_rows,
    equal_rewards,
    in_loss,
    replace_rows,
    silent_groups,
)
from grpo_fast.trainer.base import replaced_methods
from grpo_fast.trainer.dataloaders import DataTrainer
from grpo_fast.trainer.rollouts import RolloutTrainer

logger = logging.getLogger(__name__)

PLACE_FILE = "dynamic_sampling.json"
# methods whose override may choose the training rows, as they are before anybody replaces them
DATA_SEAMS = {name: getattr(DataTrainer, name) for name in ("_get_train_sampler", "get_train_dataloader")}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What `_advantages` was given, rewards [N, K] of all processes, and gave, advantages [B]; on the host."""

    rewards: Tensor
    advantages: Tensor


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """This process's rows, after one round or several.

    Attributes:
        batch: The padded dict.
        rewards: [B, K] fp32 on the host, NaN where a function did not apply or they are not known.
        is_own: [B] bool on the host: whether the row's advantage is the one that its rewards gave.
        is_silent: [groups] bool on the host.
        seen: [N, K] for each round: the rewards of all its rows, of all processes.
    """

    batch: dict[str, Any]
    rewards: Tensor
    is_own: Tensor
    is_silent: Tensor
    seen: tuple[Tensor, ...]


class RefillTrainer(RolloutTrainer):
    """The part of `GRPOTrainer` that puts useful groups in the place of those without a signal."""

    shuffle_dataset: bool | None
    # of the round that is going on; None outside of one
    _scored: list[Scored] | None = None
    _further_prompts: PromptPass | None = None
    # the data set that they are of
    _further_source: Any = None
    # where a pass over it begins; None at its start
    _further_place: dict[str, int] | None = None

    def _timed_rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        limit = self.args.dynamic_sampling_rounds
        if self._mode == "eval" or not limit:
            return super()._timed_rollout(inputs)
        # the table is of this rollout alone, however many rounds the last one had
        self._logs.clear_rows()
        entries = Entries(self._metrics["train"])
        first = rollout = self._round(inputs, entries)
        while len(rollout.seen) <= limit and (missing := self._most_missing(rollout)):
            rollout = self._refilled(rollout, self._round(self._further_rows(missing), entries))
        entries.pool()
        return self._settled(first, rollout)

    # -- a round -------------------------------------------------------------------------------------------------------

    def _round(self, inputs: list[dict[str, Any]], entries: Entries) -> Rollout:
        """Roll out rows, the completions of each prompt side by side."""
        self._scored = []
        try:
            batch = super()._timed_rollout(inputs)
        finally:
            scored, self._scored = self._scored, None
        B, G = len(inputs), self.num_generations
        check_rows(batch, B, G)
        seen = torch.full((B * self.accelerator.num_processes, len(self.reward_funcs)), torch.nan)
        is_own = torch.zeros(B, dtype=torch.bool)
        counts: dict[str, int] = {}
        # a subclass may generate otherwise, or in parts: then it alone knows whose rewards are whose
        if len(scored) == 1 and len(scored[0].advantages) == B:
            seen, advantages = scored[0].rewards, batch["advantages"].cpu()
            counts = self._num_scored(seen)
            if advantages.shape == scored[0].advantages.shape:
                is_own = advantages == scored[0].advantages
        entries.end_round(len(seen), counts)
        return Rollout(
            batch=batch,
            rewards=self._own_rows(seen),
            is_own=is_own,
            is_silent=silent_groups(batch, G).cpu(),
            seen=(seen,),
        )

    def _advantages(self, rewards: Tensor, prompts: list[Prompt], completions: list[Any]) -> Tensor:
        advantages = super()._advantages(rewards, prompts, completions)
        if self._scored is not None:
            # a subclass may change them in place
            self._scored.append(Scored(rewards=rewards.cpu(), advantages=advantages.clone().cpu()))
        return advantages

    def _group_advantages(self, rewards: Tensor) -> Advantages:
        """With exact zeros, where refilling is on, for groups whose rewards are equal: a subclass may scale them."""
        result = super()._group_advantages(rewards)
        if self._mode == "eval" or not self.args.dynamic_sampling_rounds:
            return result
        is_equal = equal_rewards(
            self._outcomes(rewards),
            self.reward_weights.cpu(),
            num_generations=self.num_generations,
            aggregation=self.multi_objective_aggregation,
        )
        is_noise = is_equal.repeat_interleave(self.num_generations)
        return replace(result, advantages=result.advantages.masked_fill(is_noise, 0.0))

    def _num_scored(self, rewards: Tensor) -> dict[str, int]:
        """How many rows are behind the metrics of rewards, which leave out rows that a function did not score."""
        is_scored = ~rewards.isnan()
        counts = dict.fromkeys(("reward", "reward_std"), int(is_scored.any(1).sum()))
        for name, count in zip(self.reward_func_names, is_scored.sum(0).tolist(), strict=True):
            counts |= dict.fromkeys((f"rewards/{name}/mean", f"rewards/{name}/std"), count)
        return counts

    # -- further prompts -----------------------------------------------------------------------------------------------

    def _most_missing(self, rollout: Rollout) -> int:
        """The number of silent groups in the process that has most."""
        missing = torch.tensor([int(rollout.is_silent.sum())], device=self.accelerator.device)
        return int(self.accelerator.gather(missing).max())

    def _further_rows(self, num_prompts: int) -> list[dict[str, Any]]:
        """This process's rows of further prompts, prepared as the training loader's are."""
        dataset, collate = self.train_dataset, self.data_collator
        if self._further_prompts is None or self._further_source is not dataset:
            self._further_prompts = self._begin_further_prompts(dataset)
        if isinstance(dataset, IterableDataset):
            collate = self._get_collator_with_removed_columns(collate, description="Training")
        start = num_prompts * self.accelerator.process_index
        rows = self._further_prompts.take(
            num_prompts * self.accelerator.num_processes, slice(start, start + num_prompts), self.num_generations
        )
        return collate(rows)

    def _begin_further_prompts(self, dataset: Any) -> PromptPass:
        replaced = replaced_methods(self, DATA_SEAMS)
        if replaced:
            logger.warning(
                "dynamic_sampling_rounds takes further prompts from a pass of its own over train_dataset: %s of %s do "
                "not choose them",
                ", ".join(replaced),
                type(self).__name__,
            )
        place, self._further_place, self._further_source = self._further_place, None, dataset
        if place is None:
            assert self.args.generation_batch_size is not None
            # in the data's own order the first generation has just had the first prompts
            offset = 0 if self.shuffle_dataset else self.args.generation_batch_size // self.num_generations
            place = {"epoch": 0, "offset": offset}
        if not isinstance(dataset, IterableDataset):
            dataset = self._remove_unused_columns(dataset, description="Training")
        return PromptPass(dataset, seed=self.args.seed, shuffle=bool(self.shuffle_dataset), **place)

    def _save_rollout(self, folder: Path) -> None:
        """Write, too, where the further prompts stand: in all processes at the same place."""
        super()._save_rollout(folder)
        place = self._further_place if self._further_prompts is None else self._further_prompts.place
        if place is not None and self.args.should_save:
            (folder / PLACE_FILE).write_text(json.dumps(place))

    def _load_rollout(self, folder: Path) -> None:
        super()._load_rollout(folder)
        path = folder / PLACE_FILE
        self._further_prompts = None
        self._further_place = json.loads(path.read_text()) if path.is_file() else None

    # -- the batch -----------------------------------------------------------------------------------------------------

    def _refilled(self, rollout: Rollout, further: Rollout) -> Rollout:
        """A rollout with another's useful groups in the place of its silent ones, as many as there are of both."""
        groups = rollout.is_silent.nonzero().flatten().tolist()
        further_groups = (~further.is_silent).nonzero().flatten().tolist()
        seen = rollout.seen + further.seen
        if not (groups and further_groups and can_merge(rollout.batch, further.batch)):
            return replace(rollout, seen=seen)
        num_replaced = min(len(groups), len(further_groups))
        groups, further_groups = groups[:num_replaced], further_groups[:num_replaced]
        rows, further_rows = self._rows_of(groups), self._rows_of(further_groups)
        rewards, is_own, is_silent = rollout.rewards.clone(), rollout.is_own.clone(), rollout.is_silent.clone()
        rewards[rows], is_own[rows] = further.rewards[further_rows], further.is_own[further_rows]
        is_silent[groups] = False
        batch = replace_rows(rollout.batch, further.batch, rows, further_rows, pad_id=self._tokenizer.pad_token_id)
        return Rollout(batch=batch, rewards=rewards, is_own=is_own, is_silent=is_silent, seen=seen)

    def _rows_of(self, groups: list[int]) -> list[int]:
        return [group * self.num_generations + i for group in groups for i in range(self.num_generations)]

    def _settled(self, first: Rollout, rollout: Rollout) -> dict[str, Any]:
        """The batch, after what depends on all of it, and on all that was rolled out, has been brought up to date."""
        num_silent = int(rollout.is_silent.sum())
        num_tokens = in_loss(rollout.batch).sum() - in_loss(first.batch).sum()
        counts = torch.tensor([[int(first.is_silent.sum()) - num_silent, num_silent, int(num_tokens)]])
        counts = self.accelerator.gather(counts.to(self.accelerator.device)).sum(0)
        num_replaced, num_silent, num_tokens = counts.tolist()
        num_seen = sum(map(len, rollout.seen))
        metrics = self._metrics["train"]
        for name, value in (
            ("rounds", len(rollout.seen) - 1),
            ("groups_seen", num_seen // self.num_generations),
            ("groups_replaced", num_replaced),
            ("groups_silent", num_silent),
        ):
            metrics[f"dynamic_sampling/{name}"].append(float(value))
        batch = dict(rollout.batch)
        if "num_items_in_batch" in batch:
            batch["num_items_in_batch"] = batch["num_items_in_batch"] + num_tokens
        if self.scale_rewards == "batch" or self.multi_objective_aggregation == "normalize_then_sum":
            if num_replaced:
                rewards = self.accelerator.gather(rollout.rewards.to(self.accelerator.device)).cpu()
                own = self._own_rows(self._group_advantages(rewards).advantages)
                batch["advantages"] = _where(rollout.is_own, own, batch["advantages"])
            if metrics.get("frac_reward_zero_std"):
                is_std_zero = self._group_advantages(torch.cat(rollout.seen)).is_std_zero
                metrics["frac_reward_zero_std"][-1] = RowMean(is_std_zero.float().mean().item(), num_seen)
        return batch

    def _own_rows(self, values: Tensor) -> Tensor:
        """This process's part of what all processes have as many rows of."""
        num_rows = len(values) // self.accelerator.num_processes
        return values[num_rows * self.accelerator.process_index :][:num_rows]


def _where(is_chosen: Tensor, values: Tensor, others: Tensor) -> Tensor:
    """Values [B], on the host, for the chosen rows; `others` is of another shape only if none is chosen."""
    if not is_chosen.any():
        return others
    return torch.where(is_chosen.to(others.device), values.to(others), others)
