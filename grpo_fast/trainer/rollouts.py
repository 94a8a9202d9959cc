"""Rollouts: prompts to completions to rewards to advantages, in TRL's padded dict."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from grpo_fast.advantages import group_advantages, nanstd, weighted_rewards
from grpo_fast.attention import packed_attention
from grpo_fast.batch import Sampling
from grpo_fast.completions import CompletionLog
from grpo_fast.data import Prompt, is_conversational, tokenize_prompts
from grpo_fast.generation import Engine
from grpo_fast.metrics import PhaseTimer
from grpo_fast.rewards import RewardFunctions
from grpo_fast.rollout import length_metrics, padded_batch, shuffle_rows, split_rows
from grpo_fast.trainer.losses import LossTrainer

logger = logging.getLogger(__name__)


class RolloutTrainer(LossTrainer):
    """The half of `GRPOTrainer` that generates and scores completions."""

    engine: Engine
    timer: PhaseTimer
    sampling: Sampling
    reward_functions: RewardFunctions
    reward_func_names: list[str]
    reward_weights: Tensor
    num_generations: int
    num_generations_eval: int
    num_iterations: int
    steps_per_generation: int
    pad_to_multiple_of: int | None
    beta: float
    scale_rewards: str
    mask_truncated_completions: bool
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    ref_model: nn.Module | None
    _logs: CompletionLog
    _pending_metrics: dict[str, list[float]]
    _pending_extra_logs: dict[str, list[Any]]
    _step: int
    _last_loaded_step: int
    _buffered_inputs: list[dict[str, Any]] | None

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """The padded micro-batch: a slice of the buffered generation batch in training, a new one in evaluation."""
        if self._mode == "eval":
            return self._timed_rollout(generation_batch)
        generate_every = self.steps_per_generation * self.num_iterations
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            batch = shuffle_rows(self._timed_rollout(generation_batch))
            self._buffered_inputs = split_rows(batch, self.steps_per_generation)
        return self._buffered_inputs[self._step % self.steps_per_generation]

    def _timed_rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.timer.phase("generation"):
            return self._generate_and_score_completions(inputs)

    def sync_engine(self) -> None:
        """Bring the engine's weights up to date if the policy has changed since it last generated."""
        if self.state.global_step != self._last_loaded_step:
            with self.timer.phase("sync"):
                self.engine.update_weights(self.accelerator.unwrap_model(self.model))
            self._last_loaded_step = self.state.global_step

    def _generate(
        self, prompts: list[Prompt]
    ) -> tuple[list[list[int]], list[list[int]], list[Any], list[list[float]] | None]:
        """Prompt ids, completion ids, completions as text or messages, and the sampler's log-probs."""
        prompt_ids = tokenize_prompts(prompts, self.processing_class, self.chat_template_kwargs)
        self.sync_engine()
        generated = self.engine.generate(prompt_ids, self.sampling)
        completions: list[Any] = self.processing_class.batch_decode(generated.ids, skip_special_tokens=True)
        if is_conversational(prompts[0]):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        self._log_lengths(prompt_ids, generated.ids)
        return prompt_ids, generated.ids, completions, generated.logps

    def _log_lengths(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> None:
        columns = [[len(p), len(c), self._is_truncated(c)] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        gathered = self.accelerator.gather(torch.tensor(columns, device=self.accelerator.device)).cpu()
        metrics = self._metrics[self._mode]
        if self._mode == "train":
            self.state.num_input_tokens_seen += int(gathered[:, :2].sum())
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, value in length_metrics(gathered[:, 1], gathered[:, 2].bool()).items():
            metrics[name].append(value)

    def _is_truncated(self, completion_ids: list[int]) -> bool:
        ends = (*self.eos_token_ids, self.processing_class.pad_token_id)
        return not completion_ids or completion_ids[-1] not in ends

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Generate for the rows, score them, and return TRL's padded dict."""
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, completion_ids, completions, sampling_logps = self._generate(prompts)
        batch: dict[str, Any] = padded_batch(
            prompt_ids,
            completion_ids,
            sampling_logps,
            pad_token_id=self.processing_class.pad_token_id,
            multiple_of=self.pad_to_multiple_of,
            device=self.accelerator.device,
        )
        if self.mask_truncated_completions:
            is_kept = torch.tensor([not self._is_truncated(ids) for ids in completion_ids])
            batch["completion_mask"] = batch["completion_mask"] * is_kept[:, None].to(batch["completion_mask"])
        batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
        batch |= self._reference_points(batch)
        with self.timer.phase("rewards"):
            rewards = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        batch["advantages"] = self._advantages(rewards, prompts, completions)
        return batch

    def _reference_points(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probs of the policy that generated, where the loss pass does not give them, and of the reference."""
        points: dict[str, Tensor] = {}
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        arguments = (ids, mask, batch["completion_ids"].shape[1], self.args.per_device_train_batch_size)
        with self.timer.phase("scoring"), torch.no_grad(), packed_attention(self.model):
            # where each generation feeds whole optimizer steps, the loss pass runs the weights that generated
            is_aligned = not self.args.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations)
            if not is_aligned and self._mode == "train":
                points["old_per_token_logps"] = self._get_per_token_logps_and_entropies(self.model, *arguments)[0]
            if self.beta and self.ref_model is not None:
                with packed_attention(self.ref_model):
                    points["ref_per_token_logps"] = self._get_per_token_logps_and_entropies(self.ref_model, *arguments)[
                        0
                    ]
            elif self.beta:
                with self.accelerator.unwrap_model(self.model).disable_adapter():
                    points["ref_per_token_logps"] = self._get_per_token_logps_and_entropies(self.model, *arguments)[0]
        return points

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Prompt],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """Rewards of all processes, [N, functions] fp32, NaN where a function did not apply."""
        reserved = ("prompt", "completion", "completion_ids")
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in reserved}
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list, **columns}
        rewards = self.reward_functions(
            step=self.state.global_step,
            num_rows=len(prompts),
            arguments={
                **rows,
                "trainer_state": self.state,
                "log_extra": lambda column, values: self._pending_extra_logs[column].extend(values),
                "log_metric": lambda name, value: self._pending_metrics[name].append(value),
            },
            row_arguments=list(rows),
        )
        for row in rewards.isnan().all(dim=1).nonzero().flatten().tolist():
            logger.warning("no reward function scored row %d, completion %.200r", row, completions[row])
        return self.accelerator.gather(rewards.to(self.accelerator.device)).cpu()

    def _advantages(self, rewards: Tensor, prompts: list[Prompt], completions: list[Any]) -> Tensor:
        """This process's advantages [B], after logging what the rewards of all processes say."""
        result = group_advantages(
            rewards,
            self.reward_weights,
            num_generations=self.num_generations if self._mode == "train" else self.num_generations_eval,
            scale_rewards=self.scale_rewards,
            aggregation=self.args.multi_objective_aggregation,
        )
        metrics, logs = self._metrics[self._mode], self._logs
        for i, name in enumerate(self.reward_func_names):
            metrics[f"rewards/{name}/mean"].append(rewards[:, i].nanmean().item())
            metrics[f"rewards/{name}/std"].append(nanstd(rewards[:, i]).item())
            logs["rewards"][name].extend(rewards[:, i].tolist())
        totals = weighted_rewards(rewards, self.reward_weights)
        metrics["reward"].append(totals.nanmean().item())
        metrics["reward_std"].append(nanstd(totals).item())
        metrics["frac_reward_zero_std"].append(result.is_std_zero.float().mean().item())
        logs["prompt"].extend(gather_object(prompts))
        logs["completion"].extend(gather_object(completions))
        logs["advantages"].extend(result.advantages.tolist())
        self._flush_user_logs(len(prompts))
        start = self.accelerator.process_index * len(prompts)
        return result.advantages[start : start + len(prompts)].to(self.accelerator.device)

    def _flush_user_logs(self, num_prompts: int) -> None:
        """Gather what reward functions logged; sorted, so that all processes gather in one order."""
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * num_prompts)
            self._logs["extra"][column].extend(gather_object(values))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            self._metrics[self._mode][name].append(sum(values) / len(values))
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
