"""How often the host waits for the device in each micro-step of a short run, on the device of `tests.far_device`.

Run as `python -m tests.waits_of_a_step OUT`. OUT gets JSON: for each of some settings the waits of every micro-step,
whether it generates, and whether it ends a window; and the waits of some plain operations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from torch import Tensor

from grpo_fast import GRPOConfig, GRPOTrainer
from tests.far_device import NAME, Log, Wait, far_device, install
from tests.tiny_lm import make_model, make_tokenizer

# two windows a generation
SETTINGS = {
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "several packs": {"max_tokens_per_pack": 8},
    "sequences": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "vespo": {"loss_type": "vespo"},
    "KL": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.1},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
}
COMPLETIONS = [[5, 6, 7, 1], [8, 1], [], [9, 10, 11, 12, 13, 1], [5], [14, 15, 16]]


# operations on a far tensor of 4 numbers, and on a near one of 2 indices
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arithmetic": lambda far, near: (far * 2 + far.sum()).softmax(0),
    "a number": lambda far, near: far.sum().item(),
    "a list": lambda far, near: far.tolist(),
    "a truth": lambda far, near: bool((far > 0).all()),
    "a copy to the host": lambda far, near: far.cpu(),
    "a copy to the device": lambda far, near: near.to(far.device),
    "a copy to the device, not blocking": lambda far, near: near.to(far.device, non_blocking=True),
    "numbers on the device": lambda far, near: torch.tensor([1, 2], device=far.device),
    "numbers like others": lambda far, near: far.new_tensor(1.0),
    "a constant": lambda far, near: torch.full((2,), 1.0, device=far.device),
    "what a mask picks": lambda far, near: far[far > 0],
    "what a mask replaces": lambda far, near: torch.where(far > 0, far, 0.0),
    "what a list picks": lambda far, near: far[[0, 1]],
    "what far indices pick": lambda far, near: far[torch.arange(2, device=far.device)],
    "where": lambda far, near: far.nonzero(),
    "runs": lambda far, near: far.unique_consecutive(),
    "repeats": lambda far, near: far.repeat_interleave(torch.arange(4, device=far.device)),
    "repeats, of a known number": lambda far, near: far.repeat_interleave(
        torch.arange(4, device=far.device), output_size=6
    ),
    "a backward pass": lambda far, near: (far.clone().requires_grad_() ** 2).sum().backward(),
    "a host's own list": lambda far, near: near.tolist(),
}


@dataclass(frozen=True)
class MicroStep:
    generates: bool
    ends_window: bool
    waits: list[Wait]


def roll_out(prompts: list[str], trainer: Any) -> dict[str, Any]:
    completions = [COMPLETIONS[i % len(COMPLETIONS)] for i in range(len(prompts))]
    return {
        "prompt_ids": [[3 + ord(prompt) % 20, 4, 5] for prompt in prompts],
        "completion_ids": completions,
        "logprobs": [[-3.0] * len(ids) for ids in completions],
    }


def make_trainer(folder: Path, settings: dict[str, Any]) -> GRPOTrainer:
    return GRPOTrainer(
        model=make_model(seed=3),
        reward_funcs=lambda completion_ids, **_: [float(len(ids) % 3) for ids in completion_ids],
        args=GRPOConfig(
            str(folder),
            **{"gradient_checkpointing": False} | SETTINGS | settings,
            use_cpu=True,
            bf16=False,
            optim="sgd",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=100,
            max_grad_norm=0.0,
        ),
        train_dataset=Dataset.from_dict({"prompt": list("abcdefghijklmnop")}),
        processing_class=make_tokenizer(),
        rollout_func=roll_out,
    )


def move_far(trainer: GRPOTrainer) -> None:
    """The trainer as it is on a device of its own."""
    trainer.model.to(NAME)
    if trainer.ref_model is not None:
        trainer.ref_model.to(NAME)
    for state in (PartialState, AcceleratorState):
        state._shared_state["device"] = torch.device(NAME, 0)
    # what `args.device` keeps
    vars(trainer.args)["_setup_devices"] = torch.device(NAME, 0)


def micro_steps(folder: Path, settings: dict[str, Any]) -> list[MicroStep]:
    for state in (PartialState, AcceleratorState):
        state._reset_state()
    log, steps = Log(), []
    trainer = make_trainer(folder, settings)
    own_step, own_rollout = trainer.training_step, trainer.rollout_func
    generated = []

    def training_step(*args: Any, **kwargs: Any) -> Any:
        generated.clear()
        log.is_counting, log.waits = True, []
        loss = own_step(*args, **kwargs)
        log.is_counting = False
        steps.append(MicroStep(bool(generated), trainer.accelerator.sync_gradients, log.waits))
        return loss

    def rollout(*args: Any) -> Any:
        generated.append(True)
        return own_rollout(*args)

    trainer.training_step, trainer.rollout_func = training_step, rollout
    with far_device(log):
        move_far(trainer)
        trainer.train()
    return steps


def waits_of_operations() -> dict[str, list[Wait]]:
    log, waits = Log(is_counting=True), {}
    with far_device(log):
        for name, operation in OPERATIONS.items():
            far, near = torch.arange(4.0).to(NAME, non_blocking=True), torch.arange(2)
            log.waits = []
            operation(far, near)
            waits[name] = log.waits
    return waits


def main(out: str) -> None:
    install()
    found: dict[str, Any] = {name: micro_steps(Path(out + ".run"), settings) for name, settings in CASES.items()}
    found["operations"] = waits_of_operations()
    Path(out).write_text(json.dumps(found, default=asdict))


if __name__ == "__main__":
    main(sys.argv[1])
