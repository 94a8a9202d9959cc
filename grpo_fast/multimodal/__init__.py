"""Vision-language models: images in conversations, through processors, and by rows."""

from grpo_fast.multimodal.layout import (
    fields_of,
    given,
    row_inputs,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
)
from grpo_fast.multimodal.messages import (
    images_of_messages,
    images_of_rows,
    merged_images,
    prepare_multimodal_messages,
    strip_images_from_messages,
)
from grpo_fast.multimodal.processing import forward_fields, generation_fields, tokenize, turn_fields

__all__ = [
    "fields_of",
    "forward_fields",
    "generation_fields",
    "given",
    "images_of_messages",
    "images_of_rows",
    "merged_images",
    "prepare_multimodal_messages",
    "row_inputs",
    "split_pixel_values_by_grid",
    "strip_images_from_messages",
    "tokenize",
    "turn_fields",
    "unsplit_pixel_values_by_grid",
]
