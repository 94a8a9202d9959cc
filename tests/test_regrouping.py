"""However the rows of an optimizer step are ordered, split into micro-batches, packed or share prompts: one gradient.

Random row sets of every loss type, each against the padded float64 oracle, which has them in another grouping.

Letters: B rows of the window, C padded completion length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from grpo_fast import GRPOConfig, GRPOTrainer
from tests.padded_loss import Inputs, Settings, bounds_of, padded_loss, sampler_weights
from tests.padded_oracle import Padded, PaddedPolicy
from tests.tiny_lm import make_model, make_tokenizer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
NUM_SETS = 200
MAX_COMPLETION = 7
SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# fp32 against float64: of the gradient's norm; what VESPO sums stands in an exponent, times three
CLOSE, CLOSE_VESPO = 1e-5, 3e-5
# of the size of the loss's terms, whose gradients may cancel
CLOSE_TERMS = 2e-6


@dataclass(frozen=True)
class Rows:
    """A random window, one of `num_windows` of its generation: its rows, and what they are trained for."""

    prompts: list[tuple[int, ...]]
    completions: list[tuple[int, ...]]
    is_kept: list[bool]
    tool_mask: Tensor | None
    advantages: Tensor
    num_micro_batches: int
    num_windows: int
    has_old_logps: bool
    settings: Settings


def draw_rows(rng: random.Random, loss_type: str) -> Rows:
    num_groups, num_generations = rng.randint(1, 3), rng.choice((2, 4))
    num_rows = num_groups * num_generations
    prompts, completions = [], []
    for _ in range(num_groups):
        prompts += [draw(rng, rng.randint(1, 5))] * num_generations
        completions += [draw(rng, rng.choice((0, 1, rng.randint(2, MAX_COMPLETION)))) for _ in range(num_generations)]
    width = max([1, *map(len, completions)])
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    has_token_advantages = rng.random() < 0.2
    shape = (num_rows, width) if has_token_advantages else (num_rows, 1)
    advantages = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.3)
    mode = rng.choice((None, *MODES))
    if loss_type == "vespo" and mode is not None:
        mode = mode.replace("sequence", "token")
    level = rng.choice(("token", "sequence"))
    low, high = (0.2, 0.28) if level == "token" else (0.05, 0.07)
    return Rows(
        prompts=prompts,
        completions=completions,
        is_kept=[rng.random() < 0.85 for _ in range(num_rows)],
        tool_mask=(torch.rand(num_rows, width, generator=g) > 0.3).long() if rng.random() < 0.3 else None,
        advantages=advantages,
        num_micro_batches=rng.choice((1, 2) if num_rows % 4 else (1, 2, 4)),
        num_windows=rng.choice((1, 1, 2)),
        has_old_logps=rng.random() < 0.6,
        settings=Settings(
            loss_type=loss_type,
            importance_sampling_level=level,
            epsilon_low=low,
            epsilon_high=1 + high if loss_type == "cispo" else high,
            delta=rng.choice((None, 1.1)) if loss_type not in ("cispo", "sapo", "vespo") else None,
            beta=rng.choice((0.0, 0.0, 0.1)),
            use_bias_correction_kl=rng.random() < 0.5,
            off_policy_mask_threshold=rng.choice((None, None, 0.05)),
            importance_mode=mode,
            clip_min=0.8,
            clip_max=1.25,
            max_completion_length=MAX_COMPLETION,
            entropy_coef=rng.choice((0.0, 0.0, 0.1)),
        ),
    )


def draw(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, SIZES["vocab_size"]) for _ in range(length))


class Window:
    """A row set with its oracle."""

    def __init__(self, rows: Rows, policy: PaddedPolicy, seed: int) -> None:
        self.rows, self.policy = rows, policy
        self.padded = Padded.of(rows.prompts, rows.completions, rows.is_kept)
        self.logps, self.entropies, _ = policy.score(self.padded, temperature=1.0)
        mask = self.padded.is_scored
        self.inputs = self._inputs(mask if rows.tool_mask is None else mask & rows.tool_mask.bool(), seed)

    def _inputs(self, mask: Tensor, seed: int) -> Inputs:
        """Other policies near this one, in the precision that they are kept in."""
        g, settings = torch.Generator().manual_seed(seed), self.rows.settings

        def near(logps: Tensor) -> Tensor:
            return (logps + 0.5 * (2 * torch.rand(logps.shape, generator=g) - 1)).float().double()

        logps = self.logps.detach()
        old_logps = near(logps) if self.rows.has_old_logps else logps
        sampling_logps = None if settings.importance_mode is None else near(old_logps)
        if sampling_logps is not None:
            sampling_logps[0, 0] = float("nan")
        return Inputs(
            mask=mask,
            advantages=self.rows.advantages.double(),
            old_logps=old_logps,
            ref_logps=near(logps) if settings.beta else None,
            sampling_logps=sampling_logps,
            num_items=max(1, int(mask.sum()) * self.rows.num_windows + seed % 5),
            accumulation=self.rows.num_micro_batches,
            steps_per_generation=self.rows.num_micro_batches * self.rows.num_windows,
        )

    def is_well_posed(self) -> bool:
        """Whether rounding decides nothing: no ratio stands at a bound."""
        gaps = bounds_of(self.logps.detach(), self.inputs, self.rows.settings)
        return not gaps.numel() or gaps.min().item() > 1e-4

    def truth(self, grouping: list[list[int]]) -> tuple[Tensor, float, float]:
        """The gradient of all parameters end to end, the loss, and the size of its terms; float64."""
        self.policy.model.zero_grad(set_to_none=True)
        parts = [
            padded_loss(self.logps[part], self.entropies[part], None, part_of(self.inputs, part), self.rows.settings)
            for part in grouping
        ]
        loss = torch.stack([part.value for part in parts]).sum()
        loss.backward()
        return gradients_of(self.policy.model), loss.item(), sum(part.size.item() for part in parts)

    def micro_batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Some rows as the trainer takes them."""
        inputs, settings = part_of(self.inputs, rows), self.rows.settings
        width = self.padded.is_scored.shape[1]
        ids, mask = self.padded.input_ids[rows], self.padded.attention_mask[rows]
        advantages = self.rows.advantages[rows]
        batch = {
            "prompt_ids": ids[:, :-width],
            "prompt_mask": mask[:, :-width],
            "completion_ids": ids[:, -width:],
            "completion_mask": mask[:, -width:],
            "advantages": advantages[:, 0] if advantages.shape[1] == 1 else advantages,
            "num_items_in_batch": torch.tensor(int(self.inputs.num_items)),
        }
        if self.rows.tool_mask is not None:
            batch["tool_mask"] = self.rows.tool_mask[rows]
        if inputs.ref_logps is not None:
            batch["ref_per_token_logps"] = inputs.ref_logps.float()
        if inputs.sampling_logps is not None:
            batch["sampling_per_token_logps"] = inputs.sampling_logps.float()
        if self.rows.has_old_logps:
            batch["old_per_token_logps"] = inputs.old_logps.float()
            weights = sampler_weights(inputs, settings)
            if weights is not None:
                batch["importance_sampling_ratio"] = weights.float()
        return batch


