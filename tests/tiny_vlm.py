"""Tiny vision-language models with random weights and their processors, made in code; one builder a family.

The families differ in how a processor lays out images: patches with a grid (`qwen2_5_vl`, `qwen3_vl`), one tensor an
image (`llava`, `gemma3` with token types), crops with image sizes (`llava_next`), tiles (`internvl`), one padded tensor
a row (`idefics3`).

Some processors want a video processor, and that needs torchvision; theirs are subclasses without videos.
"""

from __future__ import annotations

import importlib
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

CHARACTERS = string.ascii_lowercase + string.digits + " =+-.:?\n"
PATCH = 4
SIDE = 2 * PATCH
SIZE = {"height": SIDE, "width": SIDE}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # large enough for a policy that is not uniform
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.3,
}


def chat_template(image: str) -> str:
    """`u:` and the content, images as the text `image`; tools and tool results in words."""
    return (
        "{% if tools %}{{ 't:' + (tools | length | string) + '\\n' }}{% endif %}"
        "{% for message in messages %}{{ message['role'][0] + ':' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] or [] %}"
        "{% if part['type'] == 'image' %}{{ '" + image + "' }}{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )


def make_tokenizer(special: dict[str, str]) -> PreTrainedTokenizerFast:
    """Single characters, and the `special` tokens (attribute name to text)."""
    texts = ["<pad>", "<eos>", "<unk>", *CHARACTERS, *special.values()]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=special,
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random colours."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


class Qwen2_5_VLImages(transformers.Qwen2_5_VLProcessor):
    """Without videos."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen3VLImages(transformers.Qwen3VLProcessor):
    """Without videos."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class InternVLImages(transformers.InternVLProcessor):
    """Without videos."""

    def __init__(self, image_processor, tokenizer, image_seq_length=1, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token, self.image_token_id = tokenizer.context_image_token, tokenizer.context_image_token_id
        self.video_token = "<video>"
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})")


AutoProcessor.register(transformers.Qwen2_5_VLConfig, Qwen2_5_VLImages, exist_ok=True)
AutoProcessor.register(transformers.Qwen3VLConfig, Qwen3VLImages, exist_ok=True)
AutoProcessor.register(transformers.InternVLConfig, InternVLImages, exist_ok=True)


def _pil(module: str, name: str) -> Any:
    """An image processor on Pillow; transformers' top level shows those on torchvision."""
    path = f"transformers.models.{module}.image_processing_pil_{module}"
    return getattr(importlib.import_module(path), f"{name}ImageProcessorPil")


def _text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {**TEXT, "vocab_size": len(tokenizer)}


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


def _qwen_tokenizer() -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    names = ("image", "video"), ("vision_start", "vision_end")
    special = {f"{name}_token": f"<|{name}_pad|>" for name in names[0]}
    special |= {f"{name}_token": f"<|{name}|>" for name in names[1]}
    tokenizer = make_tokenizer(special)
    return tokenizer, {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for pair in names for name in pair}


def _qwen_image_processor() -> Any:
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    return _pil("qwen2_vl", "Qwen2VL")(**sizes, min_pixels=SIDE**2, max_pixels=4 * SIDE**2)


def _build(kind: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)
    # vision configs carry no scale for their weights: images shall matter as much as text
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer, ids = _qwen_tokenizer()
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
    }
    text = {**_text(tokenizer), "rope_parameters": _mrope(2, 1, 1)}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    processor = Qwen2_5_VLImages(_qwen_image_processor(), tokenizer, chat_template=chat_template(QWEN_IMAGE))
    return _build(transformers.Qwen2_5_VLForConditionalGeneration, config), processor


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer, ids = _qwen_tokenizer()
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": PATCH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**_text(tokenizer), "head_dim": 8, "rope_parameters": _mrope(2, 1, 1)}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    processor = Qwen3VLImages(_qwen_image_processor(), tokenizer, chat_template=chat_template(QWEN_IMAGE))
    return _build(transformers.Qwen3VLForConditionalGeneration, config), processor


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer({"image_token": "<image>"})
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    processor = transformers.LlavaProcessor(
        _pil("clip", "CLIP")(size={"shortest_edge": SIDE}, crop_size=SIZE),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return _build(transformers.LlavaForConditionalGeneration, config), processor


def llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer({"image_token": "<image>"})
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    processor = transformers.LlavaNextProcessor(
        _pil("llava_next", "LlavaNext")(size={"shortest_edge": SIDE}, crop_size=SIZE, image_grid_pinpoints=pinpoints),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return _build(transformers.LlavaNextForConditionalGeneration, config), processor


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        **{f"row_{i}_col_{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)},
    }
    tokenizer = make_tokenizer(special)
    processor = transformers.Idefics3Processor(
        _pil("idefics3", "Idefics3")(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        tokenizer,
        image_seq_len=1,
        chat_template=chat_template("<image>"),
    )
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **_text(tokenizer)},
        vision_config=VISION,
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    return _build(transformers.Idefics3ForConditionalGeneration, config), processor


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer({"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"})
    text = {**_text(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        eos_token_id=1,
    )
    processor = transformers.Gemma3Processor(
        _pil("gemma3", "Gemma3")(size=SIZE),
        tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<boi>"),
    )
    return _build(transformers.Gemma3ForConditionalGeneration, config), processor


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = make_tokenizer(special)
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=1,
        tie_word_embeddings=False,
    )
    processor = InternVLImages(
        _pil("got_ocr2", "GotOcr2")(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer,
        image_seq_length=1,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    return _build(transformers.InternVLForConditionalGeneration, config), processor


FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava": llava,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "internvl": internvl,
}


def placeholders(processor: ProcessorMixin) -> list[int]:
    """The tokens a model should not write: all its tokenizer has beside characters and the usual three."""
    return list(range(3 + len(CHARACTERS), len(processor.tokenizer)))


def save(folder: Path, family: str) -> str:
    """Write a family's model and processor into `folder` and return it as a string."""
    model, processor = FAMILIES[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
