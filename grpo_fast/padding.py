"""Cutting rows of tokens into padded batches of similar lengths, for models that cannot run packed.

Letters: B rows of a batch (each one prompt with one completion), T its columns, N its scored tokens.

Prompt and completion stand end to end from column 0 and the padding follows them, so that no token of a causal model,
be it one with a recurrent state, comes after padding, and positions count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.batch import PaddedRows
from grpo_fast.packing import rows_to_run


def pad_rows(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    max_tokens: int | None,
    runs_everything: bool = False,
    keep: Sequence[bool] | None = None,
    pad_token_id: int = 0,
) -> list[PaddedRows]:
    """Sort rows by length and cut that order into the fewest padded batches, evenly filled.

    Rows with an empty completion and rows with `keep` False have nothing to score and take no space. The last token of
    a completion is scored but not run.

    Args:
        prompt_ids: B lists of token ids, none empty where the row is scored.
        completion_ids: B lists of token ids, possibly empty.
        max_tokens: Most tokens of a batch with its padding, rows times columns; None for no bound. A row longer than
            this makes a batch of its own.
        runs_everything: Run the last token of a completion, and prompts without one, for losses that count tokens.
        keep: B flags, None for all rows.
        pad_token_id: What the padding holds; any token of the vocabulary does.

    Returns:
        The batches, on the host, by their first row, with `input_ids` and `attention_mask` [B, T] int64. A batch's rows
        keep their order. Every token of a kept completion is scored in exactly one.

    Raises:
        ValueError: If lengths differ, `max_tokens` is not positive, or a scored row has an empty prompt.
    """
    bodies = rows_to_run(prompt_ids, completion_ids, max_tokens=max_tokens, runs_everything=runs_everything, keep=keep)
    lengths = {row: len(prompt_ids[row]) + len(body) for row, body in bodies.items()}
    order = sorted(bodies, key=lambda row: -lengths[row])
    cuts = _even_cuts([lengths[row] for row in order], max_tokens)
    batches = sorted(sorted(order[low:high]) for low, high in cuts)
    return [_build(batch, prompt_ids, completion_ids, bodies, pad_token_id) for batch in batches]


def _even_cuts(lengths: list[int], max_tokens: int | None) -> list[tuple[int, int]]:
    """The fewest runs of descending `lengths` that keep the bound; of those, the ones whose largest is smallest."""
    if max_tokens is None:
        return [(0, len(lengths))] if lengths else []
    fewest = len(_cuts(lengths, max_tokens))
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cuts(lengths, middle)) == fewest else (middle + 1, high)
    return _cuts(lengths, low)


def _cuts(lengths: list[int], max_tokens: int) -> list[tuple[int, int]]:
    """Runs of descending `lengths`, each filled before the next: no other runs that keep the bound are fewer."""
    cuts = []
    start = 0
    while start < len(lengths):
        stop = min(start + max(1, max_tokens // lengths[start]), len(lengths))
        cuts.append((start, stop))
        start = stop
    return cuts


def _build(
    rows: list[int],
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    bodies: dict[int, list[int]],
    pad_token_id: int,
) -> PaddedRows:
    ids = [prompt_ids[row] + bodies[row] for row in rows]
    lengths = [len(row_ids) for row_ids in ids]
    width = max(lengths)
    counts = [len(completion_ids[row]) for row in rows]
    starts = [i * width + len(prompt_ids[row]) - 1 for i, row in enumerate(rows)]
    predict = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return PaddedRows(
        predict=torch.cat(predict),
        targets=torch.tensor([token for row in rows for token in completion_ids[row]], dtype=torch.int64),
        rows=torch.repeat_interleave(torch.tensor(rows), torch.tensor(counts)),
        columns=torch.cat([torch.arange(count) for count in counts]),
        row_ids=tuple(row for row, count in zip(rows, counts, strict=True) if count),
        row_lengths=tuple(count for count in counts if count),
        model_inputs={
            "input_ids": torch.tensor([row_ids + [pad_token_id] * (width - len(row_ids)) for row_ids in ids]),
            "attention_mask": _mask(lengths, width),
        },
        num_row_tokens=sum(lengths),
    )


def _mask(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
