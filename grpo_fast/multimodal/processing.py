"""Prompts with images through a processor: as token ids, for generation, and for the forward pass.

A processor turns each image into numbers and into placeholder tokens of the prompt. It sees a conversation once,
however many rows share it, and what it returns for the rows' prompts serves the forward pass too.

Letters: B rows, P padded prompt length, C padded completion length.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_fast.multimodal.layout import IMAGE_FIELDS, TOKEN_FIELDS, Fields, given, merge_rows, split_rows
from grpo_fast.multimodal.messages import RowImages, images_of_messages, merged_images, prepare_multimodal_messages

logger = logging.getLogger(__name__)

# the number of images a row in LLaVA-OneVision, whose model assumes one
IMPLIED_FIELDS = ("batch_num_images",)

# a prompt's ids, and what the processor makes of its images
Encoding = tuple[list[int], Fields]


def tokenize(
    prompts: list[Any],
    processing_class: Any,
    chat_template_kwargs: dict[str, Any],
    *,
    tools: Sequence[list[Any] | None] | None = None,
    chat_template: str | None = None,
) -> tuple[list[list[int]], RowImages | None, Fields]:
    """Prompts as token ids, with their images and what the processor makes of these.

    Rows that are the same, images being the same objects, go through the processor once.

    Args:
        prompts: Conversations, or texts without images.
        processing_class: The processor.
        chat_template_kwargs: For its chat template.
        tools: The tools each row's prompt is rendered with, or None for no tools.
        chat_template: A template in place of the processor's own.

    Returns:
        The ids; the images of each row, or None if no row has any; and on the host, by the names the model takes them
        under, image fields as tensors over all rows (`grpo_fast.multimodal.layout`) and token types as a list a row.

    Raises:
        ValueError: If the processor returns fields that are not known here (videos, sound), or images that cannot be
            told apart by rows.
    """
    if isinstance(prompts[0], str):
        return processing_class(text=prompts)["input_ids"], None, {}
    prompts = [prepare_multimodal_messages(prompt) for prompt in prompts]
    images = [images_of_messages(prompt) or None for prompt in prompts]
    tools = [None] * len(prompts) if tools is None else tools
    keys = [(_identity(row_tools), _identity(prompt)) for row_tools, prompt in zip(tools, prompts, strict=True)]
    firsts: dict[Hashable, int] = {}
    by_tools: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        if key not in firsts:
            firsts[key] = row
            by_tools.setdefault(key[0], []).append(row)
    encoded: dict[int, Encoding] = {}
    for rows in by_tools.values():
        output = processing_class.apply_chat_template(
            conversation=[prompts[row] for row in rows],
            # an empty list would make some templates write about tools
            tools=tools[rows[0]] or None,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **chat_template_kwargs,
        )
        encodings = _encodings(processing_class, output, [images[row] for row in rows])
        encoded.update(zip(rows, encodings, strict=True))
    encodings = [encoded[firsts[key]] for key in keys]
    ids = [list(row_ids) for row_ids, _ in encodings]
    return ids, images if any(images) else None, merge_rows([fields for _, fields in encodings])


def generation_fields(
    fields: Fields, prompt_ids: list[list[int]], processing_class: Any, *, has_tool_images: bool = False
) -> Fields:
    """What `model.generate` takes beside the prompts.

    Args:
        fields: From `tokenize` or `turn_fields`.
        prompt_ids: The prompts.
        processing_class: The processor.
        has_tool_images: Whether tools returned some of the images; `fields` may then lack token types.

    Returns:
        Tensors of images, and lists of each prompt's token types, which the engine pads as it pads the prompts.
    """
    inputs = _normalized(fields)
    if has_tool_images:
        own = set(processing_class.model_input_names) - set(processing_class.tokenizer.model_input_names)
        names = [name for name in TOKEN_FIELDS if name in own and name not in inputs]
        inputs |= dict.fromkeys(names, _types_of_rows(processing_class, prompt_ids))
    return inputs


def turn_fields(
    fields: Fields,
    prompt_ids: list[list[int]],
    processing_class: Any,
    *,
    images: RowImages | None,
    tool_images: list[list[Any]],
    rows: list[int],
    turn_ids: list[list[int]],
) -> tuple[RowImages | None, Fields]:
    """Images and fields for another turn of some rows, whose prompts have grown.

    Args:
        fields: From `tokenize`, for the prompts of all rows.
        prompt_ids: These prompts.
        processing_class: The processor.
        images: Their images.
        tool_images: What tools have returned so far, of all rows.
        rows: The rows that go on.
        turn_ids: What these go on from: the prompt and all that followed.

    Returns:
        The rows' images, or None, and their fields, as `_generate_single_turn` takes them.
    """
    all_images = merged_images(images, tool_images)
    row_images = None if all_images is None else [all_images[row] for row in rows]
    has_images = row_images is not None and any(row_images)
    names = [name for name in TOKEN_FIELDS if name in fields]
    if any(tool_images):
        turn = _encode_images(processing_class, row_images)[0] if row_images is not None and has_images else {}
        return row_images, turn | dict.fromkeys(names, _types_of_rows(processing_class, turn_ids))
    parts = _split(processing_class, _normalized(fields), images, prompt_ids)
    turn = merge_rows([parts[row] for row in rows])
    for name in names:
        turn[name] = [types + [0] * (len(ids) - len(types)) for types, ids in zip(turn[name], turn_ids, strict=True)]
    return row_images, turn if has_images else {name: turn[name] for name in names}


def forward_fields(
    fields: Fields,
    batch: dict[str, Any],
    images: RowImages,
    processing_class: Any,
    *,
    tool_images: list[list[Any]] | None = None,
) -> Fields:
    """What a padded dict holds for images.

    Token types are 0 over the completion; where tools have returned images they say of every token whether it stands
    for one. If the text has more or fewer such tokens than the images, because the model wrote one or a completion ends
    within an image, the model would refuse it: then the whole batch goes without images, as in TRL, with a warning.

    Args:
        fields: From `tokenize`, for the rows' prompts; {} if they were made elsewhere, then the images are processed.
        batch: `prompt_ids`, `prompt_mask` [B, P] and `completion_ids` [B, C].
        images: All images of each row, those of tools included.
        processing_class: The processor.
        tool_images: What tools have returned in each row.

    Returns:
        Tensors on the host by the names the model takes them under, token types [B, P + C] int64; and lists with an
        entry a row: `num_images`, None where the images were left out, and `num_tiles` where images are cut.

    Raises:
        ValueError: As `tokenize`.
    """
    prompts, completions = batch["prompt_ids"].cpu(), batch["completion_ids"].cpu()
    ids, width = torch.cat([prompts, completions], dim=1), prompts.shape[1]
    types = _token_types(processing_class, ids)
    has_tool_images = tool_images is not None and any(tool_images)
    if has_tool_images or "pixel_values" not in fields:
        forward, names, expected = _encode_images(processing_class, images)
    else:
        forward, expected = _normalized(fields), (types[:, :width] == 1).sum(1).tolist()
        names = [name for name in TOKEN_FIELDS if name in forward]
    if (types == 1).sum(1).tolist() != expected:
        logger.warning(
            "images are left out of this batch: its completions hold an image token without an image, or half an image"
        )
        return dict.fromkeys(names, torch.zeros_like(types)) | {"num_images": None}
    lengths = batch["prompt_mask"].sum(1).tolist()
    for name in names:
        is_of_prompts = [len(row) for row in forward.get(name, ())] == lengths
        of_prompts = _left_padded(forward[name], width) if is_of_prompts else types[:, :width]
        forward[name] = types if has_tool_images else torch.cat([of_prompts, torch.zeros_like(completions)], dim=1)
    num_images = _num_images(images)
    num_tiles = _tiles_of_rows(processing_class, forward, num_images, ids.tolist())
    return forward | given(num_images=num_images, num_tiles=num_tiles)


def _identity(value: Any) -> Hashable:
    """Equal for values that are: containers and text by what they hold, images and such by being the same object."""
    if isinstance(value, dict):
        return tuple((name, _identity(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return (list, *map(_identity, value))
    return (type(value), value) if isinstance(value, Hashable) else ("object", id(value))


def _encodings(processing_class: Any, output: Any, images: RowImages) -> list[Encoding]:
    """The rows of what a processor returns."""
    known = {*IMAGE_FIELDS, *TOKEN_FIELDS, "input_ids", "attention_mask"}
    if max(_num_images(images)) <= 1:
        known |= {*IMPLIED_FIELDS}
    unknown = sorted(set(output) - known)
    if unknown:
        raise ValueError(
            f"{type(processing_class).__name__} returns {', '.join(unknown)}, which is not supported: prompts may hold "
            "text and images"
        )
    fields = _normalized({name: value for name, value in output.items() if name in (*IMAGE_FIELDS, *TOKEN_FIELDS)})
    ids = output["input_ids"]
    return list(zip(ids, _split(processing_class, fields, images, ids), strict=True))


def _encode_images(processing_class: Any, images: RowImages) -> tuple[Fields, list[str], list[int]]:
    """What a processor makes of images without their prompts.

    Returns:
        Image fields of all rows, the names of the token types that go with them, and how many tokens of a text stand
        for each row's images.
    """
    keys = [tuple(id(image) for image in row or []) for row in images]
    distinct = {key: row for key, row in zip(keys, images, strict=True) if row}
    output = processing_class(
        images=[list(row) for row in distinct.values()],
        text=[processing_class.image_token * len(row) for row in distinct.values()],
    )
    names = [name for name in TOKEN_FIELDS if name in output]
    encoded = dict(zip(distinct, _encodings(processing_class, output, list(distinct.values())), strict=True))
    encodings: list[Encoding] = [encoded.get(key, ([], {})) for key in keys]
    num_tokens = [types.count(1) for types in _types_of_rows(processing_class, [ids for ids, _ in encodings])]
    fields = merge_rows([row_fields for _, row_fields in encodings])
    return {name: value for name, value in fields.items() if name not in names}, names, num_tokens


def _normalized(fields: Fields) -> Fields:
    """Image fields as tensors, token types as lists; processors return arrays, tensors or lists of either."""
    normalized = {}
    for name, value in fields.items():
        if name in TOKEN_FIELDS:
            normalized[name] = value.tolist() if isinstance(value, Tensor | np.ndarray) else list(value)
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            normalized[name] = torch.stack(value)
        else:
            normalized[name] = torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value))
    return normalized


def _split(processing_class: Any, fields: Fields, images: RowImages | None, ids: list[list[int]]) -> list[Fields]:
    """The fields of each row, of normalized ones."""
    num_images = [0] * len(ids) if images is None else _num_images(images)
    num_tiles = _tiles_of_rows(processing_class, fields, num_images, ids)
    return split_rows(fields, num_images=num_images, num_tiles=num_tiles)


def _num_images(images: RowImages) -> list[int]:
    return [len(row or []) for row in images]


def _tiles_of_rows(
    processing_class: Any, fields: Fields, num_images: list[int], ids: list[list[int]]
) -> list[int] | None:
    """How many tiles the images of each row were cut into, or None if they were not; told by the tokens in the text."""
    pixels = fields.get("pixel_values")
    if pixels is None:
        return None
    if "spatial_shapes" in fields:
        factor = processing_class.image_processor.downsample_factor
        # a tile of h x w patches takes a token for every factor x factor of them
        tokens_per_tile = (-(-fields["spatial_shapes"] // factor)).prod(-1).tolist()
    elif (
        pixels.ndim != 4
        or len(pixels) == sum(num_images)
        or {"image_grid_thw", "image_position_ids", "pixel_attention_mask"} & set(fields)
    ):
        return None
    else:
        total = sum(row.count(processing_class.image_token_id) for row in ids)
        tokens_per_tile = [total // len(pixels)] * len(pixels)
    tiles, first = [], 0
    for row in ids:
        tokens, last = row.count(processing_class.image_token_id), first
        while tokens > 0 and last < len(tokens_per_tile):
            tokens -= tokens_per_tile[last]
            last += 1
        if tokens:
            break
        tiles.append(last - first)
        first = last
    if len(tiles) < len(ids) or first < len(tokens_per_tile):
        raise ValueError(
            f"{type(processing_class).__name__} returns pixel_values of shape {list(pixels.shape)} for {num_images} "
            "images a row: which belong to which row cannot be told from the image tokens of the prompts"
        )
    return tiles


def _token_types(processing_class: Any, ids: Tensor) -> Tensor:
    """1 for tokens that stand for an image, 2 for those that stand for a video, 0 for text; the shape of `ids`."""
    types = torch.zeros_like(ids)
    for kind, names in ((2, "video_token_ids"), (1, "image_token_ids")):
        tokens = [token for token in getattr(processing_class, names) if token is not None]
        types[torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype))] = kind
    return types


def _types_of_rows(processing_class: Any, ids: list[list[int]]) -> list[list[int]]:
    return [_token_types(processing_class, torch.tensor(row, dtype=torch.long)).tolist() for row in ids]


def _left_padded(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])
