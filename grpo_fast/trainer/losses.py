"""Scoring and loss: from a padded micro-batch to packs, log-probs, and gradients pack by pack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from grpo_fast.batch import Pack
from grpo_fast.config import GRPOConfig
from grpo_fast.loss import Objective, pack_loss, row_weights
from grpo_fast.metrics import PhaseTimer, Stats, to_metrics
from grpo_fast.packing import default_max_tokens, pack_rows
from grpo_fast.policy import score
from grpo_fast.rollout import unpadded_rows

SHARE_PROMPTS: dict[str, Any] = {"auto": "auto", "always": True, "never": False}


class LossTrainer(Trainer):
    """The half of `GRPOTrainer` that scores rows and computes their loss."""

    args: GRPOConfig
    objective: Objective
    timer: PhaseTimer
    temperature: float
    steps_per_generation: int
    unpackable: str | None
    _metrics: dict[str, dict[str, list[float]]]
    _pending_stats: list[Tensor]

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _packs(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[Pack]:
        device = self.accelerator.device
        packs = pack_rows(
            prompt_ids,
            completion_ids,
            max_tokens=self.args.max_tokens_per_pack or default_max_tokens(device),
            share_prompts=SHARE_PROMPTS[self.args.share_prompts],
            one_row_per_pack=self.unpackable is not None,
        )
        return [pack.to(device) for pack in packs]

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Log-probs and entropies of the last `logits_to_keep` positions, [B, C] fp32, 0.0 where masked.

        `batch_size` is TRL's and has no effect: rows are packed under `max_tokens_per_pack`. The third value is TRL's
        auxiliary loss, None.
        """
        prompts = unpadded_rows(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        completions = unpadded_rows(input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:])
        logps = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        entropies = torch.zeros_like(logps) if compute_entropy else None
        for pack in self._packs(prompts, completions):
            with self.accelerator.autocast():
                logps_N, entropies_N = score(model, pack, temperature=self.temperature, return_entropy=compute_entropy)
            logps = pack.unpack(logps_N, logps)
            if entropies is not None and entropies_N is not None:
                entropies = pack.unpack(entropies_N, entropies)
        return logps, entropies, None

    def _row_weights(self, inputs: dict[str, Any]) -> Tensor:
        is_training = self._mode == "train"
        accumulation = self.current_gradient_accumulation_steps if is_training else 1
        return row_weights(
            inputs["completion_mask"].sum(dim=1),
            objective=self.objective,
            num_items_per_process=inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes,
            accumulation=accumulation,
            windows=accumulation / self.steps_per_generation if is_training else 1,
        )

    def _pack_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Iterator[tuple[bool, Tensor, Stats]]:
        """Each pack's loss with its graph, and whether it is the last."""
        packs = self._packs(
            unpadded_rows(inputs["prompt_ids"], inputs["prompt_mask"]),
            unpadded_rows(inputs["completion_ids"], inputs["completion_mask"]),
        )
        weights = self._row_weights(inputs)
        for i, pack in enumerate(packs):
            with self.accelerator.autocast():
                logps, entropies = score(model, pack, temperature=self.temperature, return_entropy=True)
            assert entropies is not None
            loss, stats = pack_loss(
                logps,
                entropies,
                rows_N=pack.rows,
                columns_N=pack.columns,
                inputs=inputs,
                weights_B=weights,
                objective=self.objective,
            )
            yield i == len(packs) - 1, loss, stats

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
        """TRL's seam: the loss of a padded micro-batch as one graph; `_packed_step` frees each pack's graph."""
        device = self.accelerator.device
        total, stats = torch.zeros((), device=device), Stats.empty(device)
        for _, loss, pack_stats in self._pack_losses(model, inputs):
            total, stats = total + loss, stats + pack_stats
        self._pending_stats.append(stats.vector())
        return total

    def _is_seam_overridden(self) -> bool:
        """Whether a subclass, or an attribute of this instance, replaces a loss or scoring method."""
        seams = ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
        return any(name in vars(self) or getattr(type(self), name) is not getattr(LossTrainer, name) for name in seams)

    def _packed_step(self, model: nn.Module, inputs: list[dict[str, Any]]) -> Tensor:
        """Forward and backward pack by pack, so that one pack's activations live at a time."""
        model.train()
        batch = self._prepare_inputs(inputs)
        device = self.accelerator.device
        total, stats = torch.zeros((), device=device), Stats.empty(device)
        with self.timer.phase("train"):
            for is_last, loss, pack_stats in self._pack_losses(model, batch):
                # gradients travel between processes once, with the last pack
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    self.accelerator.backward(loss)
                total, stats = total + loss.detach(), stats + pack_stats
        self._pending_stats.append(stats.vector())
        return total

    def _flush_stats(self) -> None:
        """Turn the micro-batches' sums into metrics: one gather over the processes and one read for all of them."""
        if not self._pending_stats:
            return
        stacked = torch.stack(self._pending_stats)
        self._pending_stats.clear()
        gathered = self.accelerator.gather(stacked[None]).cpu()
        for i in range(gathered.shape[1]):
            values = to_metrics(
                gathered[:, i], has_kl=bool(self.beta), has_sampler=self.objective.correction is not None
            )
            for name, value in values.items():
                self._metrics[self._mode][name].append(value)
