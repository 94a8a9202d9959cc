"""The padded dict at the seams: TRL's format of a generation batch, its shuffle, its slices, its length metrics.

Letters: B rows, P padded prompt length, C padded completion length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pad(
    tensors: list[Tensor],
    padding_value: float = 0,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Tensor:
    """Tensors of one rank and different sizes as one, [len(tensors), greatest size of each dimension...].

    Args:
        tensors: At least one; 1-dimensional or more.
        padding_value: Fills what they leave.
        padding_side: Where the first dimension is filled, "left" or "right"; the others are filled on the right.
        pad_to_multiple_of: The first dimension becomes a multiple of it.

    Raises:
        ValueError: If `padding_side` is neither.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right'; it is {padding_side!r}")
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    if pad_to_multiple_of is not None:
        shape[0] = -(-shape[0] // pad_to_multiple_of) * pad_to_multiple_of
    out = tensors[0].new_full((len(tensors), *shape), padding_value)
    for row, tensor in zip(out, tensors, strict=True):
        starts = [shape[0] - tensor.shape[0] if padding_side == "left" else 0] + [0] * (tensor.dim() - 1)
        row[tuple(slice(o, o + size) for o, size in zip(starts, tensor.shape, strict=True))] = tensor
    return out


def padded_batch(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    sampling_logps: Sequence[Sequence[float | None]] | None,
    tool_mask: list[list[int]] | None = None,
    *,
    pad_token_id: int,
    multiple_of: int | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Left-padded prompts and right-padded completions with their masks, as TRL lays them out.

    Returns:
        `prompt_ids`, `prompt_mask` [B, P] and `completion_ids`, `completion_mask` [B, C], int64; and, if given,
        `sampling_per_token_logps` [B, C] fp32, 0.0 where padded and NaN where the sampler gave none, and `tool_mask`
        [B, C] int64, 0 on tokens that the model did not write.
    """

    def padded(rows: list[list[Any]], value: float, side: str, dtype: torch.dtype = torch.long) -> Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return pad(tensors, value, side, multiple_of).to(device)

    batch = {
        "prompt_ids": padded(prompt_ids, pad_token_id, "left"),
        "prompt_mask": padded([[1] * len(row) for row in prompt_ids], 0, "left"),
        "completion_ids": padded(completion_ids, pad_token_id, "right"),
        "completion_mask": padded([[1] * len(row) for row in completion_ids], 0, "right"),
    }
    if sampling_logps is not None:
        known = [[math.nan if logp is None else logp for logp in row] for row in sampling_logps]
        batch["sampling_per_token_logps"] = padded(known, 0.0, "right", torch.float32)
    if tool_mask is not None:
        batch["tool_mask"] = padded(tool_mask, 1, "right")
    return batch


def unpadded_rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The unmasked ids of each row, on the host."""
    keep = mask.bool().tolist()
    return [
        [token for token, kept in zip(row, row_keep, strict=True) if kept]
        for row, row_keep in zip(ids.tolist(), keep, strict=True)
    ]


def shuffle_sequence_dict(seq_dict: dict[str, Any]) -> dict[str, Any]:
    """The batch with its rows permuted by the global CPU generator, as TRL does, so that seeds give TRL's slices.

    Tensors with rows and sequences of values (which become lists) are permuted; 0-dim tensors, text, None and what else
    has no rows stay as they are.
    """
    permutation = torch.randperm(num_rows(seq_dict)).tolist()
    return {
        name: (value[permutation] if isinstance(value, Tensor) else [value[i] for i in permutation])
        if has_rows(value)
        else value
        for name, value in seq_dict.items()
    }


def split_tensor_dict(tensor_dict: dict[str, Any], num_chunks: int) -> list[dict[str, Any]]:
    """The batch cut into `num_chunks` equal runs of rows; what has no rows goes to each.

    As in TRL, rows that are too few for one more each are left out: a subclass that drops rows may leave such.
    """
    size = num_rows(tensor_dict) // num_chunks
    return [
        {name: value[i * size : (i + 1) * size] if has_rows(value) else value for name, value in tensor_dict.items()}
        for i in range(num_chunks)
    ]


def num_rows(batch: dict[str, Any]) -> int:
    """B, by the first entry that has rows."""
    return len(next(value for value in batch.values() if has_rows(value)))


def has_rows(value: Any) -> bool:
    """Whether an entry of a padded dict has a part for each row: a tensor or an array, a list; text has not."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str)


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
