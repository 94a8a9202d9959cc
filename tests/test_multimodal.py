"""Images from the data set to the model's forward pass, through the processors of seven families."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from grpo_fast import multimodal
from grpo_fast.multimodal.layout import IMAGE_FIELDS
from grpo_fast.rollout import pad, shuffle_sequence_dict, split_tensor_dict
from tests.image_rows import (
    ATOL,
    MIXED,
    RTOL,
    SQUARE,
    TALL,
    WIDE,
    assert_same,
    conversation,
    family,
    logps_of,
    mixed_batch,
    mixed_prompts,
    padded,
    whole,
)
from tests.tiny_vlm import FAMILIES, placeholders, save

# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_mixed_batch_score_as_they_do_alone(name):
    model, _ = family(name)
    batch = mixed_batch(name)
    assert batch["num_images"] == [1, 0, 2, 0]
    with torch.no_grad():
        logps = logps_of(model, batch, slice(0, 4))
        for row in range(4):
            alone = logps_of(model, batch, slice(row, row + 1))
            torch.testing.assert_close(logps[row], alone[0], rtol=RTOL, atol=ATOL)
        # the image is seen: with another one the row scores otherwise
        other = batch | {"pixel_values": batch["pixel_values"].flip(-1) * 2 + 1}
        assert (logps_of(model, other, slice(0, 1)) - logps[:1]).abs().max() > 10 * ATOL


@pytest.mark.parametrize("name", FAMILIES)
def test_the_base_models_hidden_states_are_those_of_the_logits(name):
    model, _ = family(name)
    batch = mixed_batch(name)
    ids, mask = whole(batch)
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= multimodal.row_inputs(multimodal.fields_of(batch), slice(0, 4))
    with torch.no_grad():
        hidden, logits = model.base_model(**inputs)[0], model(**inputs).logits
    assert hidden.shape == (*ids.shape, model.config.get_text_config().hidden_size)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_shuffled_rows_keep_their_images(name):
    model, _ = family(name)
    batch = mixed_batch(name) | {"row": torch.arange(4)}
    torch.manual_seed(1)
    parts = split_tensor_dict(shuffle_sequence_dict(multimodal.split_pixel_values_by_grid(batch)), 2)
    parts = [multimodal.unsplit_pixel_values_by_grid(part) for part in parts]
    order = torch.cat([part["row"] for part in parts])
    assert order.tolist() != [0, 1, 2, 3]
    with torch.no_grad():
        expected = logps_of(model, batch, slice(0, 4))[order]
        logps = torch.cat([logps_of(model, part, slice(0, 2)) for part in parts])
    torch.testing.assert_close(logps, expected, rtol=RTOL, atol=ATOL)


def test_as_many_rows_as_images_do_not_confuse_rows_with_images():
    # TRL splits these by images: two for the first row, none for the second
    _, processor = family("idefics3")
    prompts = [conversation([SQUARE, SQUARE], "a"), conversation(None, "b")]
    ids, images, fields = multimodal.tokenize(prompts, processor, {})
    batch = padded(ids, [[5], [6]])
    batch |= multimodal.forward_fields(fields, batch, images, processor)
    assert len(batch["pixel_values"]) == 2
    split = multimodal.split_pixel_values_by_grid(batch)
    assert isinstance(split["pixel_values"], torch.Tensor)
    assert len(multimodal.row_inputs(multimodal.fields_of(batch), slice(0, 1))["pixel_values"]) == 1
    assert "pixel_values" not in multimodal.row_inputs(multimodal.fields_of(batch), slice(1, 2))


def test_tensors_that_do_not_fit_the_counts_are_refused():
    batch = {"pixel_values": torch.ones(5, 2), "image_grid_thw": torch.tensor([[1, 2, 2]]), "num_images": [1]}
    with pytest.raises(ValueError, match=r"pixel_values must have 4 entries for the images of 1 rows, got 5"):
        multimodal.split_pixel_values_by_grid(batch)


# -- through the processor ---------------------------------------------------------------------------------------------


def count_images(monkeypatch, processor):
    """The images a processor is given from here on."""
    seen = []
    kind = type(processor.image_processor)
    original = kind.preprocess

    def preprocess(self, images, *args, **kwargs):
        nested = [row if isinstance(row, list | tuple) else [row] for row in images]
        seen.extend(image for row in nested for image in row)
        return original(self, images, *args, **kwargs)

    monkeypatch.setattr(kind, "preprocess", preprocess)
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_goes_through_the_processor_once(name, monkeypatch):
    _, processor = family(name)
    copies = [conversation([image.copy() for image in images or []], "x") for images in MIXED for _ in range(3)]
    expected = multimodal.tokenize(copies, processor, {})
    seen = count_images(monkeypatch, processor)
    ids, images, fields = multimodal.tokenize(
        [conversation(images, "x") for images in MIXED for _ in range(3)], processor, {}
    )
    assert len(seen) == 3
    assert ids == expected[0]
    assert images == expected[1]
    assert_same(fields, expected[2])
    # the rows' lists are their own: the tool loop changes them
    assert ids[0] is not ids[1]
    multimodal.forward_fields(fields, padded(ids, [[5]] * 12), images, processor)
    assert len(seen) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_different_tools_are_rendered_apart_and_come_out_together(name):
    def tool(x: int) -> int:
        """Add.

        Args:
            x: A number.
        """
        return x + 1

    _, processor = family(name)
    prompts = mixed_prompts()
    # one call of the processor sees no image, and the two others images of different sizes
    tools = [[tool], [tool, tool], None, [tool, tool]]
    ids, images, fields = multimodal.tokenize(prompts, processor, {}, tools=tools)
    apart = [multimodal.tokenize([p], processor, {}, tools=[t]) for p, t in zip(prompts, tools, strict=True)]
    plain, _, plain_fields = multimodal.tokenize(prompts, processor, {})
    assert ids == [row_ids[0] for row_ids, _, _ in apart]
    assert [len(a) - len(b) for a, b in zip(ids, plain, strict=True)] == [4, 4, 0, 4]
    assert images == MIXED
    types = [key for key in fields if key not in IMAGE_FIELDS]
    assert_same(
        {k: v for k, v in fields.items() if k not in types}, {k: plain_fields[k] for k in fields if k not in types}
    )
    assert [[len(row) for row in fields[key]] for key in types] == [[len(row) for row in ids] for _ in types]


def left_padded(fields):
    """Token types as the engine hands them to the model."""
    return {
        k: v if isinstance(v, torch.Tensor) else pad(list(map(torch.tensor, v)), 0, "left") for k, v in fields.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_sees_the_images(name):
    model, processor = family(name)
    prompts = mixed_prompts()

    def greedy(prompts):
        ids, _, fields = multimodal.tokenize(prompts, processor, {})
        batch = padded(ids, [[]] * len(ids) if len(ids) > 1 else [[]])
        output = model.generate(
            input_ids=batch["prompt_ids"],
            attention_mask=batch["prompt_mask"],
            **left_padded(multimodal.generation_fields(fields, ids, processor)),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=-1,
            suppress_tokens=placeholders(processor),
        )
        return output[:, batch["prompt_ids"].shape[1] :].tolist()

    assert greedy(prompts) == [greedy([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("name", FAMILIES)
def test_another_turn_of_some_rows(name):
    _, processor = family(name)
    ids, images, fields = multimodal.tokenize(mixed_prompts(), processor, {})
    rows = [0, 2]
    turn_ids = [ids[row] + [5, 6, 7][: row + 1] for row in rows]
    loop = {"rows": rows, "turn_ids": turn_ids, "images": images}
    turn_images, turn = multimodal.turn_fields(fields, ids, processor, tool_images=[[]] * 4, **loop)
    assert turn_images == [MIXED[0], MIXED[2]]
    own_ids, _, own = multimodal.tokenize([mixed_prompts()[row] for row in rows], processor, {})
    types = {key: turn.pop(key) for key in list(turn) if key.endswith("type_ids")}
    for key, value in types.items():
        assert value == [
            row + [0] * (len(t) - len(i)) for row, t, i in zip(own.pop(key), turn_ids, own_ids, strict=True)
        ]
    assert_same(turn, own)
    # rows without images go on without
    loop |= {"rows": [1], "turn_ids": [ids[1] + [5]]}
    turn_images, turn = multimodal.turn_fields(fields, ids, processor, tool_images=[[]] * 4, **loop)
    assert turn_images == [None]
    assert not set(turn) & set(IMAGE_FIELDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_tools_join_those_of_the_prompts(name):
    model, processor = family(name)
    ids, images, fields = multimodal.tokenize(mixed_prompts(), processor, {})
    # what the tool's image reads like, and the whole conversation as the processor has it
    suffix = multimodal.tokenize([conversation([SQUARE], "")], processor, {})[0][0]
    tool_images = [[], [SQUARE], [], []]
    loop = {"rows": [1], "turn_ids": [ids[1] + suffix], "images": images}
    turn_images, turn = multimodal.turn_fields(fields, ids, processor, tool_images=tool_images, **loop)
    assert turn_images == [[SQUARE]]
    inputs = multimodal.generation_fields(turn, loop["turn_ids"], processor, has_tool_images=True)
    tokens = torch.tensor(loop["turn_ids"])
    model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **left_padded(inputs), max_new_tokens=1)

    batch = padded(ids, [[5], suffix, [6], [7]])
    all_images = multimodal.merged_images(images, tool_images)
    assert all_images == [[WIDE], [SQUARE], [SQUARE, TALL], None]
    batch |= multimodal.forward_fields(fields, batch, all_images, processor, tool_images=tool_images)
    assert batch["num_images"] == [1, 1, 2, 0]
    with torch.no_grad():
        logps = logps_of(model, batch, slice(0, 4))
        prompt = padded([ids[1]], [suffix])
        own = multimodal.forward_fields({}, prompt, [[SQUARE]], processor, tool_images=[[SQUARE]])
        alone = logps_of(model, prompt | own, slice(0, 1))
    torch.testing.assert_close(logps[1, : len(suffix)], alone[0], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_written_image_token_leaves_the_batch_without_images(name, caplog):
    model, processor = family(name)
    ids, images, fields = multimodal.tokenize(mixed_prompts(), processor, {})
    image = processor.image_token_ids[0]
    batch = padded(ids, [[5], [image], [6], [7]])
    batch |= multimodal.forward_fields(fields, batch, images, processor)
    assert "images are left out of this batch" in caplog.text
    assert batch["num_images"] is None
    assert "pixel_values" not in batch
    with torch.no_grad():
        assert logps_of(model, batch, slice(0, 4)).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_models_and_processors_load_from_their_folder(name, tmp_path):
    folder = save(tmp_path, name)
    model, processor = family(name)
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids, _, fields = multimodal.tokenize(mixed_prompts(), AutoProcessor.from_pretrained(folder), {})
    expected_ids, _, expected = multimodal.tokenize(mixed_prompts(), processor, {})
    assert ids == expected_ids
    assert_same(fields, expected)
    with torch.no_grad():
        batch = mixed_batch(name)
        assert torch.equal(logps_of(loaded, batch, slice(0, 4)), logps_of(model, batch, slice(0, 4)))


def test_tiles_of_different_sizes_are_told_by_their_tokens():
    # LFM2-VL: a tile of 4 x 4 patches is 4 tokens, one of 2 x 3 two; its image processor needs torchvision
    processor = SimpleNamespace(image_token_id=9, image_processor=SimpleNamespace(downsample_factor=2))
    shapes = torch.tensor([[4, 4], [4, 4], [2, 3], [2, 3]])
    fields = {"pixel_values": torch.ones(4, 16, 3), "spatial_shapes": shapes}
    tiles = multimodal.processing._tiles_of_rows
    assert tiles(processor, fields, [1, 0, 1], [[1] + [9] * 10, [1], [9, 9, 1]]) == [3, 0, 1]
    with pytest.raises(ValueError, match="cannot be told from the image tokens"):
        tiles(processor, fields, [1, 1], [[9] * 9, [9, 9]])


def test_text_without_images_goes_to_the_tokenizer():
    _, processor = family("qwen2_5_vl")
    ids, images, fields = multimodal.tokenize(["ab", "c"], processor, {})
    assert ids == [[3, 4], [5]]
    assert images is None
    assert fields == {}
    assert multimodal.generation_fields(fields, ids, processor) == {}


def test_sound_and_videos_are_refused(monkeypatch):
    _, processor = family("llava")
    original = type(processor).__call__

    def with_sound(self, **kwargs):
        output = original(self, **kwargs)
        output["input_features"] = [1]
        return output

    monkeypatch.setattr(type(processor), "__call__", with_sound)
    with pytest.raises(ValueError, match="LlavaProcessor returns input_features, which is not supported"):
        multimodal.tokenize(mixed_prompts(), processor, {})


# -- messages ----------------------------------------------------------------------------------------------------------


def test_images_come_from_either_column():
    prompt = [{"role": "user", "content": "a"}]
    rows = [
        {"prompt": prompt, "images": [WIDE, TALL]},
        {"prompt": prompt, "images": []},
        {"prompt": prompt, "images": None},
    ]
    assert multimodal.images_of_rows(rows) == [[WIDE, TALL], None, None]
    assert multimodal.images_of_rows([{"image": WIDE}, {"image": None}]) == [[WIDE], None]
    for empty in ([{"images": []}] * 2, [{"images": None}] * 2, [{"image": None}], [{"prompt": prompt}]):
        assert multimodal.images_of_rows(empty) is None


def test_images_with_prompts_of_plain_text_are_refused():
    with pytest.raises(ValueError, match="`prompt` must be a list of messages in rows with images, got 'a'"):
        multimodal.images_of_rows([{"prompt": "a", "image": WIDE}])
    with pytest.raises(ValueError, match="column `images` must hold lists of images, got Image"):
        multimodal.images_of_rows([{"prompt": [], "images": WIDE}])


def test_messages_with_too_many_or_too_few_images_are_refused():
    with pytest.raises(ValueError, match="messages have 1 image blocks without an image, but 2 images came"):
        multimodal.prepare_multimodal_messages([{"role": "user", "content": [{"type": "image"}]}], images=[WIDE, TALL])
    with pytest.raises(ValueError, match="got 'developer'"):
        multimodal.prepare_multimodal_messages([{"role": "developer", "content": "a"}])


def test_images_go_once_into_a_conversation():
    messages = [
        {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "a"}]},
        {"role": "user", "content": "b"},
        # what a tool has returned is its own affair
        {"role": "tool", "content": [{"type": "image"}]},
    ]
    prepared = multimodal.prepare_multimodal_messages(messages, images=[WIDE])
    assert prepared[0]["content"][0]["image"] is WIDE
    assert prepared[2] == messages[2]
    assert prepared[1]["content"] == [{"type": "text", "text": "b"}]


def test_stripped_messages_hold_no_images():
    messages = [*conversation([WIDE], "a"), {"role": "assistant", "content": "b"}]
    stripped = multimodal.strip_images_from_messages(messages)
    assert stripped[0]["content"] == [{"type": "image"}, {"type": "text", "text": "a"}]
    assert stripped[1] == messages[1]
    assert multimodal.images_of_messages(messages) == [WIDE]
    assert multimodal.strip_images_from_messages("text") == "text"
