"""What the trainer settles from its arguments before weights are read, and between two runs."""

import pytest
import torch
from datasets import Dataset

import grpo_fast
from grpo_fast import GRPOConfig, GRPOTrainer
from tests.test_trainer import build
from tests.tiny_lm import make_model, make_tokenizer
from tests.tiny_vlm import FAMILIES, picture
from tests.trl_grid import B, C, Case, make_inputs, make_trainer, prepare


def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: A number.
        b: Another.
    """
    return a + b


def test_tools_need_prompts_of_messages(tmp_path):
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% for c in m.tool_calls or [] %}"
        "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<eos>{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"`prompt` of train_dataset must be a list of messages .* it is text"):
        GRPOTrainer(
            make_model(),
            lambda completions, **_: [0.0] * len(completions),
            GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=make_tokenizer(template),
            tools=[add],
        )


def test_prompts_with_images_are_not_cut(tmp_path):
    model, processor = FAMILIES["llava"]()
    row = {"prompt": [{"role": "user", "content": "what"}], "image": picture(8, 8, 1)}
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="max_prompt_length=4 would cut images"):
        GRPOTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_prompt_length=4),
            Dataset.from_list([row] * 2),
            processing_class=processor,
        )


def test_a_second_run_begins_with_a_generation(tmp_path):
    """The first ends within a generation batch, whose slices are of prompts that the second does not draw."""
    trainer = build(tmp_path, steps_per_generation=4, max_steps=2)
    trainer.train()
    assert trainer._step % 4 == 2
    trainer.train()
    assert trainer._step == 2


@pytest.mark.parametrize(("loss_type", "is_needed"), [("grpo", False), ("dapo", True)])
def test_a_batch_says_how_many_tokens_it_has_where_the_loss_divides_by_them(tmp_path, loss_type, is_needed):
    trainer, case = make_trainer(grpo_fast, tmp_path), Case(loss_type=loss_type)
    inputs = make_inputs(case, torch.full((B, C), -1.0))
    del inputs["num_items_in_batch"]
    prepare(trainer, case)
    with trainer._scoring_attention(trainer.model):
        if is_needed:
            with pytest.raises(ValueError, match="num_items_per_process is needed by loss_type='dapo'"):
                trainer._compute_loss(trainer.model, inputs)
        else:
            assert trainer._compute_loss(trainer.model, inputs).isfinite()
