"""Images by rows as in TRL 1.16, whose own trainer runs on the tiny models."""

import functools

import pytest
import torch
from datasets import Dataset

from grpo_fast import multimodal
from tests.image_rows import ATOL, RTOL, SQUARE, TALL, WIDE, assert_same, logps_of, whole
from tests.tiny_vlm import FAMILIES, picture, placeholders

pytestmark = pytest.mark.trl

# TRL cannot run a batch with a row without images
IMAGES = [[WIDE], [SQUARE, TALL], [TALL]]


@functools.cache
def trl_rollout(name, folder):
    """TRL's trainer after an optimizer step, with the rows and the dict of its generation batch."""
    import trl

    class Recorder(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            self.rows = inputs
            self.batch = super()._generate_and_score_completions(inputs)
            return self.batch

        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
            self.turn = (prompt_ids, images, multimodal_fields)
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)

    model, processor = FAMILIES[name]()
    rows = [
        {"prompt": [{"role": "user", "content": "what" + "?" * i}], "images": images} for i, images in enumerate(IMAGES)
    ]
    trainer = Recorder(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(c[0]["content"]) % 3) for c in completions],
        processing_class=processor,
        train_dataset=Dataset.from_list(rows),
        args=trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=3,
            steps_per_generation=2,
            num_generations=2,
            max_completion_length=5,
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            # a model must not write what stands for an image: TRL's own forward pass would fail
            generation_kwargs={"suppress_tokens": placeholders(processor)},
        ),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="session")
def trl_folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("trl"))


def prompts_of(rows):
    images = multimodal.images_of_rows(rows)
    return [
        multimodal.prepare_multimodal_messages(row["prompt"], images=row_images)
        for row, row_images in zip(rows, images, strict=True)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_padded_dict_holds_the_tensors_of_trl(name, trl_folder):
    trainer = trl_rollout(name, trl_folder)
    processor = trainer.processing_class
    prompt_ids, images, fields = multimodal.tokenize(prompts_of(trainer.rows), processor, {})

    assert prompt_ids == trainer.turn[0]
    assert images == trainer.turn[1]
    ours = multimodal.forward_fields(fields, trainer.batch, images, processor)
    theirs = multimodal.fields_of(trainer.batch)
    assert "pixel_values" in theirs
    assert_same({key: ours[key] for key in theirs}, theirs)
    assert set(ours) == set(theirs)
    # prompts made elsewhere: the processor sees the images again
    again = multimodal.forward_fields({}, trainer.batch, images, processor)
    assert_same({key: again[key] for key in theirs}, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_permuted_cut_and_scored_as_in_trl(name, trl_folder):
    from trl.trainer import utils

    trainer = trl_rollout(name, trl_folder)
    batch = trainer.batch
    ours = multimodal.split_pixel_values_by_grid(batch)
    theirs = utils.split_pixel_values_by_grid(batch)
    torch.manual_seed(0)
    ours = utils.split_tensor_dict(utils.shuffle_sequence_dict(ours), 3)
    torch.manual_seed(0)
    theirs = utils.split_tensor_dict(utils.shuffle_sequence_dict(theirs), 3)
    for part, part_theirs in zip(ours, theirs, strict=True):
        assert_same(multimodal.unsplit_pixel_values_by_grid(part), utils.unsplit_pixel_values_by_grid(part_theirs))

    ids, mask = whole(batch)
    C = batch["completion_ids"].shape[1]
    with torch.no_grad():
        expected, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, C, batch_size=4, **multimodal.fields_of(batch)
        )
        logps = torch.cat([logps_of(trainer.model, batch, rows) for rows in (slice(0, 4), slice(4, 6))])
    assert (expected != 0).any()
    torch.testing.assert_close(logps, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole images", "cut within an image"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_images_of_tools_are_laid_out_as_in_trl(name, is_cut, trl_folder, monkeypatch, caplog):
    trainer = trl_rollout(name, trl_folder)
    processor = trainer.processing_class
    image = processor.image_token_id
    tool_images = [[], [WIDE], [], [], [TALL, SQUARE], []]
    tokens = [[], [image] * (1 if is_cut else 2), [], [], [image, image, 7, image], []]

    def loop(prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields):
        ids = [own + new for own, new in zip(completion_ids, tokens, strict=True)]
        return [[1] * len(row) for row in ids], completions, ids, logprobs, 2, 0, tool_images

    monkeypatch.setattr(trainer, "tools", [picture])
    monkeypatch.setattr(trainer, "_standalone_tools", [], raising=False)
    monkeypatch.setattr(trainer, "_tool_call_loop", loop)
    # TRL renders tools from their docstrings
    monkeypatch.setattr(trainer, "_tokenize_prompts", lambda prompts: multimodal.tokenize(prompts, processor, {}))
    theirs = trainer._generate_and_score_completions(trainer.rows)

    _, images, fields = multimodal.tokenize(prompts_of(trainer.rows), processor, {})
    images = multimodal.merged_images(images, tool_images)
    ours = multimodal.forward_fields(fields, theirs, images, processor, tool_images=tool_images)
    assert ours["num_images"] == theirs["num_images"]
    assert ("pixel_values" in ours) == ("pixel_values" in theirs) == (not is_cut)
    assert bool(caplog.records) == is_cut
    assert_same(multimodal.fields_of(ours), multimodal.fields_of(theirs))


def test_conversations_take_images_as_in_trl():
    from trl import prepare_multimodal_messages

    text = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    blocks = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "image"}]}]
    tool = [*text, {"role": "tool", "name": "f", "content": [{"type": "image", "image": WIDE}]}]
    call = [*text, {"role": "assistant", "tool_calls": []}, {"role": "user", "content": "more"}]
    for messages, images in (
        (text, [WIDE]),
        (text, None),
        (blocks, [WIDE, TALL]),
        (tool, [TALL]),
        (call, [WIDE, TALL]),
    ):
        before = repr(messages)
        ours = multimodal.prepare_multimodal_messages(messages, images=images)
        assert ours == prepare_multimodal_messages(messages, images=images)
        assert repr(messages) == before


def test_patches_with_positions_and_tiles_with_shapes_are_split_as_in_trl():
    from trl.trainer import utils

    positions = {
        "pixel_values": torch.arange(6.0).view(3, 2),
        "image_position_ids": torch.arange(6).view(3, 2, 1),
        "num_images": [1, 0, 2],
    }
    tiles = {
        "pixel_values": torch.arange(10.0).view(5, 2),
        "pixel_attention_mask": torch.ones(5, 2),
        "spatial_shapes": torch.arange(10).view(5, 2),
        "num_images": [1, 0, 2],
        "num_tiles": [2, 0, 3],
    }
    for batch in (positions, tiles):
        ours, theirs = multimodal.split_pixel_values_by_grid(batch), utils.split_pixel_values_by_grid(batch)
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert [torch.as_tensor(part).tolist() for part in ours[name]] == [
                torch.as_tensor(part).tolist() for part in value
            ]
        assert_same(multimodal.unsplit_pixel_values_by_grid(ours), batch)
        assert multimodal.row_inputs(batch, slice(1, 2)) == {}
        assert len(multimodal.row_inputs(batch, slice(1, 3))["pixel_values"]) == (3 if "num_tiles" in batch else 2)
