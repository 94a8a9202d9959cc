"""One padded micro-batch through TRL 1.16's `_compute_loss` and through ours: loss, gradients and metrics of each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from datasets import Dataset

from tests.tiny_lm import make_model, make_tokenizer

PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11, 12, 13], [14], [5, 6, 7, 8]]
# the third row is empty, the fifth has one token
LENGTHS = [6, 3, 0, 5, 1, 4]
B, P, C = len(LENGTHS), 4, 6
VOCABULARY = range(3, 40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The settings of a comparison, in TRL's names; what is None or False is left out."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    delta: float | None = None
    importance_mode: str | None = None
    has_old: bool = True
    masks_truncated: bool = False
    has_tool_mask: bool = False
    has_token_advantages: bool = False
    masks_everything: bool = False
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    temperature: float = 1.0
    accumulation: int = 1
    steps_per_generation: int = 1
    is_training: bool = True

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        default = Case()
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{k}={v}" for k, v in changed.items() if v != getattr(default, k)) or "defaults"


def make_trainer(package: Any, folder: Any, **kwargs: Any) -> Any:
    """A trainer of TRL or ours on the tiny model, whose loss can be asked for without a run."""
    settings = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": B,
        "num_generations": 2,
        "max_completion_length": 7,
    }
    trainer = package.GRPOTrainer(
        model=make_model(seed=3),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=package.GRPOConfig(str(folder), **settings | kwargs),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"] * B}),
        processing_class=make_tokenizer(),
    )
    trainer.model.train()
    return trainer


def prepare(trainer: Any, case: Case) -> None:
    """Give a trainer the case's settings where `_compute_loss` reads them."""
    for name in ("loss_type", "importance_sampling_level", "beta", "off_policy_mask_threshold", "entropy_coef"):
        setattr(trainer, name, getattr(case, name))
    trainer.top_entropy_quantile = case.top_entropy_quantile
    trainer.temperature = case.temperature
    trainer._entropy_bonus_enabled = bool(case.entropy_coef)
    # ratios of whole sequences stay near 1: bounds as wide as for tokens would clip none
    low, high = (0.2, 0.28) if case.importance_sampling_level == "token" else (0.02, 0.03)
    trainer.epsilon_low, trainer.epsilon_high = low, 1 + high if case.loss_type == "cispo" else high
    trainer.args.delta, trainer.args.use_bias_correction_kl = case.delta, case.use_bias_correction_kl
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = case.importance_mode is not None
    trainer.vllm_importance_sampling_mode = case.importance_mode or "sequence_mask"
    trainer.args.steps_per_generation = case.steps_per_generation
    # metrics of all rows, as TRL's
    trainer.args.skip_zero_gradient_rows = False
    trainer.current_gradient_accumulation_steps = case.accumulation
    trainer.model.train(case.is_training)
    trainer.model.zero_grad(set_to_none=True)
    for metrics in trainer._metrics.values():
        metrics.clear()


def make_inputs(case: Case, logps: torch.Tensor) -> dict[str, Any]:
    """A padded micro-batch; the old policy is near the current one, whose log-probs are `logps` [B, C]."""
    g = torch.Generator().manual_seed(0)

    def near(values: torch.Tensor, spread: float) -> torch.Tensor:
        return values + spread * (2 * torch.rand(B, C, generator=g) - 1)

    completion_mask = (torch.arange(C) < torch.tensor(LENGTHS)[:, None]).long()
    tool_mask = torch.ones(B, C, dtype=torch.long)
    if case.has_tool_mask:
        tool_mask[:, 1:3] = 0
    kept = torch.tensor([1, 1, 1, 0, 1, 1]) if case.masks_truncated else torch.ones(B, dtype=torch.long)
    kept = kept * (not case.masks_everything)
    completion_mask, tool_mask = completion_mask * kept[:, None], tool_mask * kept[:, None]
    mask = completion_mask * tool_mask
    old = near(logps, 0.6) if case.has_old else logps
    inputs = {
        "prompt_ids": torch.tensor([[0] * (P - len(p)) + p for p in PROMPTS]),
        "prompt_mask": torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in PROMPTS]),
        "completion_ids": completion_ids(),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.5, 2.0, -1.5, 0.7, -2.0]),
        "num_items_in_batch": mask.sum() * case.steps_per_generation + 3,
    }
    if case.has_token_advantages:
        inputs["advantages"] = near(torch.zeros(B, C), 1.5)
    if case.has_tool_mask:
        inputs["tool_mask"] = tool_mask
    if case.has_old:
        inputs["old_per_token_logps"] = old
    if case.beta:
        inputs["ref_per_token_logps"] = near(logps, 0.5)
    if case.importance_mode is not None:
        sampling = near(old, 0.4)
        sampling[0, 3] = float("nan")
        inputs["sampling_per_token_logps"] = sampling
        inputs["importance_sampling_ratio"] = importance_ratio(case.importance_mode, old, sampling, mask)
    return inputs


def completion_ids() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY.start, VOCABULARY.stop, (B, C), generator=g)
    return torch.where(torch.arange(C) < torch.tensor(LENGTHS)[:, None], ids, 0)


def importance_ratio(
    mode: str, old: torch.Tensor, sampling: torch.Tensor, mask: torch.Tensor, low: float = 0.8, high: float = 1.25
) -> torch.Tensor:
    """TRL 1.16's formula, from its description."""
    difference = ((old - sampling) * mask).nan_to_num(nan=0.0)
    ratio = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def loss_and_gradients(trainer: Any, case: Case, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The micro-batch's loss, every parameter's gradient end to end, and the metrics."""
    prepare(trainer, case)
    with torch.set_grad_enabled(case.is_training):
        if hasattr(trainer, "_scoring_attention"):
            with trainer._scoring_attention(trainer.model):
                loss = trainer._compute_loss(trainer.model, dict(inputs))
                if case.is_training:
                    loss.backward()
            trainer._flush_stats()
        else:
            loss = trainer._compute_loss(trainer.model, dict(inputs))
            if case.is_training:
                loss.backward()
    parameters = list(trainer.model.parameters())
    gradients = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    metrics = trainer._metrics["train" if case.is_training else "eval"]
    # beside what ours alone counts
    values = {name: values[0] for name, values in metrics.items() if not name.startswith(("tokens/", "rows/"))}
    return loss.detach(), gradients, values
