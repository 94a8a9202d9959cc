"""Windows: the micro-batches of an optimizer step that a generation still feeds, regrouped into packs.

Which rows stand in which micro-batch is settled by TRL's shuffle, and says what each row weighs. Which rows run
together is free, since a loss is a sum over rows: the packs are made of all rows of the window, and dealt to its
micro-batches in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from grpo_fast import multimodal
from grpo_fast.batch import Pack, PaddedRows, moved
from grpo_fast.host_rows import HostRows, joined_rows
from grpo_fast.loss import Bonus, Objective, row_weights
from grpo_fast.trainer.base import replaced_methods
from grpo_fast.trainer.scoring import ScoringTrainer, has_holes
from grpo_kernels import PolicyLoss
from grpo_kernels.rows import cut, joined

logger = logging.get_logger(__name__)

# a pass of one token, with weight 0
Filler = None


@dataclass(kw_only=True)
class Window:
    """Micro-batches of one optimizer step, and what the policy runs on for them.

    Attributes:
        members: The padded micro-batches, in order.
        inputs: Their rows in one, as far as the loss reads them.
        mask: [B, C], the tokens in the loss.
        weights: [B] fp32, what a token of each row weighs.
        bonus: The entropy terms.
        objective: What the window is trained for.
        shares: Each micro-batch's part of the packs; None stands for a pass of one token with weight 0.
        num_silent: Rows of each micro-batch that are left out because nothing of them reaches a gradient.
        num_masked: Rows of each micro-batch without a token in the loss.
        position: Micro-batches that have been run.
        run: What has been run: the pack, its log-probs, its entropies and its terms.
        aux_loss: The auxiliary loss of a mixture of experts, which is of one micro-batch alone; or None.
    """

    members: list[dict[str, Any]]
    inputs: dict[str, Any]
    mask: Tensor
    weights: Tensor
    bonus: Bonus
    objective: Objective
    shares: list[list[Pack | PaddedRows | None]]
    num_silent: list[int]
    num_masked: list[int]
    position: int = 0
    run: list[tuple[Pack | PaddedRows, Tensor, Tensor, PolicyLoss]] = field(default_factory=list)
    aux_loss: Tensor | None = None

    @property
    def is_done(self) -> bool:
        """Whether all micro-batches have been run."""
        return self.position == len(self.members)

    @property
    def size(self) -> int:
        """Rows of a micro-batch."""
        return len(self.mask) // len(self.members)

    def in_row_order(self) -> tuple[ScoredRows, PolicyLoss] | None:
        """All that has been run, in the order of the rows; None if nothing has."""
        if not self.run:
            return None
        packs, logps, entropies, terms = zip(*self.run, strict=True)
        columns = torch.cat([pack.columns for pack in packs])
        rows = torch.cat([pack.rows for pack in packs])
        ids = [row for pack in packs for row in pack.row_ids]
        lengths = [length for pack in packs for length in pack.row_lengths]
        everything, all_logps, all_entropies = joined(terms), torch.cat(logps), torch.cat(entropies)
        order = sorted(range(len(ids)), key=lambda i: ids[i])
        if order != list(range(len(ids))):
            starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
            places = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])
            places = moved(places, columns.device)
            columns, rows = columns[places], rows[places]
            all_logps, all_entropies = all_logps[places], all_entropies[places]
            everything = cut(everything, places)
        scored = ScoredRows(
            rows=rows,
            columns=columns,
            row_ids=[ids[i] for i in order],
            row_lengths=[lengths[i] for i in order],
            logps=all_logps,
            entropies=all_entropies,
        )
        return scored, everything


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Tokens of a window in the order of its rows: [N] each, the ids and lengths of the rows on the host."""

    rows: Tensor
    columns: Tensor
    row_ids: list[int]
    row_lengths: list[int]
    logps: Tensor
    entropies: Tensor

    def runs_between(self, first: int, last: int) -> tuple[slice, tuple[int, ...]]:
        """The tokens of rows from `first` up to `last`, and how many each of these rows has."""
        lengths = [n for row, n in zip(self.row_ids, self.row_lengths, strict=True) if first <= row < last]
        start = sum(n for row, n in zip(self.row_ids, self.row_lengths, strict=True) if row < first)
        return slice(start, start + sum(lengths)), tuple(lengths)


