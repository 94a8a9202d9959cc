"""The types that travel between the parts: what an engine returns, and what the policy runs on.

Letters: B rows (one prompt with one completion), T packed tokens, N scored tokens (completion tokens that have a
log-prob), S attention segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn, in the names vLLM and transformers share.

    `temperature=0` is greedy. `top_k=0` and `top_p=1.0` keep the whole vocabulary. `extra` is handed to the engine's
    own parameter object and wins over the other fields.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What an engine returns for a list of prompts, in the order of the prompts.

    Attributes:
        ids: The completion's tokens, the end-of-sequence token included when the model produced it. May be empty.
        logps: The sampled tokens' log-probs, of the logits over the temperature and over the whole vocabulary, whatever
            else the sampler left out; NaN where it has none. None if the engine reports no log-probs.
    """

    ids: list[list[int]]
    logps: list[list[float]] | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which packed tokens attend to which: S segments of consecutive queries, each with a list of keys.

    Segment s holds the queries `cu_queries[s] : cu_queries[s + 1]` of the pack. Its keys are the packed tokens
    `key_index[cu_keys[s] : cu_keys[s + 1]]`, and the last query sees the last key (bottom-right causal), so a
    completion whose prompt is stored elsewhere in the pack lists the prompt's tokens first and its own after.

    Attributes:
        cu_queries: [S + 1] int32, running sum of the segments' query counts; the last entry is T.
        cu_keys: [S + 1] int32, running sum of the segments' key counts.
        key_index: [sum of key counts] int64, or None if every segment's keys are its own queries.
        query_lengths: The query counts on the host, so that no kernel launch waits for the device.
        key_lengths: The key counts on the host.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    key_index: Tensor | None
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Layout:
        """The same layout with its tensors on `device`."""
        return replace(
            self,
            cu_queries=self.cu_queries.to(device),
            cu_keys=self.cu_keys.to(device),
            key_index=None if self.key_index is None else self.key_index.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """The tokens of some rows whose log-probs are wanted.

    Attributes:
        predict: [N] int64, the position whose hidden state predicts the scored token, in the rows laid end to end.
        targets: [N] int64, the scored token.
        rows: [N] int64, the row of the scored token in the padded batch.
        columns: [N] int64, its column in the padded completion tensor. Tokens are ordered by row, then column.
        row_lengths: How many scored tokens each row with any has.
    """

    predict: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    row_lengths: tuple[int, ...]

    def only(self, is_wanted: Tensor) -> Self:
        """The same rows with the tokens scored that `is_wanted` [N] bool marks; on the host."""
        rows = self.rows[is_wanted]
        return replace(
            self,
            predict=self.predict[is_wanted],
            targets=self.targets[is_wanted],
            rows=rows,
            columns=self.columns[is_wanted],
            row_lengths=tuple(torch.unique_consecutive(rows, return_counts=True)[1].tolist()),
        )

    def shifted(self, first_row: int) -> Self:
        """The same tokens in a batch that these rows stand `first_row` rows down in."""
        return replace(self, rows=self.rows + first_row)

    def unpack(self, values: Tensor, out: Tensor) -> Tensor:
        """Add `values` [N] into the padded `out` [B, C] at their rows and columns; differentiable, not in place."""
        return out.index_put((self.rows, self.columns), values, accumulate=True)


@dataclass(frozen=True, kw_only=True)
class Pack(ScoredTokens):
    """Rows laid end to end without padding.

    A row is never split over packs. Rows of a pack that share a prompt may share its tokens; `predict` then names the
    prompt's last token once per row.

    Attributes:
        input_ids: [1, T] int64.
        position_ids: [1, T] int64, from 0 in each row.
        layout: Which tokens attend to which.
        row_ids: The padded batch's rows that this pack holds, ascending.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    row_ids: tuple[int, ...]

    @property
    def width(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on `device`."""
        return Pack(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            layout=self.layout.to(device),
            predict=self.predict.to(device),
            targets=self.targets.to(device),
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            row_ids=self.row_ids,
            row_lengths=self.row_lengths,
        )


@dataclass(frozen=True, kw_only=True)
class PaddedRows(ScoredTokens):
    """Rows as the model's own forward pass takes them, for models and losses that need that.

    Attributes:
        model_inputs: `input_ids` and `attention_mask` [B, T], and what belongs to images.
    """

    model_inputs: dict[str, Any]

    @property
    def width(self) -> int:
        """T."""
        return self.model_inputs["input_ids"].shape[1]

    def to(self, device: torch.device) -> PaddedRows:
        """The same rows with their tensors on `device`."""
        return replace(
            self,
            predict=self.predict.to(device),
            targets=self.targets.to(device),
            rows=self.rows.to(device),
            columns=self.columns.to(device),
            model_inputs={
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.model_inputs.items()
            },
        )
