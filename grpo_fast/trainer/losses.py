"""Scoring and loss: from a padded micro-batch to packs, log-probs, and gradients pack by pack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from grpo_fast.batch import Pack
from grpo_fast.config import GRPOConfig
from grpo_fast.loss import Objective, PackLoss, row_weights
from grpo_fast.metrics import Stats, to_metrics
from grpo_fast.packing import default_max_tokens, pack_rows
from grpo_fast.policy import score, score_loss
from grpo_fast.rollout import unpadded_rows
from grpo_kernels import PolicyLoss
from grpo_kernels.rows import joined

SHARE_PROMPTS: dict[str, Any] = {"auto": "auto", "always": True, "never": False}


class LossTrainer(Trainer):
    """The half of `GRPOTrainer` that scores rows and computes their loss."""

    args: GRPOConfig
    objective: Objective
    temperature: float
    steps_per_generation: int
    unpackable: str | None
    _metrics: dict[str, dict[str, list[float]]]
    _pending_stats: list[Tensor]

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _packs(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> list[Pack]:
        """The unmasked tokens of padded rows as packs, whose columns are those of `completion_ids`."""
        device = self.accelerator.device
        packs = pack_rows(
            unpadded_rows(prompt_ids, prompt_mask),
            unpadded_rows(completion_ids, completion_mask),
            max_tokens=self.args.max_tokens_per_pack or default_max_tokens(device),
            share_prompts=SHARE_PROMPTS[self.args.share_prompts],
            one_row_per_pack=self.unpackable is not None,
        )
        # a mask may have holes: the n-th kept token of a row stands in the column of the n-th 1
        column_of = completion_mask.bool().sort(dim=1, descending=True, stable=True).indices
        packs = [pack.to(device) for pack in packs]
        return [replace(pack, columns=column_of[pack.rows, pack.columns]) for pack in packs]

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
        start = input_ids.shape[1] - logits_to_keep
        prompt, completion = slice(None, start), slice(start, None)
        packs = self._packs(
            input_ids[:, prompt], attention_mask[:, prompt], input_ids[:, completion], attention_mask[:, completion]
        )
        logps = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        entropies = torch.zeros_like(logps) if compute_entropy else None
        for pack in packs:
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

    def _pack_losses(
        self, model: nn.Module, inputs: dict[str, Any], *, is_eager: bool = True
    ) -> Iterator[tuple[bool, Tensor, Stats]]:
        """Each pack's loss, and whether it is the last.

        `is_eager`: the backward pass of one pack precedes the next. Then the head computes the loss with its gradients;
        else those of all packs would be alive at once, and the loss gets an ordinary graph.
        """
        if self._is_overridden("_get_per_token_logps_and_entropies"):
            yield True, *self._padded_loss(model, inputs)
            return
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        packs = self._packs(*(inputs[name] for name in names))
        if not packs:
            yield True, self._zero_loss(model, inputs), Stats.empty(self.accelerator.device)
        weights = self._row_weights(inputs)
        for i, pack in enumerate(packs):
            is_last = i == len(packs) - 1
            parts = PackLoss(
                rows_N=pack.rows, columns_N=pack.columns, inputs=inputs, weights_B=weights, objective=self.objective
            )
            # gradients travel between processes once, with the last pack; DDP decides that in the forward pass
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                yield is_last, *(self._swept(model, pack, parts) if is_eager else self._graphed(model, pack, parts))

    def _swept(self, model: nn.Module, pack: Pack, parts: PackLoss) -> tuple[Tensor, Stats]:
        terms: list[PolicyLoss] = []

        def loss(logps: Tensor, entropies: Tensor, rows: slice) -> PolicyLoss:
            terms.append(parts.of_rows(logps, entropies, rows))
            return terms[-1]

        with self.accelerator.autocast():
            value, logps, entropies = score_loss(
                model,
                pack,
                loss,
                temperature=self.temperature,
                sequence_lengths=pack.row_lengths if parts.needs_whole_rows else None,
            )
        return value, parts.stats(logps, entropies, joined(terms))

    def _graphed(self, model: nn.Module, pack: Pack, parts: PackLoss) -> tuple[Tensor, Stats]:
        with self.accelerator.autocast():
            logps, entropies = score(model, pack, temperature=self.temperature, return_entropy=True)
        assert entropies is not None
        terms = parts.differentiable(logps)
        return terms.loss.sum(), parts.stats(logps, entropies, terms)

    def _padded_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        """The loss from the log-probs that an overridden `_get_per_token_logps_and_entropies` gives."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        logps, entropies, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, width, compute_entropy=True)
        assert entropies is not None
        rows, columns = inputs["completion_mask"].nonzero(as_tuple=True)
        parts = PackLoss(
            rows_N=rows,
            columns_N=columns,
            inputs=inputs,
            weights_B=self._row_weights(inputs),
            objective=self.objective,
        )
        terms = parts.differentiable(logps[rows, columns])
        return terms.loss.sum(), parts.stats(logps[rows, columns], entropies[rows, columns], terms)

    def _zero_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """A loss of 0 that runs the model: a process without tokens still meets the others in the backward pass."""
        first = inputs["prompt_ids"][:1, -1:]
        (pack,) = self._packs(first, torch.ones_like(first), first, torch.ones_like(first))
        with self.accelerator.autocast():
            logps, _ = score(model, pack, temperature=self.temperature)
        return 0.0 * logps.sum()

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
        device = self.accelerator.device
        total, stats = torch.zeros((), device=device), Stats.empty(device)
        is_eager = (
            self._mode == "train"
            and torch.is_grad_enabled()
            and not self._is_overridden("compute_loss", "_compute_loss")
        )
        one_graph = torch.is_grad_enabled() and not is_eager
        for is_last, loss, pack_stats in self._pack_losses(model, inputs, is_eager=not one_graph):
            stats = stats + pack_stats
            if is_eager and not is_last:
                self.accelerator.backward(loss)
                loss = loss.detach()
            total = total + loss
        self._pending_stats.append(stats.vector())
        return total

    def _is_overridden(self, *methods: str) -> bool:
        """Whether a subclass, or an attribute of this instance, replaces one of these methods."""
        return any(
            name in vars(self) or getattr(type(self), name) is not getattr(LossTrainer, name) for name in methods
        )

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