class WindowTrainer(ScoringTrainer):
    """The part of `GRPOTrainer` that says what runs together."""

    max_completion_length: int
    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _host_rows: list[HostRows]
    # the micro-step at which the accumulation window ends, and the window of packs that is being run
    _window_end = 0
    _running: Window | None = None
    _has_announced_sharing = False

    @property
    def steps_per_generation(self) -> int:
        """Micro-batches a generation serves."""
        assert self.args.steps_per_generation is not None
        return self.args.steps_per_generation

    @property
    def _accumulation(self) -> float:
        """Micro-batches of this optimizer step; evaluation accumulates nothing."""
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """As in `Trainer`; says how many micro-batches the optimizer step has."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window_end = self._step + len(samples)
        return samples, num_items

    # -- which micro-batches -------------------------------------------------------------------------------------------

    def _window_of(self, inputs: dict[str, Any], objective: Objective) -> Window:
        """The window that `inputs` is the next micro-batch of."""
        running = self._running
        if running is not None and running.members[running.position] is inputs:
            return running
        window = self._open_window(self._members_from(inputs), objective)
        if len(window.members) > 1:
            if running is not None:
                raise RuntimeError(
                    f"micro-batch {running.position + 1} of {len(running.members)} of an optimizer step was expected, "
                    "and another came: the packs that are left would be lost"
                )
            self._running = window
        return window

    def _members_from(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """`inputs` and the micro-batches after it that the same optimizer step takes from the buffer."""
        is_training_step = self._is_scoring and torch.is_grad_enabled()
        if not is_training_step or self._buffered_inputs is None or self.pads_rows or self.aux_loss_enabled:
            return [inputs]
        place, remaining = self._step % self.steps_per_generation, self._window_end - self._step
        members = self._buffered_inputs[place : place + max(remaining, 0)]
        # an override may hand out micro-batches that it makes only when their turn comes
        if not members or members[0] is not inputs or replaced_methods(self, WINDOW_SEAMS):
            return [inputs]
        return [inputs] if any(has_holes(self._host(member).attention_mask) for member in members) else members

    def _host(self, inputs: dict[str, Any]) -> HostRows:
        """The micro-batch's rows on the host: those of the rollout, or copied here."""
        return next((host for host in self._host_rows if host.is_of(inputs)), None) or HostRows(inputs)

    # -- what runs -----------------------------------------------------------------------------------------------------

    def _open_window(self, members: list[dict[str, Any]], objective: Objective) -> Window:
        hosts = [self._host(member) for member in members]
        masks = [loss_mask(member) for member in members]
        is_silent = [self._silent_rows(host, objective) for host in hosts]
        num_masked = [int((~host.loss_mask.any(dim=1)).sum()) for host in hosts]
        if any(silent.any() for silent in is_silent) and self._needs_later(members):
            for member, host, silent in zip(members, hosts, is_silent, strict=True):
                host.skip(member, silent)
        batches = self._batches(members, hosts, torch.cat(is_silent))
        weights = [self._row_weights(member, mask, objective) for member, mask in zip(members, masks, strict=True)]
        return Window(
            members=members,
            inputs=_merged(members),
            mask=torch.cat(masks),
            weights=torch.cat(weights),
            bonus=self._bonus(objective, masks),
            objective=objective,
            shares=self._dealt(batches, len(members)),
            num_silent=[int(silent.sum()) for silent in is_silent],
            num_masked=num_masked,
        )

    def _silent_rows(self, host: HostRows, objective: Objective) -> Tensor:
        """[B] bool: rows of which nothing reaches a gradient."""
        options = objective.options
        has_other_terms = options.beta != 0 or objective.entropy_coef is not None or self.aux_loss_enabled
        # evaluation has no gradients, and metrics of all rows
        if not self.args.skip_zero_gradient_rows or has_other_terms or not torch.is_grad_enabled():
            return torch.zeros(len(host.loss_mask), dtype=torch.bool)
        # VESPO has the ratio inside its weight
        ratio_multiplies = objective.correction is not None and options.loss_type != "vespo"
        return host.is_silent(ratio_multiplies=ratio_multiplies)

    def _needs_later(self, members: list[dict[str, Any]]) -> bool:
        """Whether this pass makes the old log-probs of later ones."""
        is_training = self._mode == "train"
        return is_training and self._takes_old_logps and not any("old_per_token_logps" in member for member in members)

    @property
    def _takes_old_logps(self) -> bool:
        """Whether the first pass over a generation gives the log-probs of the policy that generated."""
        raise NotImplementedError

    def _batches(
        self, members: list[dict[str, Any]], hosts: list[HostRows], is_silent: Tensor
    ) -> list[Pack | PaddedRows]:
        if len(members) == 1 and (self._runs_padded or has_holes(hosts[0].attention_mask)):
            return [self._padded_micro_batch(members[0], hosts[0])]
        rows = joined_rows([host.rows(up_to_last_scored=not self.aux_loss_enabled) for host in hosts])
        batches = self._packs(rows, keep=(~is_silent).tolist())
        self._announce_sharing(batches)
        return batches

    def _announce_sharing(self, batches: list[Pack | PaddedRows]) -> None:
        """Say once what `share_prompts="auto"` has come to."""
        if self.args.share_prompts == "auto" and batches and not self._has_announced_sharing:
            self._has_announced_sharing = True
            run, alone = (sum(getattr(batch, name) for batch in batches) for name in ("num_tokens", "num_row_tokens"))
            logger.info(f"share_prompts='auto': {run} tokens are run for {alone} ({1 - run / alone:.0%} are shared)")

    def _padded_micro_batch(self, inputs: dict[str, Any], host: HostRows) -> PaddedRows:
        ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        fields = multimodal.row_inputs(multimodal.fields_of(inputs), slice(0, ids.shape[0]))
        return self._padded_rows(ids, mask, fields, is_scored=host.loss_mask, num_tokens=int(host.attention_mask.sum()))

    def _dealt(self, batches: list[Pack | PaddedRows], num_members: int) -> list[list[Pack | PaddedRows | None]]:
        """Batches for each micro-batch, the last of which always has one where gradients are wanted.

        Processes that share the model's weights out run equally many.
        """
        passes: list[Pack | PaddedRows | None] = [*batches]
        if self.accelerator.num_processes > 1 and self._shares_weights:
            most = self.accelerator.gather(torch.tensor([len(passes)], device=self.accelerator.device)).max()
            passes += [Filler] * (int(most) - len(passes))
        is_last = self._step + num_members >= self._window_end or num_members == 1
        if not passes and is_last:
            passes = [Filler]
        ends = [len(passes) * (i + 1) // num_members for i in range(num_members)]
        return [passes[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    # -- what it weighs ------------------------------------------------------------------------------------------------

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

    def _bonus(self, objective: Objective, counted: list[Tensor], threshold: Tensor | None = None) -> Bonus:
        """The bonus of micro-batches, of which `counted` [B, C] says which tokens count."""
        if objective.entropy_coef is None:
            return Bonus(threshold=threshold)
        weights = [objective.entropy_coef / (mask.sum().clamp(min=1) * self._accumulation).float() for mask in counted]
        each = [weight.expand(len(mask)) for weight, mask in zip(weights, counted, strict=True)]
        return Bonus(weight=torch.cat(each), threshold=threshold)


# a method whose override may change micro-batches one by one, as it is before anybody replaces it; from `rollouts`
WINDOW_SEAMS: dict[str, Any] = {}
FIELDS = (
    *("advantages", "completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps"),
    *("sampling_per_token_logps", "importance_sampling_ratio"),
)


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, C]: the tokens in the loss; what tools wrote is attended to, and not trained."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _merged(members: list[dict[str, Any]]) -> dict[str, Any]:
    """What the loss reads of all rows of some slices of one padded batch."""
    if len(members) == 1:
        return members[0]
    return {name: torch.cat([member[name] for member in members]) for name in FIELDS if name in members[0]}
