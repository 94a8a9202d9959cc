"""Rows of one padded dict in the place of rows of another, whose prompts and completions are padded to other lengths.

Letters: B rows, P padded prompt length, C padded completion length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_fast.multimodal.layout import COUNTS, IMAGE_FIELDS, TOKEN_FIELDS, Fields, merge_rows, split_rows
from grpo_fast.rollout import has_rows

Batch = dict[str, Any]


def can_merge(batch: Batch, other: Batch) -> bool:
    """Whether rows of both can be in one batch: not where `multimodal.forward_fields` left out one's images only."""
    return _lost_images(batch) == _lost_images(other)


def _lost_images(batch: Batch) -> bool:
    return "num_images" in batch and batch["num_images"] is None


def replace_rows(batch: Batch, source: Batch, rows: Sequence[int], source_rows: Sequence[int], *, pad_id: int) -> Batch:
    """A padded dict with rows of another in the place of some of its own.

    Ids and masks are padded to the wider of the two, prompts on the left, completions on the right; and so is, with
    zeros, what else is as wide as these in both. What has no rows stays as in `batch`, `num_items_in_batch` too.

    Args:
        batch: Left as it is.
        source: Has the same keys; those of images may be missing in either, if none of its rows has one.
        rows: The rows of `batch` that go.
        source_rows: The rows of `source` that come in their places.
        pad_id: The id of padding.

    Raises:
        ValueError: If other keys are missing, or a value's type or shape differs in a way that no padding explains.
    """
    B = len(batch["completion_mask"])
    order = list(range(B))
    for row, source_row in zip(rows, source_rows, strict=True):
        order[row] = B + source_row
    batch, source, images = _without_images(batch, source, order)
    different = sorted(batch.keys() ^ source.keys())
    if different:
        raise ValueError(
            f"dynamic_sampling_rounds: two rollouts cannot make one batch, only one has {', '.join(different)} in its "
            "padded dict"
        )
    widths = _Widths(batch, source)
    fills = {"prompt_ids": pad_id, "completion_ids": pad_id, "tool_mask": 1}
    merged = {}
    for name, value in batch.items():
        other = source[name]
        if not has_rows(value) and not has_rows(other):
            merged[name] = value
            continue
        joined = widths.joined(name, value, other, fill=fills.get(name, 0))
        merged[name] = joined[order] if isinstance(joined, Tensor) else [joined[i] for i in order]
    return merged | images


class _Widths:
    """The rows of two batches and their padded lengths, and how values of both are laid out by them."""

    def __init__(self, batch: Batch, source: Batch) -> None:
        self.B, self.P = ([size(part["prompt_ids"]) for part in (batch, source)] for size in (len, _width))
        self.C = [_width(part["completion_ids"]) for part in (batch, source)]

    def joined(self, name: str, value: Any, other: Any, *, fill: int) -> Tensor | list[Any]:
        """The rows of both."""
        if has_rows(value) and has_rows(other) and [len(value), len(other)] == self.B:
            if not isinstance(value, Tensor) and not isinstance(other, Tensor):
                return [*value, *other]
            if isinstance(value, Tensor) and isinstance(other, Tensor) and value.dim() == other.dim():
                pair = [value, other] if value.dim() == 1 else self._aligned(name, [value, other], fill)
                if pair[0].shape[1:] == pair[1].shape[1:]:
                    return torch.cat(pair)
        raise ValueError(
            f"dynamic_sampling_rounds: two rollouts, of {self.B[0]} and {self.B[1]} rows, cannot make one batch: their "
            f"{name} is {_described(value)} and {_described(other)}"
        )

    def _aligned(self, name: str, values: list[Tensor], fill: int) -> list[Tensor]:
        """Values [B, width, ...] padded to one width, if both are as wide as the prompts, the completions, or both."""
        widths = [_width(value) for value in values]
        is_both = widths == [P + C for P, C in zip(self.P, self.C, strict=True)]
        is_prompt = widths == self.P and (widths != self.C or name.startswith("prompt"))
        is_completion = widths == self.C and not is_prompt
        padded = []
        for value, P, C in zip(values, self.P, self.C, strict=True):
            left = max(self.P) - P if is_prompt or is_both else 0
            right = max(self.C) - C if is_completion or is_both else 0
            # F.pad counts dimensions from the last
            padded.append(F.pad(value, (*(0, 0) * (value.dim() - 2), left, right), value=fill))
        return padded


def _width(tensor: Tensor) -> int:
    return tensor.shape[1]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} of length {len(value)}" if has_rows(value) else type(value).__name__


def _without_images(batch: Batch, source: Batch, order: list[int]) -> tuple[Batch, Batch, Fields]:
    """Both without what describes images, and that of the rows in `order`; tensors that are laid out by rows stay."""
    if all(part.get("num_images") is None for part in (batch, source)):
        return batch, source, {}
    names = (*IMAGE_FIELDS, *COUNTS)
    rows = [row for part in (batch, source) for row in _image_rows({k: v for k, v in part.items() if k in names}, part)]
    if any("num_tiles" in row for row in rows):
        rows = [{"num_tiles": 0} | row for row in rows]
    rest = [{k: v for k, v in part.items() if k not in names} for part in (batch, source)]
    for part, other in (rest, rest[::-1]):
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        part |= {name: torch.zeros_like(ids) for name in TOKEN_FIELDS if name in other and name not in part}
    return rest[0], rest[1], merge_rows([rows[i] for i in order])


def _image_rows(fields: Fields, batch: Batch) -> list[Fields]:
    fields = {name: value for name, value in fields.items() if value is not None}
    num_images = fields.setdefault("num_images", [0] * len(batch["completion_mask"]))
    return split_rows(fields, num_images=num_images, num_tiles=fields.get("num_tiles"))
