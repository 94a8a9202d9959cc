"""The loss of a padded micro-batch: swept pack by pack, or of one graph where something needs it whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from grpo_fast import multimodal
from grpo_fast.batch import Pack, PaddedRows
from grpo_fast.importance import Correction, mismatch_metrics
from grpo_fast.loss import Bonus, Objective, RowsLoss, base_stats, gamma_weights, off_policy_mask, row_weights
from grpo_fast.metrics import Stats, has_samplers, loss_metrics, ratio_metrics
from grpo_fast.policy import score, score_loss
from grpo_fast.trainer.base import replaced_methods
from grpo_fast.trainer.scoring import ScoringTrainer, has_holes
from grpo_kernels import PolicyLoss, entropy_quantile
from grpo_kernels.options import CLIPPED_LOSSES, PolicyOptions
from grpo_kernels.rows import joined

logger = logging.get_logger(__name__)

# methods whose override wants the whole micro-batch in one graph
LOSS_SEAMS = ("compute_loss", "_compute_loss")
SCORING_SEAM = "_get_per_token_logps_and_entropies"
# no entropy is as low
NO_ENTROPY = -1.0


class LossTrainer(ScoringTrainer):
    """The part of `GRPOTrainer` that computes the loss, its gradients and its metrics."""

    max_completion_length: int
    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    importance_sampling_level: str
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float
    entropy_coef: float
    use_adaptive_entropy: bool
    router_aux_loss_coef: float
    use_vllm: bool
    vllm_importance_sampling_correction: bool
    vllm_importance_sampling_mode: str
    vllm_importance_sampling_clip_min: float | None
    vllm_importance_sampling_clip_max: float | None
    _entropy_bonus_enabled: bool
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None
    _metrics: dict[str, dict[str, list[float]]]
    _pending_stats: list[Stats]
    _pending_objective: Objective
    _pending_accumulation: float

    @property
    def steps_per_generation(self) -> int:
        """Micro-batches a generation serves."""
        assert self.args.steps_per_generation is not None
        return self.args.steps_per_generation

    @property
    def _correction(self) -> Correction | None:
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            return None
        return Correction(
            mode=self.vllm_importance_sampling_mode,
            clip_min=self.vllm_importance_sampling_clip_min,
            clip_max=self.vllm_importance_sampling_clip_max,
        )

    @property
    def _objective(self) -> Objective:
        """What the attributes say now: callbacks may anneal them."""
        coef = None
        if self._entropy_bonus_enabled:
            is_low = self._last_world_entropy <= self.args.entropy_target
            coef = self.entropy_coef if is_low or not self.use_adaptive_entropy else 0.0
        args = self.args
        options = PolicyOptions(
            loss_type=self.loss_type,
            importance_sampling_level=self.importance_sampling_level,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta if self.loss_type in CLIPPED_LOSSES else None,
            beta=self.beta,
            bias_correction_kl=args.use_bias_correction_kl,
            sapo_temperature_pos=args.sapo_temperature_pos,
            sapo_temperature_neg=args.sapo_temperature_neg,
            vespo_k_pos=args.vespo_k_pos,
            vespo_lambda_pos=args.vespo_lambda_pos,
            vespo_k_neg=args.vespo_k_neg,
            vespo_lambda_neg=args.vespo_lambda_neg,
            off_policy_mask_threshold=self.off_policy_mask_threshold,
        )
        return Objective(
            options=options,
            correction=self._correction,
            max_completion_length=self.max_completion_length,
            entropy_coef=coef,
            top_entropy_quantile=self.top_entropy_quantile,
        )

    @property
    def _accumulation(self) -> float:
        """Micro-batches of this optimizer step; evaluation accumulates nothing."""
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The micro-batch's loss, scaled for gradient accumulation; `return_outputs=True` raises ValueError."""
        if return_outputs:
            raise ValueError("return_outputs=True is not supported: the model's outputs are never whole")
        return self._compute_loss(model, inputs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's seam: the loss of a padded micro-batch.

        In a training step whose loss nobody overrides, every pack but the last has been through its backward pass when
        this returns, so that one pack's activations live at a time; the value is the whole loss.
        """
        objective = self._objective
        needs_graph = torch.is_grad_enabled() and self._is_overridden(*LOSS_SEAMS)
        is_overridden = needs_graph or self._is_overridden(SCORING_SEAM)
        if is_overridden:
            logger.warning_once(
                f"{type(self).__name__} overrides the loss or the scorer: a micro-batch's packs share one graph, whose "
                "activations live together"
            )
        is_whole = is_overridden or objective.top_entropy_quantile < 1
        with nullcontext() if self._runs_padded else self._scoring_attention(model):
            loss, stats = (self._whole_loss if is_whole else self._swept_loss)(model, inputs, objective)
        self._record(stats, objective)
        if self._is_overridden(*LOSS_SEAMS):
            # the override may read them
            self._flush_stats()
        return loss

    # -- the two ways through the policy -------------------------------------------------------------------------------

    def _swept_loss(self, model: nn.Module, inputs: dict[str, Any], objective: Objective) -> tuple[Tensor, Stats]:
        """Pack by pack: the head computes a pack's loss with its gradients, and its backward pass follows at once."""
        mask = _loss_mask(inputs)
        bonus = self._bonus(objective, mask.sum())
        weights = self._row_weights(inputs, mask, objective)
        batches = self._batches_of(inputs, mask)
        total, stats = torch.zeros((), device=mask.device), base_stats(objective, inputs, mask)
        if not batches:
            return self._zero_loss(model, inputs), stats
        for i, scored in enumerate(batches):
            is_last = i == len(batches) - 1
            parts = RowsLoss(scored.rows, scored.columns, inputs, weights_B=weights, objective=objective, bonus=bonus)
            # gradients travel between processes once, with the last pack; DDP decides that in the forward pass
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss, batch_stats = self._swept(model, scored, parts)
                if torch.is_grad_enabled() and not is_last:
                    self.accelerator.backward(loss)
                    loss = loss.detach()
            total, stats = total + loss, stats + batch_stats
        return total, stats

    def _swept(self, model: nn.Module, scored: Pack | PaddedRows, parts: RowsLoss) -> tuple[Tensor, Stats]:
        terms: list[PolicyLoss] = []

        def loss(logps: Tensor, entropies: Tensor, rows: slice) -> PolicyLoss:
            terms.append(parts.of_rows(logps, entropies, rows))
            return terms[-1]

        with self.accelerator.autocast():
            value, logps, entropies, aux_loss = score_loss(
                model,
                scored,
                loss,
                temperature=self.temperature,
                has_entropy_slope=parts.bonus.weight is not None,
                needs_whole_rows=parts.needs_whole_rows,
                return_aux_loss=self.aux_loss_enabled,
            )
        stats = parts.stats(logps, entropies, joined(terms))
        return self._with_aux_loss(value, aux_loss, stats), stats

    def _whole_loss(self, model: nn.Module, inputs: dict[str, Any], objective: Objective) -> tuple[Tensor, Stats]:
        """All rows in one graph, from what the scoring seam gives."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        logps, entropies, *rest = self._get_per_token_logps_and_entropies(
            model,
            ids,
            attention_mask,
            width,
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **multimodal.fields_of(inputs),
        )
        assert entropies is not None
        has_no_graph = torch.is_grad_enabled() and not logps.requires_grad
        # its forward pass meets the other processes', which they have made before they gather entropies
        no_loss = self._zero_loss(model, inputs) if has_no_graph else 0.0
        mask = _loss_mask(inputs)
        rows, columns = mask.nonzero(as_tuple=True)
        logps_N, entropies_N = logps[rows, columns], entropies[rows, columns]
        threshold = None
        num_counted = mask.sum()
        if objective.top_entropy_quantile < 1:
            threshold = self._entropy_threshold(entropies_N, objective.top_entropy_quantile)
            num_counted = (entropies_N >= threshold).sum()
        bonus = self._bonus(objective, num_counted, threshold)
        weights = self._row_weights(inputs, mask, objective)
        parts = RowsLoss(rows, columns, inputs, weights_B=weights, objective=objective, bonus=bonus)
        terms = parts.differentiable(logps_N.float(), entropies_N.float())
        stats = base_stats(objective, inputs, mask) + parts.stats(logps_N.float(), entropies_N.float(), terms)
        return self._with_aux_loss(terms.loss.sum() + no_loss, rest[0] if rest else None, stats), stats

    def _with_aux_loss(self, loss: Tensor, aux_loss: Tensor | None, stats: Stats) -> Tensor:
        if aux_loss is None:
            return loss
        stats.add(aux=aux_loss.detach())
        return loss + self.router_aux_loss_coef * aux_loss / self._accumulation

    def _zero_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """A loss of 0 that runs the model: a process without tokens still meets the others in the backward pass."""
        first = inputs["prompt_ids"][:1, -1:]
        ones = torch.ones_like(first)
        (scored,) = self._packs(first, ones, first, ones)
        with self.accelerator.autocast():
            logps, *_ = score(model, scored, temperature=self.temperature)
        return 0.0 * logps.sum()

    # -- what the loss is made of --------------------------------------------------------------------------------------

    def _batches_of(self, inputs: dict[str, Any], mask: Tensor) -> Sequence[Pack | PaddedRows]:
        """What the policy runs on for a padded micro-batch."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        prompt_ids, prompt_mask, completion_ids, completion_mask = (inputs[name] for name in names)
        ids, attention_mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
        if not self._runs_padded and not has_holes(attention_mask):
            return self._packs(
                prompt_ids, prompt_mask, completion_ids, completion_mask, mask if "tool_mask" in inputs else None
            )
        fields = multimodal.row_inputs(multimodal.fields_of(inputs), slice(0, ids.shape[0]))
        return [self._padded_rows(ids, attention_mask, completion_ids.shape[1], fields, mask)]

    def _row_weights(self, inputs: dict[str, Any], mask: Tensor, objective: Objective) -> Tensor:
        accumulation = self._accumulation
        # a subclass's own dict may leave it out where the loss type does not count tokens
        num_items = inputs.get("num_items_in_batch")
        if num_items is not None:
            num_items = num_items.clamp(min=1) / self.accelerator.num_processes
        return row_weights(
            mask.sum(dim=1),
            objective=objective,
            num_items_per_process=num_items,
            accumulation=accumulation,
            windows=accumulation / self.steps_per_generation if self._mode == "train" else 1,
        )

    def _bonus(self, objective: Objective, num_counted: Tensor, threshold: Tensor | None = None) -> Bonus:
        weight = None
        if objective.entropy_coef is not None:
            weight = objective.entropy_coef / (num_counted.clamp(min=1) * self._accumulation).float()
        return Bonus(weight=weight, threshold=threshold)

    @torch.no_grad()
    def _entropy_threshold(self, entropies_N: Tensor, share: float) -> Tensor:
        """The entropy that a `share` of the micro-batch's tokens over all processes reaches. 0-dim fp32."""
        padded = self.accelerator.pad_across_processes(entropies_N.detach().float(), dim=0, pad_index=NO_ENTROPY)
        gathered = self.accelerator.gather(padded)
        return entropy_quantile(gathered[gathered > NO_ENTROPY], share)

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """TRL's helper for subclasses: which unmasked tokens reach the quantile `threshold` of entropy. [B, C] bool."""
        limit = self._entropy_threshold(entropies[mask.bool()], 1 - threshold)
        return (entropies >= limit) & mask.bool()

    @staticmethod
    def get_off_policy_mask(
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """TRL's helper for subclasses: `grpo_fast.loss.off_policy_mask`."""
        return off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold)

    @staticmethod
    def get_gamma_weights(
        advantages: Tensor,
        log_ratio_per_token: Tensor,
        mask: Tensor,
        importance_sampling_ratio: Tensor | None,
        k_pos: float = 2.0,
        lambda_pos: float = 3.0,
        k_neg: float = 3.0,
        lambda_neg: float = 2.0,
    ) -> Tensor:
        """TRL's helper for subclasses: `grpo_fast.loss.gamma_weights`, [B, 1] for advantages [B, 1]."""
        weights = gamma_weights(
            advantages,
            log_ratio_per_token,
            mask,
            importance_sampling_ratio,
            k_pos=k_pos,
            lambda_pos=lambda_pos,
            k_neg=k_neg,
            lambda_neg=lambda_neg,
        )
        return weights if advantages.shape[1] > 1 else _of_row(weights, mask)

    # -- metrics -------------------------------------------------------------------------------------------------------

    def _record(self, stats: Stats, objective: Objective) -> None:
        """Keep a micro-batch's sums for `_flush_stats`, and move the entropy controller at an optimizer step."""
        self._pending_stats.append(stats)
        self._pending_objective, self._pending_accumulation = objective, self._accumulation
        if not (self._entropy_bonus_enabled and self._mode == "train"):
            return
        if self.use_adaptive_entropy:
            window = stats.of("bonus_entropy", "bonus_tokens")
            before = self._entropy_window_stats
            self._entropy_window_stats = window if before is None else before + window
            if self.accelerator.sync_gradients:
                self._adapt_entropy_coef(self.accelerator.reduce(self._entropy_window_stats, reduction="sum"))
                self._entropy_window_stats = None
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)

    def _adapt_entropy_coef(self, window: Tensor) -> None:
        """One step of the controller of Skywork-OR1 (arXiv:2505.22312) towards `entropy_target`."""
        args = self.args
        entropy = (window[0] / window[1].clamp(min=1)).item()
        if entropy <= args.entropy_target:
            self.entropy_coef = min(self.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
        else:
            self.entropy_coef = max(self.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
        self._last_world_entropy = entropy

    def _flush_stats(self) -> None:
        """Turn the micro-batches' sums into metrics: one gather over the processes and one read for all of them."""
        if not self._pending_stats:
            return
        pending = self._pending_stats.copy()
        self._pending_stats.clear()
        gathered = self.accelerator.gather(torch.stack([stats.vector() for stats in pending])[None]).cpu()
        for name, value in self._metrics_of(gathered):
            self._metrics[self._mode][name].append(value)
        self._log_sampler(pending, gathered)

    def _metrics_of(self, gathered: Tensor) -> Iterator[tuple[str, float]]:
        objective, accumulation = self._pending_objective, self._pending_accumulation
        is_sum = objective.options.loss_type in ("dapo", "cispo", "vespo")
        for i in range(gathered.shape[1]):
            yield from loss_metrics(
                gathered[:, i],
                objective.options,
                has_bonus=self._entropy_bonus_enabled,
                has_aux_loss=self.aux_loss_enabled,
                policy_scale=1.0 if is_sum else accumulation,
            ).items()

    def _log_sampler(self, pending: list[Stats], gathered: Tensor) -> None:
        """Log how sampler and trainer differ, over the tokens of all processes.

        Args:
            pending: This process's micro-batches, or its rollout.
            gathered: [processes, micro-batches, ...] fp32, `Stats.vector()` of every process's.
        """
        # the gathered answer, which all processes have: the next gather needs all of them
        if not has_samplers(gathered):
            return
        log_ratios = torch.cat([pending[0].sums[:0], *(values for stats in pending for values in stats.log_ratios)])
        padded = self.accelerator.pad_across_processes(log_ratios[None], dim=1, pad_index=math.nan)
        metrics = mismatch_metrics(self.accelerator.gather(padded))
        if self._correction is not None:
            metrics |= ratio_metrics(gathered)
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)
        if self._mode == "train":
            self._check_sampler_agreement(metrics)

    def _check_sampler_agreement(self, metrics: dict[str, float]) -> None:
        """A training step's sampler metrics, the same in all processes, before its optimizer step; raises to stop."""

    def _is_overridden(self, *methods: str) -> bool:
        """Whether a subclass, or an attribute of this instance or of the class, replaces one of these methods."""
        return bool(replaced_methods(self, {name: OWN[name] for name in methods}))


# the seams before anybody replaces them
OWN: dict[str, Any] = {name: getattr(LossTrainer, name) for name in (*LOSS_SEAMS, SCORING_SEAM)}


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, C]: the tokens in the loss; what tools wrote is attended to, and not trained."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _of_row(values: Tensor, mask: Tensor) -> Tensor:
    """The value at each row's first unmasked token, or its first. [B, 1]."""
    return values.gather(1, mask.int().argmax(1, keepdim=True))
