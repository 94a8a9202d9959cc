"""The types that travel between the parts: what an engine returns, and what the policy runs on.

Letters: B rows (one prompt with one completion), T packed tokens, N scored tokens (completion tokens that have a
log-prob), S attention segments.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host does not wait for the copy."""
    # from memory that may be paged out a CUDA copy is not asynchronous
    source = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return source.to(device, non_blocking=True)


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
            cu_queries=moved(self.cu_queries, device),
            cu_keys=moved(self.cu_keys, device),
            key_index=None if self.key_index is None else moved(self.key_index, device),
        )


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Tokens of R rows, one row after the other.

    Attributes:
        member: [N] int64, the run a token is in, from 0 to R - 1.
        lengths: [R] int64.
    """

    member: Tensor
    lengths: Tensor

    @staticmethod
    def of(row_lengths: tuple[int, ...], device: torch.device) -> Runs:
        """Runs of so many tokens; does not wait for the device."""
        lengths = torch.tensor(row_lengths, dtype=torch.int64)
        member = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        return Runs(member=moved(member, device), lengths=moved(lengths, device))

    def sums(self, values: Tensor, some: slice = slice(None)) -> Tensor:
        """Sums over each run of the [N] values, or of the values of a slice of the N tokens. [R]."""
        zeros = torch.zeros(self.lengths.shape, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.member[some], values)


@dataclass(frozen=True, kw_only=True)
class ScoredTokens:
    """The tokens of some rows whose log-probs are wanted.

    Attributes:
        predict: [N] int64, the position whose hidden state predicts the scored token, in the rows laid end to end.
        targets: [N] int64, the scored token.
        rows: [N] int64, the row of the scored token in the padded batch.
        columns: [N] int64, its column in the padded completion tensor. Tokens are ordered by row, then column.
        row_ids: The rows with any scored token, ascending; on the host, as what follows.
        row_lengths: How many scored tokens each of them has.
    """

    predict: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    row_ids: tuple[int, ...]
    row_lengths: tuple[int, ...]

    def only(self, is_wanted: Tensor) -> Self:
        """The same rows with the tokens scored that `is_wanted` [N] bool marks; on the host."""
        rows = self.rows[is_wanted]
        row_ids, row_lengths = torch.unique_consecutive(rows, return_counts=True)
        return replace(
            self,
            predict=self.predict[is_wanted],
            targets=self.targets[is_wanted],
            rows=rows,
            columns=self.columns[is_wanted],
            row_ids=tuple(row_ids.tolist()),
            row_lengths=tuple(row_lengths.tolist()),
        )

    def shifted(self, first_row: int) -> Self:
        """The same tokens in a batch that these rows stand `first_row` rows down in."""
        return replace(self, rows=self.rows + first_row, row_ids=tuple(row + first_row for row in self.row_ids))

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on `device`, but for a layout, which an attention plan moves; does not wait."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return replace(self, **{name: _moved(value, device) for name, value in fields.items()})

    def unpack(self, values: Tensor, out: Tensor) -> Tensor:
        """Add `values` [N] into the padded `out` [B, C] at their rows and columns; differentiable, not in place."""
        return out.index_put((self.rows, self.columns), values, accumulate=True)


@dataclass(frozen=True, kw_only=True)
class Pack(ScoredTokens):
    """Rows laid end to end without padding.

    A row is never split over packs. Rows of a pack that begin alike may share those tokens; `predict` then names a
    shared token once a row.

    Attributes:
        input_ids: [1, T] int64.
        position_ids: [1, T] int64, from 0 in each row.
        token_rows: [1, T] int64, how many rows a token belongs to.
        layout: Which tokens attend to which; on the host.
        num_row_tokens: What the rows would take one by one, the sum of `token_rows`.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_rows: Tensor
    layout: Layout
    num_row_tokens: int

    @property
    def width(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """T: all are run, and none is padding."""
        return self.width

    @property
    def num_run(self) -> int:
        """T."""
        return self.width


@dataclass(frozen=True, kw_only=True)
class PaddedRows(ScoredTokens):
    """Rows as the model's own forward pass takes them, for models and losses that need that.

    Attributes:
        model_inputs: `input_ids` and `attention_mask` [B, T], and what belongs to images.
        num_row_tokens: Tokens of the rows without their padding; on the host.
    """

    model_inputs: dict[str, Any]
    num_row_tokens: int

    @property
    def width(self) -> int:
        """T."""
        return int(self.model_inputs["input_ids"].shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.num_row_tokens

    @property
    def num_run(self) -> int:
        """B T, padding included."""
        return int(self.model_inputs["input_ids"].numel())


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    return moved(value, device) if isinstance(value, Tensor) else value