def part_of(inputs: Inputs, rows: list[int]) -> Inputs:
    tensors = ("mask", "advantages", "old_logps", "ref_logps", "sampling_logps")
    values = {name: getattr(inputs, name) for name in tensors}
    return replace(inputs, **{name: None if value is None else value[rows] for name, value in values.items()})


def gradients_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def regrouped(rng: random.Random, num_rows: int, num_micro_batches: int) -> list[list[int]]:
    """A random partition into micro-batches of one size."""
    order = rng.sample(range(num_rows), num_rows)
    return [order[i::num_micro_batches] for i in range(num_micro_batches)]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Any:
    trainer = GRPOTrainer(
        model=make_model(seed=3, **SIZES),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            str(tmp_path_factory.mktemp("regrouping")),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_generations=2,
            max_completion_length=MAX_COMPLETION,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=make_tokenizer(),
    )
    trainer.model.train()
    return trainer


@pytest.fixture(scope="module")
def policy(trainer) -> PaddedPolicy:
    return PaddedPolicy(make_model(**SIZES), trainer.model.state_dict())


def tell(trainer: Any, rows: Rows, num_micro_batches: int, rng: random.Random) -> None:
    """Set the attributes that the loss reads, and another way of packing."""
    settings = rows.settings
    for name in (
        *("loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "beta", "entropy_coef"),
        "off_policy_mask_threshold",
    ):
        setattr(trainer, name, getattr(settings, name))
    trainer._entropy_bonus_enabled = bool(settings.entropy_coef)
    trainer.use_vllm = settings.importance_mode is not None
    trainer.vllm_importance_sampling_mode = settings.importance_mode or "sequence_mask"
    trainer.vllm_importance_sampling_clip_min = settings.clip_min
    trainer.vllm_importance_sampling_clip_max = settings.clip_max
    trainer.args.delta, trainer.args.use_bias_correction_kl = settings.delta, settings.use_bias_correction_kl
    trainer.args.max_tokens_per_pack = rng.choice((3, 8, 16, None))
    trainer.args.share_prompts = rng.choice(("always", "never", "auto"))
    trainer.current_gradient_accumulation_steps = num_micro_batches
    trainer.args.steps_per_generation = num_micro_batches * rows.num_windows


def step(trainer: Any, window: Window, grouping: list[list[int]], *, is_buffered: bool) -> tuple[Tensor, float]:
    """The trainer's gradient and loss of a window in some grouping; `is_buffered` lets it pack all micro-batches."""
    trainer.model.zero_grad(set_to_none=True)
    micro_batches = [window.micro_batch(part) for part in grouping]
    trainer._buffered_inputs, trainer._step = micro_batches if is_buffered else None, 0
    trainer.get_batch_samples(iter([[]] * len(micro_batches)), len(micro_batches), torch.device("cpu"))
    total = 0.0
    for inputs in micro_batches:
        with trainer._scoring_attention(trainer.model):
            loss = trainer._compute_loss(trainer.model, inputs)
            loss.backward()
        total += loss.item()
        trainer._step += 1
    trainer._pending_stats.clear()
    return gradients_of(trainer.model), total


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_do_not_move(trainer, policy, loss_type):
    rng = random.Random(loss_type)
    close = CLOSE_VESPO if loss_type == "vespo" else CLOSE
    num_tried = num_moving = 0
    while num_tried < NUM_SETS:
        rows = draw_rows(rng, loss_type)
        window = Window(rows, policy, rng.randrange(2**31))
        if not window.is_well_posed():
            continue
        num_tried += 1
        num_rows, num_micro_batches = len(rows.prompts), rows.num_micro_batches
        # a micro-batch's own tokens divide its loss in "bnpo": there rows keep to it
        before = regrouped(rng, num_rows, num_micro_batches)
        after = [rng.sample(part, len(part)) for part in rng.sample(before, len(before))]
        # the bonus is a mean over the micro-batch's tokens, too
        if loss_type != "bnpo" and not rows.settings.entropy_coef:
            after = regrouped(rng, num_rows, rng.choice([n for n in (1, 2, 4) if num_rows % n == 0]))
        expected, expected_loss, size = window.truth(before)
        tell(trainer, rows, len(after), rng)
        gradient, loss = step(trainer, window, after, is_buffered=rng.random() < 0.7)
        assert abs(loss - expected_loss) <= close * size + 1e-9, rows
        assert (gradient - expected).norm() <= close * expected.norm() + CLOSE_TERMS * size, rows
        num_moving += bool(expected.norm() > 1e-3)
    assert num_moving > 0.8 * NUM_SETS
