"""The same script run with TRL 1.16 and with us, and what must be equal afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from tests.tiny_lm import CHARACTERS, make_model, make_tokenizer

# fp32, of losses, metrics and what a run has added to the weights; TRL counts positions from the left padding, we from
# 0, which rotates otherwise rounded queries and keys
CLOSE = 1e-5
# of a metric whose size says nothing of what it is the difference of: a loss of 0 is a sum of advantages near 1
ABSOLUTE = 1e-6
# norm of the rounding that weights near 1 are stored with
STORED = 1e-6
# in seconds: present in both, equal in none
CLOCKS = ("step_time", "_runtime", "_per_second")
# ours alone
OURS = (
    "time/",
    "memory/",
    "tokens/",
    "rows/",
    "sampling/sampling_logp_difference/p99",
    "sampling/importance_sampling_ratio/unclipped_mean",
    "sampling/effective_sample_size",
    "sampling/kl_",
)

PROMPTS = ("ab=", "abc=", "dcba=", "a=", "bad cab=", "fade=", "cafe bead=")
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 9,
    # Adam would turn the sign of a gradient that is zero but for rounding into a whole step
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_steps": 5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 11,
}

# completions of the prompts, and the sampler's log-probs or None
Draw = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float | None]] | None]]


def digits_reward(completions, **kwargs):
    return [sum(c in "0123456789" for c in text) / 4 for text in completions]


def column_reward(completions, target, **kwargs):
    return [None if t == 0 else float(len(text) % 3 == t % 3) for text, t in zip(completions, target, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a user writes.

    Attributes:
        settings: Fields of the config, over `SETTINGS`.
        model: One of `SAVED`.
        lora: Trains a new adapter.
        streams: The training data is an `IterableDataset`.
        prompts: The training data.
        rewards: The reward functions.
        draw: Takes the place of the sampler.
        attributes: What the user sets on the trainer after its construction.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    lora: bool = False
    streams: bool = False
    prompts: Sequence[str] = PROMPTS
    rewards: Sequence[Callable[..., Any]] = (digits_reward, column_reward)
    draw: Draw | None = None
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """What a run leaves."""

    completions: list[list[list[int]]] = field(default_factory=list)
    advantages: list[list[float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)

    def changes(self) -> torch.Tensor:
        """What the run added to each weight, in the order of their names."""
        added = [(self.after[name] - before).flatten() for name, before in sorted(self.before.items())]
        return torch.cat(added).double()


class Keeper(TrainerCallback):
    """Keeps the advantages in force at each step."""

    trainer: Any

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_end(self, *args, **kwargs):
        self.record.advantages.append(list(self.trainer._logs["advantages"]))


def save_llama(folder):
    make_model(seed=1).save_pretrained(folder)


def save_moe(folder):
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def save_falcon(folder):
    """Attention that cannot be replaced, with ALiBi."""
    torch.manual_seed(1)
    config = FalconConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    FalconForCausalLM(config).save_pretrained(folder)


def save_mamba(folder):
    """A recurrent state."""
    torch.manual_seed(1)
    config = MambaConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    MambaForCausalLM(config).save_pretrained(folder)


SAVED = {"llama": save_llama, "adapted": save_llama, "moe": save_moe, "falcon": save_falcon, "mamba": save_mamba}


def save_model(name: str, folder: Any) -> str:
    """The model's folder: TRL loads its reference from the policy's."""
    SAVED[name](folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def adapted(folder):
    """A model that comes with a trained adapter: its reference is neither the model alone nor a new adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)


def run(package: Any, script: Script, folder: Any) -> Record:
    """Run a script with `trl` or `grpo_fast`, in `folder`, where the same model is made each time."""
    record = Record()

    def keep(completion_ids, **kwargs):
        record.completions.append(completion_ids)
        return [None] * len(completion_ids)

    settings = {"output_dir": str(folder / package.__name__)}
    if package.__name__ == "grpo_fast":
        # metrics of all rows, as TRL's
        settings["skip_zero_gradient_rows"] = False
    model = save_model(script.model, folder / "model")
    rows = [{"prompt": prompt, "target": i} for i, prompt in enumerate(script.prompts)]
    keeper = Keeper(record)
    trainer = trainer_class(package, script.draw)(
        model=adapted(model) if script.model == "adapted" else model,
        reward_funcs=[*script.rewards, keep],
        args=package.GRPOConfig(**SETTINGS | settings | script.settings),
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)) if script.streams else Dataset.from_list(rows),
        eval_dataset={"few": Dataset.from_list(rows[:2]), "more": Dataset.from_list(rows[2:6])},
        processing_class=make_tokenizer(),
        callbacks=[keeper],
        peft_config=new_adapter() if script.lora else None,
    )
    keeper.trainer = trainer
    for name, value in script.attributes.items():
        setattr(trainer, name, value)
    record.before = weights_of(trainer)
    trainer.train()
    record.history, record.after = trainer.state.log_history, weights_of(trainer)
    return record


def trainer_class(package: Any, draw: Draw | None) -> Any:
    if draw is None:
        return package.GRPOTrainer

    class Scripted(package.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return draw(prompt_ids)

    return Scripted


def new_adapter():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"])


def weights_of(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(ours: Record, theirs: Record) -> None:
    """Completions, advantages, every line of the log, and the weights."""
    assert ours.completions == theirs.completions
    advantages = torch.tensor(ours.advantages), torch.tensor(theirs.advantages)
    torch.testing.assert_close(*advantages, rtol=CLOSE, atol=ABSOLUTE)
    for line_ours, line_theirs in zip(ours.history, theirs.history, strict=True):
        assert_same_line(line_ours, line_theirs)
    assert ours.after.keys() == theirs.after.keys()
    error = (ours.changes() - theirs.changes()).norm()
    assert error <= CLOSE * theirs.changes().norm() + STORED


def assert_same_line(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert {name for name in ours if not name.startswith(OURS)} == theirs.keys()
    for name, value in theirs.items():
        if name.endswith(CLOCKS):
            continue
        where = f"{name} at step {theirs['step']}"
        if value is None or math.isnan(value):
            assert ours[name] is None or math.isnan(ours[name]), where
        else:
            assert ours[name] == pytest.approx(value, rel=CLOSE, abs=ABSOLUTE), where
