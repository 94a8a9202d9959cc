"""The same script with TRL 1.16 and with us: same completions, same metrics, same weights after every step."""

import math
import random

import pytest
import torch
from datasets import Dataset

from tests.tiny_lm import make_tokenizer, save

pytestmark = pytest.mark.trl

# fp32 throughout; TRL counts positions over the left padding, we from 0, so rounding differs
RTOL = 2e-4
ATOL = 2e-5
# timings, and what TRL does not have
IGNORED = ("step_time", "time/", "total_flos", "train_", "epoch")

WORDS = ["ab", "abc", "dcba", "a", "bad cab", "fade", "cafe bead"]


def digits_reward(completions, **kwargs):
    return [sum(c in "0123456789" for c in text) / 4 for text in completions]


def column_reward(completions, target, **kwargs):
    return [None if t == 0 else float(len(text) % 3 == t % 3) for text, t in zip(completions, target, strict=True)]


def run(package, model, folder, **kwargs):
    tokenizer = make_tokenizer()
    rows = [{"prompt": word + "=", "target": i} for i, word in enumerate(WORDS * 3)]
    random.Random(0).shuffle(rows)
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 9,
        "learning_rate": 0.05,
        # Adam would turn the sign of a gradient that is zero but for rounding into a whole step
        "optim": "sgd",
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 11,
    } | kwargs
    trainer = package.GRPOTrainer(
        model=model,
        reward_funcs=[digits_reward, column_reward],
        args=package.GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]) if "eval_strategy" in kwargs else None,
        processing_class=tokenizer,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return trainer.state.log_history, weights


SETTINGS = {
    "defaults": {},
    "grpo, KL, clip-higher": {"loss_type": "grpo", "beta": 0.1, "epsilon_high": 0.28},
    "dr_grpo, delta, 2 iterations": {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "delta": 1.5,
        "num_iterations": 2,
    },
    "bnpo, accumulation": {"loss_type": "bnpo", "gradient_accumulation_steps": 2, "scale_rewards": "batch"},
    "dapo, 2 steps a generation, plain KL, temperature": {
        "steps_per_generation": 2,
        "beta": 0.05,
        "use_bias_correction_kl": False,
        "temperature": 0.7,
    },
    "truncated masked, GDPO": {
        "mask_truncated_completions": True,
        "reward_weights": [1.0, 0.5],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "evaluation, top-k": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_generations_eval": 2,
        "gradient_checkpointing": False,
        "top_k": 5,
        "top_p": 0.9,
    },
    "grpo, 2 generations a step": {
        "loss_type": "grpo",
        "max_grad_norm": 0.1,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 2,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_same_numbers(tmp_path, settings):
    import trl

    import grpo_fast

    # TRL loads its reference model from the policy's folder
    model = save(tmp_path / "model", seed=1)
    theirs, weights_theirs = run(trl, model, tmp_path / "trl", **settings)
    ours, weights_ours = run(grpo_fast, model, tmp_path / "ours", **settings)

    assert len(ours) == len(theirs)
    for line_ours, line_theirs in zip(ours, theirs, strict=True):
        for name, value in line_theirs.items():
            if name.startswith(IGNORED) or "_runtime" in name or "_per_second" in name:
                continue
            assert name in line_ours, f"{name} is missing in {sorted(line_ours)}"
            where = f"{name} at step {line_theirs['step']}"
            if value is None or (isinstance(value, float) and math.isnan(value)):
                assert line_ours[name] is None or math.isnan(line_ours[name]), where
            else:
                assert line_ours[name] == pytest.approx(value, rel=RTOL, abs=ATOL), where
    torch.testing.assert_close(weights_ours, weights_theirs, rtol=RTOL, atol=ATOL)
