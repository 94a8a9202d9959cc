"""The padded dict at the seams: TRL's format of a generation batch, its shuffle, its slices, its length metrics.

Letters: B rows, P padded prompt length, C padded completion length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pad(
    rows: list[list[Any]], *, value: float, side: str, dtype: torch.dtype, multiple_of: int | None = None
) -> Tensor:
    """Rows of different lengths as one tensor [B, longest], filled with `value` on `side` ("left" or "right")."""
    width = max((len(row) for row in rows), default=0)
    if multiple_of:
        width = -(-width // multiple_of) * multiple_of
    out = torch.full((len(rows), width), value, dtype=dtype)
    for i, row in enumerate(rows):
        if row:
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            out[i, where] = torch.tensor(row, dtype=dtype)
    return out


def padded_batch(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    sampling_logps: list[list[float]] | None,
    *,
    pad_token_id: int,
    multiple_of: int | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Left-padded prompts and right-padded completions with their masks, as TRL lays them out.

    Returns:
        `prompt_ids`, `prompt_mask` [B, P] and `completion_ids`, `completion_mask` [B, C], int64; and, if given,
        `sampling_per_token_logps` [B, C] fp32, 0.0 where padded.
    """

    def padded(rows: list[list[Any]], value: float, side: str, dtype: torch.dtype = torch.long) -> Tensor:
        return pad(rows, value=value, side=side, dtype=dtype, multiple_of=multiple_of).to(device)

    batch = {
        "prompt_ids": padded(prompt_ids, pad_token_id, "left"),
        "prompt_mask": padded([[1] * len(row) for row in prompt_ids], 0, "left"),
        "completion_ids": padded(completion_ids, pad_token_id, "right"),
        "completion_mask": padded([[1] * len(row) for row in completion_ids], 0, "right"),
    }
    if sampling_logps is not None:
        batch["sampling_per_token_logps"] = padded(sampling_logps, 0.0, "right", torch.float32)
    return batch


def unpadded_rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The unmasked ids of each row, on the host."""
    keep = mask.bool().tolist()
    return [
        [token for token, kept in zip(row, row_keep, strict=True) if kept]
        for row, row_keep in zip(ids.tolist(), keep, strict=True)
    ]


def shuffle_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its rows permuted by the global CPU generator, as TRL does, so that seeds give TRL's slices."""
    permutation = torch.randperm(num_rows(batch))
    return {name: _select(value, permutation) for name, value in batch.items()}


def split_rows(batch: dict[str, Any], num_slices: int) -> list[dict[str, Any]]:
    """The batch cut into `num_slices` equal runs of rows; what has no rows (0-dim tensors, None) goes to each."""
    return [
        {name: _select(value, rows) for name, value in batch.items()}
        for rows in torch.arange(num_rows(batch)).chunk(num_slices)
    ]


def num_rows(batch: dict[str, Any]) -> int:
    """B."""
    return len(batch["completion_ids"])


def _select(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.dim() else value
    if isinstance(value, list):
        return [value[i] for i in rows.tolist()]
    return value


def length_metrics(lengths: Tensor, is_truncated: Tensor) -> dict[str, float]:
    """TRL's `completions/...` metrics from the lengths [N] and truncations [N] of all processes."""
    lengths, terminated = lengths.float(), lengths[~is_truncated].float()
    if terminated.numel() == 0:
        terminated = torch.zeros(1)
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": is_truncated.float().mean().item(),
        "completions/mean_terminated_length": terminated.mean().item(),
        "completions/min_terminated_length": terminated.min().item(),
        "completions/max_terminated_length": terminated.max().item(),
    }
