"""Rollouts: prompts to completions to rewards to advantages, in TRL's padded dict."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from grpo_fast import multimodal
from grpo_fast.adapters import reference_adapter
from grpo_fast.advantages import Advantages, group_advantages, nanstd, weighted_rewards
from grpo_fast.completions import CompletionLog
from grpo_fast.data import Prompt, is_conversational, tokenize_prompts
from grpo_fast.host_rows import HostRows
from grpo_fast.loss import weigh_sampler
from grpo_fast.profiling import profiling_context, profiling_decorator
from grpo_fast.rollout import length_metrics, padded_batch, shuffle_sequence_dict, split_tensor_dict
from grpo_fast.trainer.losses import OWN, LossTrainer
from grpo_fast.trainer.overlap import OVERLAP_SEAMS, OverlapTrainer
from grpo_fast.trainer.proof import GENERATION_SEAMS, ProofTrainer
from grpo_fast.trainer.windows import WINDOW_SEAMS

# what a rollout function must return
ROLLOUT_KEYS = ("prompt_ids", "completion_ids", "logprobs")


class RolloutTrainer(ProofTrainer, LossTrainer, OverlapTrainer):
    """The part of `GRPOTrainer` that generates and scores completions."""

    rollout_func: Any
    num_generations: int
    num_generations_eval: int
    num_iterations: int
    pad_to_multiple_of: int | None
    scale_rewards: str
    multi_objective_aggregation: str
    reward_weights: Tensor
    mask_truncated_completions: bool
    log_multimodal: bool
    ref_model: nn.Module | None
    _logs: CompletionLog
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _encoded_images: tuple[list[Any] | None, dict[str, Any]]

    @profiling_decorator
    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's seam: the padded micro-batch, a slice of the buffered generation batch, or in evaluation a new one."""
        if self._mode == "eval":
            return self._timed_rollout(generation_batch)
        generate_every = self.steps_per_generation * self.num_iterations
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            batch = multimodal.split_pixel_values_by_grid(self._timed_rollout(generation_batch))
            slices = split_tensor_dict(shuffle_sequence_dict(batch), self.steps_per_generation)
            self._buffered_inputs = [multimodal.unsplit_pixel_values_by_grid(part) for part in slices]
            self._host_rows = [HostRows(part) for part in self._buffered_inputs]
        return self._buffered_inputs[self._step % self.steps_per_generation]

    def _timed_rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.timer.phase("generation"), self._rewards_overlapped(inputs):
            return self._generate_and_score_completions(inputs)

    @property
    def _total_train_tokens(self) -> int:
        return int(self.state.num_input_tokens_seen)

    # -- completions ---------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Prompt]) -> tuple[list[list[int]], list[Any] | None, dict[str, Any]]:
        """TRL's seam: prompts as ids, the images of each, and what the processor makes of them."""
        if self._is_vlm and is_conversational({"prompt": prompts[0]}):
            return multimodal.tokenize(
                prompts,
                self.processing_class,
                self.chat_template_kwargs,
                tools=[self._row_tools(i) for i in range(len(prompts))],
                chat_template=self.chat_template,
            )
        settings: dict[str, Any] = {
            "chat_template": self.chat_template,
            "max_prompt_length": self.args.max_prompt_length,
        }
        arguments = (self.processing_class, self.chat_template_kwargs)
        if self.environments is None:
            ids = tokenize_prompts(prompts, *arguments, tools=self.tools or None, **settings)
        else:
            one_by_one = (
                tokenize_prompts([prompt], *arguments, tools=self._row_tools(i), **settings)
                for i, prompt in enumerate(prompts)
            )
            ids = [row for rows in one_by_one for row in rows]
        return ids, None, {}

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list[Any] | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """TRL's seam: one completion per entry of `prompt_ids`, and the sampler's log-probs if it reports them.

        `num_generations`, entries that follow each other with one prompt, is found by the engine itself.
        """
        self.sync_engine()
        if multimodal_fields:
            multimodal_fields = multimodal.generation_fields(
                multimodal_fields, prompt_ids, self.processing_class, has_tool_images=has_tool_images
            )
        with profiling_context(self, f"{'vLLM' if self.use_vllm else 'transformers'}.generate"):
            drawn = self.engine.generate(
                prompt_ids,
                images=images,
                multimodal_fields=multimodal_fields or None,
                on_group=self._group_callback(prompt_ids),
            )
        return drawn.ids, drawn.logps

    def _generate(self, prompts: list[Prompt]) -> tuple[Any, ...]:
        """TRL's seam: from prompts to completions.

        Returns:
            prompt_ids, completion_ids, tool_mask or None, completions (text or messages), logprobs or None,
            extra_fields of a rollout function, images or None, tool_images.
        """
        # a rollout function or an overridden tool loop may append to them
        prompts = [prompt if isinstance(prompt, str) else [dict(message) for message in prompt] for prompt in prompts]
        extra_fields: dict[str, Any] = {}
        images: list[Any] | None = None
        fields: dict[str, Any] = {}
        tool_images: list[list[Any]] = []
        if self.rollout_func is not None:
            prompt_ids, completion_ids, logprobs, extra_fields = self._roll_out(prompts)
        else:
            prompt_ids, images, fields = self._tokenize_prompts(prompts)
            self._encoded_images = (images, fields)
            num_generations = self.num_generations if self._mode == "train" else self.num_generations_eval
            completion_ids, logprobs = self._generate_single_turn(prompt_ids, images, fields, num_generations)
        completions = self._decode(prompts, prompt_ids, completion_ids)
        tool_mask, calls, failures = extra_fields.pop("env_mask", None), 0, 0
        if self.tools:
            tool_mask, completions, completion_ids, logprobs, calls, failures, tool_images = self._tool_call_loop(
                prompts, prompt_ids, completion_ids, completions, logprobs, images, fields
            )
            images = multimodal.merged_images(images, tool_images)
        self._log_lengths(prompt_ids, completion_ids, tool_mask)
        if self.tools:
            self._log_tool_calls(len(prompts), calls, failures)
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images

    def _roll_out(self, prompts: list[Prompt]) -> tuple[Any, Any, Any, dict[str, Any]]:
        """What the user's rollout function generates."""
        if self.use_vllm:
            self.sync_engine()
        output = dict(self.rollout_func(prompts, self))
        missing = sorted(set(ROLLOUT_KEYS) - set(output))
        if missing:
            raise ValueError(f"rollout_func must return {', '.join(ROLLOUT_KEYS)}; {', '.join(missing)} is missing")
        prompt_ids, completion_ids, logprobs = (output.pop(key) for key in ROLLOUT_KEYS)
        for key, rows in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
            if len(rows) != len(prompts):
                raise ValueError(
                    f"rollout_func must return one list of {key} a prompt: {len(prompts)}, got {len(rows)}"
                )
        return prompt_ids, completion_ids, logprobs, output

    def _log_lengths(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], tool_mask: list[list[int]] | None
    ) -> None:
        """Count the tokens that the model wrote."""
        written = [len(ids) for ids in completion_ids] if tool_mask is None else [sum(mask) for mask in tool_mask]
        truncated = [self._is_truncated(ids) for ids in completion_ids]
        columns = [[len(p), n, t] for p, n, t in zip(prompt_ids, written, truncated, strict=True)]
        gathered = self.accelerator.gather(torch.tensor(columns, device=self.accelerator.device)).cpu()
        if not len(gathered):
            raise RuntimeError("the engine returned no completions; its log says why")
        metrics = self._metrics[self._mode]
        if self._mode == "train":
            self.state.num_input_tokens_seen += int(gathered[:, :2].sum())
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name, value in length_metrics(gathered[:, 1], gathered[:, 2].bool()).items():
            metrics[name].append(value)

    def _log_tool_calls(self, num_rows: int, calls: int, failures: int) -> None:
        counts = torch.tensor([[num_rows, calls, failures]], device=self.accelerator.device)
        rows, calls, failures = self.accelerator.gather(counts).sum(0).tolist()
        self._metrics[self._mode]["tools/call_frequency"].append(calls / rows)
        self._metrics[self._mode]["tools/failure_frequency"].append(failures / calls if calls else 0.0)

    def _is_truncated(self, completion_ids: list[int]) -> bool:
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        return not completion_ids or completion_ids[-1] not in ends

    # -- the padded dict -----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's seam: generate for the rows, score them, and return the padded dict."""
        prompts = self._prepare_environments(inputs)
        dataset_images = multimodal.images_of_rows(inputs)
        if dataset_images is not None and not self._is_vlm:
            raise ValueError(
                f"the rows have images, which a tokenizer cannot take: processing_class is "
                f"{type(self.processing_class).__name__}, pass the model's processor"
            )
        self._encoded_images = (None, {})
        if dataset_images is not None:
            prompts = [
                multimodal.prepare_multimodal_messages(messages, images=images)
                for messages, images in zip(_conversations(prompts), dataset_images, strict=True)
            ]
        with self._generating():
            prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = (
                self._generate(prompts)
            )
        images = dataset_images if images is None else images
        batch: dict[str, Any] = padded_batch(
            prompt_ids,
            completion_ids,
            logprobs,
            tool_mask,
            pad_token_id=self._tokenizer.pad_token_id,
            multiple_of=self.pad_to_multiple_of,
            device=self.accelerator.device,
        )
        if self.mask_truncated_completions:
            is_kept = torch.tensor([[not self._is_truncated(ids)] for ids in completion_ids])
            for name in {"completion_mask", "tool_mask"} & set(batch):
                batch[name] = batch[name] * is_kept.to(batch[name])
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        batch["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        if images is not None:
            # an overridden `_generate` may have encoded other images than it returns
            encoded_images, fields = self._encoded_images
            fields = multimodal.forward_fields(
                fields if encoded_images is images else {},
                batch,
                images,
                self.processing_class,
                tool_images=tool_images,
            )
            batch |= {k: v.to(self.accelerator.device) if isinstance(v, Tensor) else v for k, v in fields.items()}
        batch |= self._reference_points(batch, mask)
        inputs = _with_extra_fields(inputs, extra_fields)
        with self.timer.phase("rewards"):
            rewards = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        self._gather_steps(completion_ids)
        advantages = self._advantages(rewards, prompts, completions)
        batch["advantages"] = self._with_steps(advantages, batch["completion_ids"].shape[1])
        if self._is_vlm and self.log_multimodal:
            # by all processes and for all batches, though one may have no image
            self._logs["images"].extend(gather_object([None] * len(prompts) if images is None else images))
        return batch

    def _reference_points(self, batch: dict[str, Any], mask: Tensor) -> dict[str, Tensor]:
        """Log-probs of the policy that generated, where the loss pass does not give them, and of the reference."""
        points: dict[str, Tensor] = {}
        correction = self._correction
        if correction is not None and "sampling_per_token_logps" not in batch:
            raise ValueError(
                "vllm_importance_sampling_correction=True needs the sampler's log-probs: rollout_func returned "
                "logprobs=None"
            )
        with self.timer.phase("scoring"), torch.no_grad():
            if self._scores_old_policy():
                points["old_per_token_logps"] = self._logps_of(self.model, batch)
            if self.beta and self.ref_model is not None:
                points["ref_per_token_logps"] = self._logps_of(self.ref_model, batch)
            elif self.beta:
                policy = self.accelerator.unwrap_model(self.model)
                if not hasattr(policy, "peft_config"):
                    raise ValueError(
                        f"beta={self.beta} needs a reference model, and a trainer made with beta=0 has none: make it "
                        "with the first beta above 0"
                    )
                with reference_adapter(policy):
                    points["ref_per_token_logps"] = self._logps_of(self.model, batch)
        if "sampling_per_token_logps" in batch and "old_per_token_logps" in points:
            ratio, stats = weigh_sampler(batch | points, mask, correction)
            if ratio is not None:
                points["importance_sampling_ratio"] = ratio
            self._log_sampler([stats], self.accelerator.gather(stats.vector()[None, None]).cpu())
        return points

    def _scores_old_policy(self) -> bool:
        """Whether the policy that generated is scored apart from the loss pass.

        Where the first pass over a generation lies within an optimizer step, it runs the weights that generated. But
        overrides may read TRL's `old_per_token_logps` and `importance_sampling_ratio`.
        """
        is_aligned = not self.args.gradient_accumulation_steps % (self.steps_per_generation * self.num_iterations)
        if not is_aligned:
            return not self._takes_old_logps or self._mode == "eval"
        return self._correction is not None and self._is_overridden(*OWN)

    def _logps_of(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        args = self.args
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            batch_size=args.per_device_train_batch_size if self._mode == "train" else args.per_device_eval_batch_size,
            **multimodal.fields_of(batch),
        )[0]

    def _advantages(self, rewards: Tensor, prompts: list[Prompt], completions: list[Any]) -> Tensor:
        """This process's advantages [B] of outcomes, after logging what the rewards of all processes say."""
        rewards = rewards.cpu()
        weights = self.reward_weights.cpu()
        result = self._group_advantages(rewards)
        metrics, logs = self._metrics[self._mode], self._logs
        for i, name in enumerate(self.reward_func_names):
            metrics[f"rewards/{name}/mean"].append(rewards[:, i].nanmean().item())
            metrics[f"rewards/{name}/std"].append(nanstd(rewards[:, i]).item())
            logs["rewards"][name].extend(rewards[:, i].tolist())
        totals = weighted_rewards(rewards, weights)
        metrics["reward"].append(totals.nanmean().item())
        metrics["reward_std"].append(nanstd(totals).item())
        shown = self._shown(result)
        metrics["frac_reward_zero_std"].append(shown.is_std_zero.float().mean().item())
        logs["prompt"].extend(gather_object(prompts))
        logs["completion"].extend(gather_object(completions))
        logs["advantages"].extend(shown.advantages.tolist())
        self._flush_user_logs(len(prompts))
        start = self.accelerator.process_index * len(prompts)
        return result.advantages[start : start + len(prompts)].to(self.accelerator.device)

    def _group_advantages(self, rewards: Tensor) -> Advantages:
        """What rewards [N, functions] of all processes, on the host, say of their rows."""
        return group_advantages(
            self._outcomes(rewards),
            self.reward_weights.cpu(),
            num_generations=self.num_generations if self._mode == "train" else self.num_generations_eval,
            scale_rewards=self.scale_rewards,
            aggregation=self.multi_objective_aggregation,
        )


OWN |= {name: getattr(RolloutTrainer, name) for name in ("_generate_and_score_completions", "_prepare_inputs")}
WINDOW_SEAMS["_prepare_inputs"] = OWN["_prepare_inputs"]
GENERATION_SEAMS |= {
    name: getattr(RolloutTrainer, name)
    for name in ("_prepare_inputs", "_generate_and_score_completions", "_generate", "_generate_single_turn")
}
OVERLAP_SEAMS |= {name: own for name, own in GENERATION_SEAMS.items() if name != "_prepare_inputs"}


def _conversations(prompts: list[Prompt]) -> list[list[dict[str, Any]]]:
    conversations = [prompt for prompt in prompts if not isinstance(prompt, str)]
    assert len(conversations) == len(prompts), "images_of_rows refuses images beside text"
    return conversations


def _with_extra_fields(inputs: list[dict[str, Any]], fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with a rollout function's own fields: a list gives one value a row, anything else goes to all."""
    return [
        row
        | {k: v[i] if isinstance(v, list) else v for k, v in fields.items() if not isinstance(v, list) or i < len(v)}
        for i, row in enumerate(inputs)
    ]
