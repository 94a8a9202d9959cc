"""Rows with several images, one and none, and their log-probs by a model's hidden states."""

import functools

import torch

from grpo_fast import multimodal
from tests.tiny_vlm import FAMILIES, picture

WIDE, SQUARE, TALL = picture(16, 8, 1), picture(8, 8, 2), picture(10, 20, 3)
MIXED = [[WIDE], None, [SQUARE, TALL], None]
# a longer row shifts the positions of the others, and sums of products are ordered otherwise
RTOL = ATOL = 2e-4


@functools.cache
def family(name):
    model, processor = FAMILIES[name]()
    return model.eval(), processor


def conversation(images, text):
    blocks = [{"type": "image", "image": image} for image in images or []]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]


def mixed_prompts():
    return [conversation(images, "what" + "?" * i) for i, images in enumerate(MIXED)]


def padded(prompt_ids, completion_ids):
    """The part of the padded dict that `forward_fields` reads, and the attention mask."""
    P, C = (max(map(len, rows)) for rows in (prompt_ids, completion_ids))
    return {
        "prompt_ids": torch.tensor([[0] * (P - len(row)) + row for row in prompt_ids]),
        "prompt_mask": torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in prompt_ids]),
        "completion_ids": torch.tensor([row + [0] * (C - len(row)) for row in completion_ids]),
        "completion_mask": torch.tensor([[1] * len(row) + [0] * (C - len(row)) for row in completion_ids]),
    }


def whole(batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def mixed_batch(name):
    """Rows with one image, none and two, and what belongs to them."""
    _, processor = family(name)
    prompt_ids, images, fields = multimodal.tokenize(mixed_prompts(), processor, {})
    batch = padded(prompt_ids, [[5, 6, 7], [8], [9, 10], [11, 12, 13]])
    return batch | multimodal.forward_fields(fields, batch, images, processor)


def logps_of(model, batch, rows):
    """Log-probs of the completions of some rows by the hidden states of the model's base."""
    ids, mask = (part[rows] for part in whole(batch))
    inputs = multimodal.row_inputs(multimodal.fields_of(batch), rows)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)[0]
    C = batch["completion_ids"].shape[1]
    logits = model.get_output_embeddings()(hidden[:, -C - 1 : -1])
    logps = logits.log_softmax(-1).gather(-1, ids[:, -C:, None])[..., 0]
    return logps * mask[:, -C:]


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype, name
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
        else:
            assert ours[name] == value, name
