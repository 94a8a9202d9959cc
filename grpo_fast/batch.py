"""The types that travel between the parts: what an engine returns, and what the policy runs on.

Letters: B rows (one prompt with one completion), T packed tokens, N scored tokens (completion tokens that have a
log-prob), S attention segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
        logps: The sampled tokens' log-probs under the distribution they were drawn from (temperature, top-p and so on
            applied), or None if the engine does not report them.
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
class Pack:
    """Rows laid end to end without padding, and the tokens whose log-probs are wanted.

    A row is never split over packs. Rows of a pack that share a prompt may share its tokens; `predict` then names the
    prompt's last token once per row.

    Attributes:
        input_ids: [1, T] int64.
        position_ids: [1, T] int64, from 0 in each row.
        layout: Which tokens attend to which.
        predict: [N] int64, the packed position whose hidden state predicts the scored token.
        targets: [N] int64, the scored token.
        rows: [N] int64, the row of the scored token in the padded batch the pack was cut from.
        columns: [N] int64, its column in the padded completion tensor. Tokens are ordered by row, then column.
        row_ids: The padded batch's rows that this pack holds, ascending.
        row_lengths: How many scored tokens each of them has.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    predict: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    row_ids: tuple[int, ...]
    row_lengths: tuple[int, ...]

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

    def unpack(self, values: Tensor, out: Tensor) -> Tensor:
        """Add `values` [N] into the padded `out` [B, C] at their rows and columns; differentiable, not in place."""
        return out.index_put((self.rows, self.columns), values, accumulate=True)
