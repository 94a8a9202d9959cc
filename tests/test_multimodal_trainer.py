"""Whole runs on tiny vision-language models, beside TRL's: same tokens, same rewards, same weights."""

import pytest
import torch
from datasets import Dataset

import grpo_fast
from tests.tiny_lm import make_model, make_tokenizer
from tests.tiny_vlm import FAMILIES, picture, placeholders

# fp32; both run the same padded forward passes
RTOL, ATOL = 1e-4, 1e-6
IMAGES = [[picture(16, 8, 1)], [picture(8, 8, 2), picture(10, 20, 3)], [picture(10, 20, 3)]]


def token_reward(completion_ids, **kwargs):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def run(package, folder, name, images, **kwargs):
    trainer, weights = trained(package, folder, name, images, **kwargs)
    return trainer.state.log_history, weights


def trained(package, folder, name, images, **kwargs):
    model, processor = FAMILIES[name]()
    # where TRL looks for it
    model.config.vocab_size = model.config.get_text_config().vocab_size
    rows = [
        {"prompt": [{"role": "user", "content": f"what {i}" + "?" * i}], "images": shown}
        for i, shown in enumerate(images)
    ]
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 3,
        "steps_per_generation": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "optim": "sgd",
        "generation_kwargs": {"suppress_tokens": placeholders(processor)},
    } | kwargs
    trainer = package.GRPOTrainer(
        model=model,
        reward_funcs=token_reward,
        processing_class=processor,
        train_dataset=Dataset.from_list(rows),
        args=package.GRPOConfig(**settings),
    )
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert not torch.equal(weights, before), "nothing was trained"
    return trainer, weights


@pytest.mark.trl
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llava_next", {}),
        ("idefics3", {"loss_type": "grpo"}),
        ("internvl", {}),
        ("qwen2_5_vl", {"seed": 3, "gradient_checkpointing": False}),
    ],
)
def test_same_numbers(tmp_path, name, settings):
    import trl

    theirs, weights_theirs = run(trl, tmp_path / "trl", name, IMAGES, **settings)
    ours, weights_ours = run(grpo_fast, tmp_path / "ours", name, IMAGES, **settings)
    for line_ours, line_theirs in zip(ours, theirs, strict=True):
        for key in ("loss", "reward", "entropy", "completions/mean_length", "num_tokens", "clip_ratio/high_mean"):
            if key in line_theirs:
                assert line_ours[key] == pytest.approx(line_theirs[key], rel=RTOL, abs=ATOL), key
    torch.testing.assert_close(weights_ours, weights_theirs, rtol=RTOL, atol=ATOL)


def test_rows_with_and_without_images_train_together(tmp_path):
    shown = [IMAGES[0], [], IMAGES[1]]
    trainer, weights = trained(grpo_fast, tmp_path, "idefics3", shown, pad_to_multiple_of=8, beta=0.1)
    assert weights.isfinite().all()
    assert all("kl" in line for line in trainer.state.log_history[:2])
    # each row of the completions table has its own
    questions = [prompt[0]["content"][-1]["text"] for prompt in trainer._logs["prompt"]]
    counts = {"what 0": 1, "what 1?": 0, "what 2??": 2}
    assert [len(images or []) for images in trainer._logs["images"]] == [counts[text] for text in questions]
    assert len(set(questions)) == 3


def test_images_need_a_processor(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "image": picture(8, 8, 1)}] * 2
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    trainer = grpo_fast.GRPOTrainer(
        model=make_model(),
        reward_funcs=token_reward,
        processing_class=make_tokenizer(template),
        train_dataset=Dataset.from_list(rows),
        args=grpo_fast.GRPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=2, num_generations=2, report_to="none"
        ),
    )
    with pytest.raises(ValueError, match="the rows have images, which a tokenizer cannot take"):
        trainer.train()
