"""Images in conversations: put into messages, taken out of them, and taken from a data set's columns."""

from __future__ import annotations

from typing import Any

ROLES = ("system", "user", "assistant", "tool")

Messages = list[dict[str, Any]]
# the images of each row, None where it has none
RowImages = list[list[Any] | None]


def images_of_rows(inputs: list[dict[str, Any]]) -> RowImages | None:
    """The images of a data set's rows: column `images` holds lists, maybe empty or None, or else `image` one or None.

    Returns:
        A list of images, or None, a row; or None if no row has an image.

    Raises:
        ValueError: If `images` of a row is not a list, or a row with an image has a prompt of plain text.
    """
    if any("images" in row for row in inputs):
        images = [row.get("images") for row in inputs]
    else:
        images = [None if row.get("image") is None else [row["image"]] for row in inputs]
    if not any(images):
        return None
    for row, row_images in zip(inputs, images, strict=True):
        if row_images is not None and not isinstance(row_images, list | tuple):
            raise ValueError(
                f"column `images` must hold lists of images, got {type(row_images).__name__}; one image a row goes "
                "into a column `image`"
            )
        if row_images and isinstance(row.get("prompt"), str):
            raise ValueError(
                f"`prompt` must be a list of messages in rows with images, got {row['prompt']!r:.80}: pass the "
                "conversation as it is, without its chat template applied"
            )
    return [list(row_images) if row_images else None for row_images in images]


def prepare_multimodal_messages(messages: Messages, images: list[Any] | None = None) -> Messages:
    """A conversation whose contents are lists of blocks, with `images` in its image blocks.

    Text becomes a text block. Where a conversation has no empty image blocks, one for each of `images` goes in front of
    the text of the first user message that is plain text. Blocks that hold an image already, and blocks of tools, stay.

    Args:
        messages: The conversation, left unchanged.
        images: What to fill its empty image blocks with, in their order.

    Returns:
        The conversation with new dictionaries for the messages that differ.

    Raises:
        ValueError: If a role is unknown, or there are more or fewer images than empty image blocks.
    """
    images = list(images or [])
    # a later plain text of the user must not get the images of an earlier message once more
    is_placed = any(_is_empty(part) for message in messages for part in _blocks(message))
    prepared = []
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"role of a message must be one of {', '.join(ROLES)}, got {message['role']!r}")
        content = message.get("content")
        if isinstance(content, str):
            blocks: Messages = [{"type": "text", "text": content}]
            if message["role"] == "user" and not is_placed:
                blocks = [{"type": "image"} for _ in images] + blocks
                is_placed = True
            message = {**message, "content": blocks}
        prepared.append(message)
    num_empty = sum(_is_empty(part) for message in prepared for part in _blocks(message))
    if num_empty != len(images):
        raise ValueError(f"messages have {num_empty} image blocks without an image, but {len(images)} images came")
    remaining = iter(images)
    for i, message in enumerate(prepared):
        if any(_is_empty(part) for part in _blocks(message)):
            blocks = [{**part, "image": next(remaining)} if _is_empty(part) else part for part in _blocks(message)]
            prepared[i] = {**message, "content": blocks}
    return prepared


def images_of_messages(messages: Messages) -> list[Any]:
    """The images in a conversation's blocks, tool results included, in their order."""
    contents = [message.get("content") for message in messages]
    return [
        part["image"]
        for content in contents
        if isinstance(content, list)
        for part in content
        if part["type"] == "image"
    ]


def strip_images_from_messages(messages: Any) -> Any:
    """A conversation whose image blocks are `{"type": "image"}`, to be logged; anything but a list as it is."""
    if not isinstance(messages, list):
        return messages
    stripped = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = [{"type": "image"} if part.get("type") == "image" else part for part in content]
            message = {**message, "content": content}
        stripped.append(message)
    return stripped


def merged_images(images: RowImages | None, tool_images: list[list[Any]]) -> RowImages | None:
    """The prompts' images followed by those that tools have returned; `images` itself without any of the latter."""
    if not any(tool_images):
        return images
    own = [None] * len(tool_images) if images is None else images
    return [(before or []) + new or None for before, new in zip(own, tool_images, strict=True)]


def _blocks(message: dict[str, Any]) -> Messages:
    """The content blocks that a data set's images may fill: tools bring their own."""
    content = message.get("content")
    return content if isinstance(content, list) and message["role"] != "tool" else []


def _is_empty(part: dict[str, Any]) -> bool:
    # arrow gives the blocks of a column the same keys, unset ones as None
    return part["type"] == "image" and part.get("image") is None
