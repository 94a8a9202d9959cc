"""Two optimizer steps on 8 rows of a played sampler, in one process or in two; what is logged of the sampler.

Run as `python -m tests.mismatch_runs OUT` under torchrun: rank 0 writes the logged lines.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from grpo_fast import GRPOConfig, GRPOTrainer
from tests.tiny_lm import make_model, make_tokenizer

SEED, TEMPERATURE, NUM_GENERATIONS = 3, 0.7, 4
MODE = "sequence_truncate"
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "num_generations": NUM_GENERATIONS,
    "max_completion_length": 8,
    "temperature": TEMPERATURE,
    "learning_rate": 0.05,
    "optim": "sgd",
    "vllm_importance_sampling_mode": MODE,
    # fewer rows or tokens would not be different layouts
    "max_tokens_per_pack": 512,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 7,
}


def draw(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float | None]]]:
    """Completions and log-probs, some of them not reported, that a prompt and its place in its group decide."""
    rows, logps = [], []
    for i, prompt in enumerate(prompt_ids):
        g = random.Random(f"{prompt} {prompt_ids[:i].count(prompt)}")
        length = g.randint(1, 8)
        rows.append([g.randint(3, 40) for _ in range(length)])
        logps.append([-14 * g.random() for _ in range(length)])
        if length > 4:
            logps[-1][g.randrange(length)] = g.choice([None, math.nan])
    return rows, logps


class Played(GRPOTrainer):
    """Draws `draw`, and keeps what it drew and what the seam for checks of the sampler was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn: list[tuple[list[int], list[int], list[float | None]]] = []
        self.checked: list[dict[str, float]] = []

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        ids, logps = draw(prompt_ids)
        self.drawn.extend(zip(prompt_ids, ids, logps, strict=True))
        return ids, logps

    def _check_sampler_agreement(self, metrics: dict[str, float]) -> None:
        self.checked.append(metrics)


def run(folder: Path, *, corrects: bool = True, **settings: Any) -> Played:
    trainer = Played(
        model=make_model(seed=SEED),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        args=GRPOConfig(str(folder), **SETTINGS | settings),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(4)]),
        processing_class=make_tokenizer(),
    )
    # the correction is in force, and no engine is started
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, corrects
    trainer.train()
    return trainer


def sampler_lines(trainer: Played) -> list[dict[str, float]]:
    """What each optimizer step logged of the sampler."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if name.startswith("sampling/")} for line in lines]


def log_ratios(trainer: Played, num_rows: int) -> list[torch.Tensor]:
    """Of the first rows drawn, one by one by the model that the run began with, in float64; NaN where not reported."""
    model = make_model(seed=SEED).double()
    rows = []
    for prompt, ids, logps in trainer.drawn[:num_rows]:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        own = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        rows.append(own - torch.tensor([math.nan if logp is None else logp for logp in logps], dtype=torch.float64))
    return rows


if __name__ == "__main__":
    out = Path(sys.argv[1])
    trainer = run(out.with_suffix(".run"), per_device_train_batch_size=4, ddp_backend="gloo")
    if trainer.accelerator.is_main_process:
        out.write_text(json.dumps(sampler_lines(trainer)))
