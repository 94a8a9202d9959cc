"""Which part of the tensors that describe images belongs to which row.

Processors lay images out in six ways. Their tensors hold, along the first dimension,
- patches, with a grid an image (`image_grid_thw`: Qwen-VL);
- images, with the positions of their patches (`image_position_ids`: Gemma 4);
- tiles, with their shapes (`spatial_shapes`: LFM2-VL) or without (InternVL, Gemma 3's pan and scan): `num_tiles`;
- images, with their sizes (`image_sizes`: LLaVA-NeXT) or without (LLaVA, Gemma 3);
- rows, each padded to the row with the most images (`pixel_attention_mask`: Idefics, SmolVLM).
`num_images` and `num_tiles`, lists with an entry a row, say how many are whose.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKEN_FIELDS = ("token_type_ids", "mm_token_type_ids")
IMAGE_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
)
COUNTS = ("num_images", "num_tiles")
FIELDS = (*IMAGE_FIELDS, *TOKEN_FIELDS, *COUNTS)

Fields = dict[str, Any]


def given(**fields: Any) -> Fields:
    """Those that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def fields_of(batch: dict[str, Any]) -> Fields:
    """What a padded dict holds for images, by the names `_get_per_token_logps_and_entropies` takes them under."""
    return given(**{name: batch.get(name) for name in FIELDS})


def row_inputs(fields: Fields, rows: slice) -> dict[str, Tensor]:
    """What the model's forward pass takes for some rows of a padded batch.

    Args:
        fields: `fields_of` a padded batch.
        rows: A slice without a step.

    Returns:
        Its tensors, without what describes images where none of the rows has one.
    """
    counts = _entries(fields)
    num_images = fields.get("num_images")
    has_images = num_images is None or sum(num_images[rows]) > 0
    inputs = {}
    for name, value in fields.items():
        if name in COUNTS or (name in IMAGE_FIELDS and not has_images):
            continue
        if name in counts:
            starts = [0, *accumulate(counts[name])]
            first, last, _ = rows.indices(len(counts[name]))
            inputs[name] = value[starts[first] : starts[max(first, last)]]
        else:
            inputs[name] = value[rows]
    return inputs


def split_pixel_values_by_grid(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a list of tensors, one a row, in place of each tensor that is not laid out by rows.

    So that rows can be permuted and cut; `unsplit_pixel_values_by_grid` is the way back.

    Unlike TRL's this knows a tensor padded by rows by its `pixel_attention_mask`, so that as many rows as images
    in all are no reason to split it by images.

    Raises:
        ValueError: If `pixel_values` has more or fewer entries than the counts say.
    """
    if "pixel_values" not in batch or batch.get("num_images") is None:
        return batch
    return batch | {name: list(batch[name].split(counts)) for name, counts in _entries(batch).items()}


def unsplit_pixel_values_by_grid(batch: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `split_pixel_values_by_grid`."""
    return batch | {name: torch.cat(batch[name]) for name in IMAGE_FIELDS if isinstance(batch.get(name), list)}


def split_rows(fields: Fields, *, num_images: list[int], num_tiles: list[int] | None = None) -> list[Fields]:
    """The image fields and token types of each row. Tensors keep their first dimension, lists give their entries."""
    counts = _entries(fields | given(num_images=num_images, num_tiles=num_tiles))
    rows: list[Fields] = [{} for _ in num_images]
    for name, value in fields.items():
        parts = value if isinstance(value, list) else value.split(counts.get(name, 1))
        for row, part in zip(rows, parts, strict=True):
            row[name] = part
    return rows


def merge_rows(rows: list[Fields]) -> Fields:
    """The opposite of `split_rows`, for rows that may come from different batches.

    Tensors are padded with zeros to a common shape. A row without the tensors of others gets none, or zeros where these
    have an entry a row.
    """
    merged: Fields = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row.get(name) for row in rows]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not tensors:
            merged[name] = parts
            continue
        shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        if _is_by_rows({key for row in rows for key in row}):
            parts = [tensors[0].new_zeros(1, *shape) if part is None else part for part in parts]
        merged[name] = torch.cat([_padded(part, shape) for part in parts if part is not None])
    return merged


def _padded(tensor: Tensor, shape: list[int]) -> Tensor:
    """With zeros behind every dimension but the first."""
    # F.pad counts dimensions from the last
    missing = [size - own for own, size in zip(tensor.shape[1:], shape, strict=True)]
    return F.pad(tensor, [end for size in reversed(missing) for end in (0, size)])


def _is_by_rows(names: Any) -> bool:
    return "pixel_attention_mask" in names and "spatial_shapes" not in names


def _entries(fields: Fields) -> dict[str, list[int]]:
    """How many entries of its first dimension each row has, for the tensors that do not have one a row."""
    num_images, num_tiles = fields.get("num_images"), fields.get("num_tiles")
    pixels = fields.get("pixel_values")
    if num_images is None or pixels is None or _is_by_rows(fields):
        return {}
    names = [name for name in IMAGE_FIELDS if name in fields]
    if "image_grid_thw" in fields:
        patches = fields["image_grid_thw"].prod(-1)
        per_row = [int(part.sum()) for part in patches.split(num_images)]
        counts = {"pixel_values": per_row, "image_grid_thw": num_images}
    elif "spatial_shapes" in fields:
        counts = dict.fromkeys(names, num_tiles)
    elif num_tiles is not None:
        counts = {"pixel_values": num_tiles}
    elif pixels.shape[0] == sum(num_images):
        counts = dict.fromkeys(names, num_images)
    else:
        # a tensor with an entry a row that says nothing about itself
        counts = {"image_sizes": num_images} if "image_sizes" in fields else {}
    if "pixel_values" in counts and sum(counts["pixel_values"]) != pixels.shape[0]:
        raise ValueError(
            f"pixel_values must have {sum(counts['pixel_values'])} entries for the images of {len(num_images)} rows, "
            f"got {pixels.shape[0]}"
        )
    return counts
