"""Rewards of a generation batch: functions and models called one after another, async functions side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Coroutine
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_fast.data import is_conversational
from grpo_fast.profiling import profiling_context, profiling_decorator, report_seconds
from grpo_fast.reference import inference_config
from grpo_fast.rewards.calling import RewardCall, call, call_async, checked, failure, gather, is_async
from grpo_fast.rewards.early import EarlyRewards
from grpo_fast.rewards.models import MAX_TOKENS, longest_text, reward_texts, score_texts
from grpo_fast.rewards.steps import returns_steps
from grpo_fast.trainer.process_rewards import ProcessRewardTrainer

logger = logging.getLogger(__name__)

# columns that reward functions get under other names
RESERVED = ("prompt", "completion", "completion_ids")


class RewardTrainer(ProcessRewardTrainer):
    """The part of `GRPOTrainer` that scores completions, and collects what reward functions log.

    The attributes are read at every batch: users may replace functions, names and processing classes in a run.
    """

    reward_funcs: list[Any]
    reward_func_names: list[str]
    reward_processing_classes: list[Any]
    environments: list[Any] | None
    chat_template_kwargs: dict[str, Any]
    _metrics: dict[str, dict[str, list[float]]]
    _logs: Any
    _pending_extra_logs: dict[str, list[Any]]
    _pending_metrics: dict[str, list[float]]
    _early_rewards: EarlyRewards | None = None

    def _prepare_reward_models(self) -> None:
        """Place the reward models on this process's device, in evaluation mode."""
        for i, model in enumerate(self.reward_funcs):
            if isinstance(model, PreTrainedModel):
                self.reward_funcs[i] = self._prepared_reward_model(model).eval()
            elif isinstance(model, nn.Module):
                self.reward_funcs[i] = model.to(self.accelerator.device).eval()

    def _prepared_reward_model(self, model: PreTrainedModel) -> nn.Module:
        if not self.is_deepspeed_enabled:
            # placed on the device under FSDP, too, which would leave that to its wrapping
            return self.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)
        import deepspeed

        config = inference_config(self.accelerator.state.deepspeed_plugin.deepspeed_config, model.config)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        return engine

    @profiling_decorator
    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """Rewards of all processes' completions.

        Args:
            inputs: This process's rows of the data set, one a completion.
            prompts: Their prompts, text or messages.
            completions: The completions, text or messages.
            completion_ids_list: The completions' tokens.

        Returns:
            [N, functions] fp32 on the run's device, N over all processes; NaN where a function did not apply, and for
            all functions where one returned `DROP`; the mean where a function gives rewards of steps.

        Raises:
            RuntimeError: If a function raises; names the function, the step and, if it can be told, the row.
            ValueError: If a function returns something other than one finite number or None a completion, or the lists
                of functions, names and processing classes differ in length.
        """
        batch = self._reward_call(inputs, prompts, completions, completion_ids_list)
        columns = {} if self._early_rewards is None else self._early_columns(self._early_rewards, batch)
        pending: dict[int, Coroutine[Any, Any, Tensor]] = {}
        for i, (function, processing_class, name) in enumerate(self._reward_sources()):
            if i in columns:
                continue
            if isinstance(function, nn.Module):
                with profiling_context(self, name):
                    columns[i] = self._model_rewards(function, processing_class, name, batch)
            elif is_async(function):
                pending[i] = self._timed(function, name, batch)
            else:
                with profiling_context(self, name):
                    columns[i] = call(function, name, batch)
        columns |= zip(pending, gather(list(pending.values())), strict=True)
        rewards = torch.stack([columns[i] for i in sorted(columns)], dim=1)
        # one function's DROP: no other scores the completion either
        is_dropped = rewards.isinf().any(dim=1)
        rewards[is_dropped] = math.nan
        self._steps = {
            name: [[] if drop else some for some, drop in zip(steps, is_dropped.tolist(), strict=True)]
            for name, steps in batch.steps.items()
        }
        self._warn_of_unscored(rewards, batch)
        return self.accelerator.gather(rewards.to(self.accelerator.device))

    def _reward_call(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
        *,
        first_row: int | None = None,
    ) -> RewardCall:
        rows = {name: [row[name] for row in inputs] for name in inputs[0] if name not in RESERVED}
        rows |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list}
        if self.environments is not None:
            rows["environments"] = self.environments
        return RewardCall(
            rows=rows,
            shared={
                "trainer_state": self.state,
                "log_extra": self._log_completion_extra,
                "log_metric": self._log_metric,
            },
            step=self.state.global_step,
            first_row=first_row,
            errors=self.args.reward_errors,
            steps={name: [] for function, _, name in self._reward_sources() if returns_steps(function)},
        )

    def _early_columns(self, early: EarlyRewards, batch: RewardCall) -> dict[int, Tensor]:
        """The rewards of functions that were called beside generation; what they logged goes where it belongs."""
        columns: dict[int, Tensor] = {}
        for place, name, scores in early.results():
            columns[place] = torch.cat([score.rewards for score in scores])
            if name in batch.steps:
                batch.steps[name] = [steps for score in scores for steps in score.steps or []]
            assert len(columns[place]) == batch.num_rows, "a group was not scored"
            report_seconds(self, name, sum(score.seconds for score in scores))
            for column in dict.fromkeys(column for score in scores for column in score.extra):
                fitted = (_fitted(column, score.extra.get(column, []), len(score.rewards)) for score in scores)
                self._log_completion_extra(column, [value for values in fitted for value in values])
            for metric, value in (pair for score in scores for pair in score.metrics):
                self._log_metric(metric, value)
        return columns

    def _reward_sources(self) -> list[tuple[Any, Any, str]]:
        lists = (self.reward_funcs, self.reward_processing_classes, self.reward_func_names)
        if len({len(values) for values in lists}) > 1:
            raise ValueError(
                "reward_funcs, reward_processing_classes and reward_func_names must have one entry a function: "
                f"they have {', '.join(str(len(values)) for values in lists)}"
            )
        return list(zip(*lists, strict=True))

    async def _timed(self, function: Any, name: str, batch: RewardCall) -> Tensor:
        with profiling_context(self, name):
            return await call_async(function, name, batch)

    def _model_rewards(self, model: nn.Module, processing_class: Any, name: str, batch: RewardCall) -> Tensor:
        try:
            texts = reward_texts(
                list(batch.rows["prompts"]),
                list(batch.rows["completions"]),
                processing_class,
                is_conversational=is_conversational({"prompt": batch.rows["prompts"][0]}),
                chat_template_kwargs=self.chat_template_kwargs,
            )
            device = self.accelerator.device
            # as many passes in every process: ZeRO-3 gathers the weights in each
            longest = self.accelerator.gather(
                torch.tensor([longest_text(texts, processing_class)], device=device)
            ).max()
            rows_per_batch = max(1, MAX_TOKENS // max(1, int(longest)))
            scores = score_texts(model, processing_class, texts, rows_per_batch=rows_per_batch, device=device)
        except Exception as error:
            raise failure(name, batch, error) from error
        return checked(scores, name, batch)

    def _warn_of_unscored(self, rewards: Tensor, batch: RewardCall) -> None:
        unscored = rewards.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            row = {name: values[unscored[0]] for name, values in batch.rows.items()}
            logger.warning(
                "all reward functions returned None for %d of %d completions; their advantage is 0; the first: %.2000r",
                len(unscored),
                len(rewards),
                row,
            )

    def _log_completion_extra(self, column: str, values: list[Any]) -> None:
        """`log_extra` of reward functions: a column of the completions table, one value a completion."""
        self._pending_extra_logs[column].extend(values)

    def _log_metric(self, name: str, value: float) -> None:
        """`log_metric` of reward functions: a metric, averaged over the calls of a generation and over processes."""
        self._pending_metrics[name].append(float(value))

    def _flush_user_logs(self, num_rows: int) -> None:
        """Hand on what reward functions logged for a batch; collective, in one order of names in all processes.

        Args:
            num_rows: Completions of this process. A column that was logged with another number of values, or in an
                earlier batch only, is filled with None, so that the rows of the table stay together.
        """
        known = self._logs["extra"]
        for name in sorted({*known, *gather_object(list(self._pending_extra_logs))}):
            known[name].extend(gather_object(_fitted(name, self._pending_extra_logs.get(name, []), num_rows)))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            self._metrics[self._mode][name].append(math.fsum(values) / len(values))
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()


def _fitted(column: str, values: list[Any], num_rows: int) -> list[Any]:
    """One value a row of what a reward function logged for `column`, with None where it logged none."""
    if values and len(values) != num_rows:
        logger.warning("log_extra(%r) got %d values for %d completions", column, len(values), num_rows)
    return [*values[:num_rows], *[None] * (num_rows - len(values))]
