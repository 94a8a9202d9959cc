"""The loss of a padded micro-batch: swept pack by pack, or of one graph where something needs it whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from grpo_fast import multimodal
from grpo_fast.batch import Pack, PaddedRows, moved
from grpo_fast.host_rows import Rows
from grpo_fast.importance import Correction, mismatch_metrics
from grpo_fast.loss import Objective, RowsLoss, base_stats, gamma_weights, off_policy_mask, weigh_sampler
from grpo_fast.metrics import Stats, has_samplers, loss_metrics, ratio_metrics, work_metrics
from grpo_fast.policy import score, score_loss
from grpo_fast.trainer.base import replaced_methods
from grpo_fast.trainer.windows import ScoredRows, Window, WindowTrainer, loss_mask
from grpo_kernels import PolicyLoss, entropy_quantile
from grpo_kernels.options import CLIPPED_LOSSES, PolicyOptions
from grpo_kernels.rows import cut, joined

logger = logging.get_logger(__name__)

# methods whose override wants the whole micro-batch in one graph
LOSS_SEAMS = ("compute_loss", "_compute_loss")
SCORING_SEAM = "_get_per_token_logps_and_entropies"
# no entropy is as low
NO_ENTROPY = -1.0


class LossTrainer(WindowTrainer):
    """The part of `GRPOTrainer` that computes the loss, its gradients and its metrics."""

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
    def _takes_old_logps(self) -> bool:
        """Whether the first pass over a generation gives the log-probs of the policy that generated.

        It does where several passes follow each other, each within an optimizer step, and are swept.
        """
        is_aligned = not self.args.gradient_accumulation_steps % self.steps_per_generation
        is_swept = self.top_entropy_quantile == 1 and not self._is_overridden(*OWN)
        return self.num_iterations > 1 and is_aligned and is_swept

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

        In a training step whose loss nobody overrides, the micro-batches of an optimizer step are run together: each
        call runs its share of the packs, all but the last of which have been through their backward pass when it
        returns, so that one pack's activations live at a time. The values of the calls add up to the loss.
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
            loss = (self._whole_loss if is_whole else self._swept_loss)(model, inputs, objective)
        if self._is_overridden(*LOSS_SEAMS):
            # the override may read them
            self._flush_stats()
        return loss

    # -- the two ways through the policy -------------------------------------------------------------------------------

    def _swept_loss(self, model: nn.Module, inputs: dict[str, Any], objective: Objective) -> Tensor:
        """Pack by pack: the head computes a pack's loss with its gradients, and its backward pass follows at once."""
        window = self._window_of(inputs, objective)
        share = window.shares[window.position]
        # nothing to run, and not the step's last micro-batch
        total = torch.zeros((), device=window.mask.device, requires_grad=torch.is_grad_enabled() and not share)
        for i, scored in enumerate(share):
            is_last = i == len(share) - 1
            # gradients travel between processes once, with the last pack; DDP decides that in the forward pass
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = self._zero_loss(model) if scored is None else self._swept(model, scored, window)
                if torch.is_grad_enabled() and not is_last:
                    self.accelerator.backward(loss)
                    loss = loss.detach()
            total = total + loss
        window.position += 1
        if window.is_done:
            self._close(window)
        return total

    def _swept(self, model: nn.Module, scored: Pack | PaddedRows, window: Window) -> Tensor:
        self._plan_checkpointing([scored])
        parts = self._rows_loss(window, scored.rows, scored.columns, scored.row_lengths)
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
        window.run.append((scored, logps, entropies, joined(terms)))
        if aux_loss is None:
            return value
        window.aux_loss = aux_loss.detach()
        return value + self.router_aux_loss_coef * aux_loss / self._accumulation

    def _rows_loss(self, window: Window, rows: Tensor, columns: Tensor, lengths: tuple[int, ...]) -> RowsLoss:
        return RowsLoss(
            rows,
            columns,
            lengths,
            window.inputs,
            weights_B=window.weights,
            objective=window.objective,
            bonus=window.bonus,
        )

    @torch.no_grad()
    def _close(self, window: Window) -> None:
        """Record the metrics of a window's micro-batches, as if each had been run alone."""
        self._running = None if self._running is window else self._running
        done = window.in_row_order()
        every_stats = []
        for i, member in enumerate(window.members):
            first, last = i * window.size, (i + 1) * window.size
            stats = base_stats(window.objective, member, window.mask[first:last])
            stats.add(silent=window.num_silent[i], masked=window.num_masked[i])
            if done is not None:
                scored, terms = done
                some, lengths = scored.runs_between(first, last)
                parts = self._rows_loss(window, scored.rows[some], scored.columns[some], lengths)
                stats = stats + parts.stats(scored.logps[some], scored.entropies[some], cut(terms, some))
            every_stats.append(stats)
        for pack, *_ in window.run:
            every_stats[0].add(run=pack.num_run, unpadded=pack.num_tokens, unshared=pack.num_row_tokens)
        if window.aux_loss is not None:
            every_stats[0].add(aux=window.aux_loss)
        if done is not None and self._needs_later(window.members):
            self._keep_old_logps(window, scored=done[0])
        self._record(every_stats, window.objective)

    def _keep_old_logps(self, window: Window, scored: ScoredRows) -> None:
        """Give the micro-batches the log-probs of this pass, for the passes that follow."""
        old = torch.zeros(window.mask.shape, device=window.mask.device)
        old = old.index_put((scored.rows, scored.columns), scored.logps.float())
        for i, member in enumerate(window.members):
            some = slice(i * window.size, (i + 1) * window.size)
            member["old_per_token_logps"] = old[some]
            if "sampling_per_token_logps" in member and self._correction is not None:
                ratio, _ = weigh_sampler(member, window.mask[some], self._correction)
                member["importance_sampling_ratio"] = ratio

    def _whole_loss(self, model: nn.Module, inputs: dict[str, Any], objective: Objective) -> Tensor:
        """All rows in one graph, from what the scoring seam gives."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        host = self._host(inputs)
        self._copied = (ids, attention_mask, host.input_ids, host.attention_mask)
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
        no_loss = self._zero_loss(model) if has_no_graph else 0.0
        mask = loss_mask(inputs)
        is_scored = host.loss_mask
        rows, columns = (moved(index, mask.device) for index in is_scored.nonzero(as_tuple=True))
        lengths = tuple(length for length in is_scored.sum(dim=1).tolist() if length)
        logps_N, entropies_N = logps[rows, columns], entropies[rows, columns]
        threshold, counted = None, mask
        if objective.top_entropy_quantile < 1:
            threshold = self._entropy_threshold(entropies_N, objective.top_entropy_quantile)
            counted = mask * (entropies >= threshold)
        bonus = self._bonus(objective, [counted], threshold)
        weights = self._row_weights(inputs, mask, objective)
        parts = RowsLoss(rows, columns, lengths, inputs, weights_B=weights, objective=objective, bonus=bonus)
        terms = parts.differentiable(logps_N.float(), entropies_N.float())
        stats = base_stats(objective, inputs, mask) + parts.stats(logps_N.float(), entropies_N.float(), terms)
        loss = self._with_aux_loss(terms.loss.sum() + no_loss, rest[0] if rest else None, stats)
        self._record([stats], objective)
        return loss

    def _with_aux_loss(self, loss: Tensor, aux_loss: Tensor | None, stats: Stats) -> Tensor:
        if aux_loss is None:
            return loss
        stats.add(aux=aux_loss.detach())
        return loss + self.router_aux_loss_coef * aux_loss / self._accumulation

    def _zero_loss(self, model: nn.Module) -> Tensor:
        """A loss of 0 that runs the model on one token.

        Its gradients are zeros, with which the optimizer steps as TRL's does, and other processes meet this one.
        """
        scored = self._packs(Rows(prompt_ids=[[0]], completion_ids=[[0]], is_scored=torch.ones(1, 1).bool()))
        with self.accelerator.autocast():
            logps, *_ = score(model, scored[0], temperature=self.temperature)
        return 0.0 * logps.sum()

    @torch.no_grad()
    def _entropy_threshold(self, entropies_N: Tensor, share: float) -> Tensor:
        """The entropy that a `share` of the micro-batch's tokens over all processes reaches. 0-dim fp32."""
        if self.accelerator.num_processes == 1:
            return entropy_quantile(entropies_N.detach().float(), share)
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

    def _record(self, every_stats: list[Stats], objective: Objective) -> None:
        """Keep micro-batches' sums for `_flush_stats`, and move the entropy controller at an optimizer step."""
        self._pending_stats += every_stats
        self._pending_objective, self._pending_accumulation = objective, self._accumulation
        if not (self._entropy_bonus_enabled and self._mode == "train"):
            return
        if self.use_adaptive_entropy:
            window = torch.stack([stats.of("bonus_entropy", "bonus_tokens") for stats in every_stats]).sum(dim=0)
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
        work = work_metrics(gathered) if self._mode == "train" else {}
        for name, value in (*self._metrics_of(gathered), *work.items()):
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


def _of_row(values: Tensor, mask: Tensor) -> Tensor:
    """The value at each row's first unmasked token, or its first. [B, 1]."""
    return values.gather(1, mask.int().argmax(1, keepdim=True))
