"""Scoring: log-probs and entropies of padded rows, packed where the model allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from grpo_fast import multimodal
from grpo_fast.attention import causal_lm, packed_attention
from grpo_fast.batch import Pack, PaddedRows, moved
from grpo_fast.host_rows import Rows
from grpo_fast.packing import pack_rows
from grpo_fast.padding import pad_rows
from grpo_fast.policy import score
from grpo_fast.rollout import unpadded_rows
from grpo_fast.trainer.memory_planning import MemoryTrainer

logger = logging.get_logger(__name__)

SHARE_PROMPTS: dict[str, Any] = {"auto": "auto", "always": True, "never": False}


class ScoringTrainer(MemoryTrainer):
    """The part of `GRPOTrainer` that turns rows into what the policy runs on."""

    temperature: float
    aux_loss_enabled: bool

    # whether `_scoring_attention` is in force
    _is_scoring = False
    # what the next rows to be scored are on the device, ids and mask, and on the host
    _copied: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @contextmanager
    def _scoring_attention(self, model: nn.Module) -> Iterator[None]:
        """The attention that rows are scored with: packed, or the model's own where rows stay padded; nests."""
        before, self._is_scoring = self._is_scoring, True
        try:
            with nullcontext() if self.pads_rows or self.unpackable is not None else packed_attention(model):
                yield
        finally:
            self._is_scoring = before

    @property
    def _runs_padded(self) -> bool:
        """Whether rows stay padded: where the model needs it, and where gradients are wanted outside a training step.

        There nobody keeps the packed attention until the backward pass, in which checkpointed layers run again, and
        the caller expects all gradients from that pass. Models that cannot pack need no such attention.
        """
        return self.pads_rows or (self.unpackable is None and torch.is_grad_enabled() and not self._is_scoring)

    def _packs(self, rows: Rows, *, keep: Sequence[bool] | None = None) -> list[Pack | PaddedRows]:
        """Rows as packs, or padded by length if the model cannot pack; all in one where an auxiliary loss counts.

        Their columns are those of the padded completions.

        All of a completion's tokens are run; those that `rows.is_scored` marks are scored.
        """
        device = self.accelerator.device
        counts_tokens = self.aux_loss_enabled
        common: dict[str, Any] = {
            "runs_everything": counts_tokens,
            "keep": keep,
        }
        packs: Sequence[Pack | PaddedRows]
        if self.unpackable is None:
            packs = pack_rows(
                rows.prompt_ids,
                rows.completion_ids,
                max_tokens=None if counts_tokens else self._max_tokens_per_pack(),
                fill_tokens=None if counts_tokens else self._fill_tokens_per_pack(),
                share_prompts=SHARE_PROMPTS[self.args.share_prompts],
                hidden_size=getattr(causal_lm(self.model).config.get_text_config(), "hidden_size", None),
                **common,
            )
        else:
            max_tokens = None if counts_tokens else self._fill_tokens_per_pack()
            packs = pad_rows(rows.prompt_ids, rows.completion_ids, max_tokens=max_tokens, **common)
        wanted = [pack.only(rows.is_scored[pack.rows, pack.columns]) for pack in packs]
        return [pack.to(device) for pack in wanted if pack.targets.numel() or counts_tokens]

    def _padded_rows(
        self, input_ids: Tensor, attention_mask: Tensor, fields: dict[str, Any], *, is_scored: Tensor, num_tokens: int
    ) -> PaddedRows:
        """Rows as they are, with the completion tokens scored that `is_scored` [B, C] bool marks; it is on the host.

        `num_tokens` is how many `attention_mask` marks.
        """
        device, width = input_ids.device, input_ids.shape[1]
        rows, columns = is_scored.nonzero(as_tuple=True)
        lengths = is_scored.sum(1).tolist()
        positions = moved(columns + width - is_scored.shape[1], device)
        predict = moved(rows * width + columns + width - is_scored.shape[1] - 1, device)
        rows, columns = moved(rows, device), moved(columns, device)
        return PaddedRows(
            predict=predict,
            targets=input_ids[rows, positions],
            rows=rows,
            columns=columns,
            row_ids=tuple(row for row, length in enumerate(lengths) if length),
            row_lengths=tuple(length for length in lengths if length),
            model_inputs={"input_ids": input_ids, "attention_mask": attention_mask, **fields},
            num_row_tokens=num_tokens,
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        num_images: list[int] | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        num_tiles: list[int] | None = None,
        image_sizes: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's seam: log-probs and entropies of the last `logits_to_keep` positions, under any model of the run.

        Args:
            model: The policy or the reference, wrapped or not.
            input_ids: [B, T] int64, prompts padded left, completions right.
            attention_mask: [B, T], 0 where padded or left out.
            logits_to_keep: C.
            batch_size: Rows a forward pass where rows stay padded; packs are bounded by `max_tokens_per_pack` instead.
            compute_entropy: Whether entropies are wanted.
            compute_aux_loss: Whether the auxiliary loss of a mixture of experts is wanted.
            pixel_values: Images as the processor lays them out; this and the rest are in the model's documentation.
            image_grid_thw: As above.
            num_images: Images of each row.
            pixel_attention_mask: As above.
            spatial_shapes: As above.
            num_tiles: Tiles of each row's images.
            image_sizes: As above.
            token_type_ids: [B, T].
            mm_token_type_ids: [B, T].
            image_position_ids: As above.

        Returns:
            Log-probs [B, C] and entropies [B, C] or None, fp32, 0.0 where masked; the auxiliary loss, 0-dim, or None.

        Raises:
            ValueError: If the auxiliary loss is asked for in a run without one, whose packs leave out tokens.
        """
        if compute_aux_loss and not self.aux_loss_enabled:
            raise ValueError("compute_aux_loss=True needs a run with router_aux_loss_coef: packs leave out tokens")
        fields = multimodal.given(
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            num_images=num_images,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            num_tiles=num_tiles,
            image_sizes=image_sizes,
            token_type_ids=token_type_ids,
            mm_token_type_ids=mm_token_type_ids,
            image_position_ids=image_position_ids,
        )
        pads = self._runs_padded
        batches = list(self._scored_batches(input_ids, attention_mask, logits_to_keep, batch_size, fields, pads=pads))
        logps = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        with nullcontext() if pads else self._scoring_attention(model):
            return self._scores_of(model, batches, logps, compute_entropy, compute_aux_loss)

    def _scores_of(
        self,
        model: nn.Module,
        batches: list[Pack | PaddedRows],
        logps: Tensor,
        compute_entropy: bool,
        compute_aux_loss: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The scores of all batches, put into `logps` [B, C] of zeros and others like it."""
        entropies = torch.zeros_like(logps) if compute_entropy else None
        aux_losses = []
        self._plan_checkpointing(batches, together=True)
        for i, scored in enumerate(batches):
            # what processes exchange in a forward pass they exchange once, however many passes each makes
            is_last = i == len(batches) - 1 and torch.is_grad_enabled()
            with nullcontext() if is_last else self.accelerator.no_sync(model), self.accelerator.autocast():
                logps_N, entropies_N, aux_loss = score(
                    model,
                    scored,
                    temperature=self.temperature,
                    return_entropy=compute_entropy,
                    return_aux_loss=compute_aux_loss,
                )
            logps = scored.unpack(logps_N, logps)
            if entropies is not None and entropies_N is not None:
                entropies = scored.unpack(entropies_N, entropies)
            aux_losses += [] if aux_loss is None else [aux_loss]
        return logps, entropies, torch.stack(aux_losses).mean() if compute_aux_loss else None

    def _on_host(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Copies on the host: those that are known, or made here, which waits for the device."""
        copied, self._copied = self._copied, None
        if copied is not None and copied[0] is input_ids and copied[1] is attention_mask:
            return copied[2], copied[3]
        return input_ids.cpu(), attention_mask.cpu()

    def _scored_batches(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None,
        fields: dict[str, Any],
        *,
        pads: bool,
    ) -> Iterator[Pack | PaddedRows]:
        B, width = input_ids.shape
        ids, mask = self._on_host(input_ids, attention_mask)
        prompt, completion = slice(None, width - logits_to_keep), slice(width - logits_to_keep, None)
        is_scored = mask[:, completion].bool()
        if not pads and not has_holes(mask):
            rows = Rows(
                prompt_ids=unpadded_rows(ids[:, prompt], mask[:, prompt]),
                completion_ids=unpadded_rows(ids[:, completion], mask[:, completion]),
                is_scored=is_scored,
            )
            yield from self._packs(rows)
            return
        for start in range(0, B, batch_size or max(B, 1)):
            some = slice(start, min(start + (batch_size or B), B))
            yield self._padded_rows(
                input_ids[some],
                attention_mask[some],
                multimodal.row_inputs(fields, some),
                is_scored=is_scored[some],
                num_tokens=int(mask[some].sum()),
            ).shifted(start)


def has_holes(attention_mask: Tensor) -> bool:
    """Whether a row of [B, T] leaves out tokens between others.

    The mask is on the host. Such a row runs padded, as it stands: what follows a hole is predicted at its last token,
    which sees all but the hole, and positions count it.
    """
    mask = attention_mask.bool()
    num_runs = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    is_found = bool((num_runs > 1).any())
    if is_found:
        logger.warning_once("a mask leaves out tokens inside rows: micro-batches with such rows run padded, not packed")
    return is_found
