"""The cases of the composition matrix: every two levels of what a run can be told meet in one of them; and their rows.

Rows are drawn once a case and looked up by the prompt, so that a row's completion, reward and masks are the same in the
trainer and in the oracle, whichever process, micro-batch or pack it ends up in.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from tests.pairwise import Constraint, covering_array

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
UNCLIPPED = ("cispo", "sapo", "vespo")
WITH_AUX_LOSS = "qwen3_moe with aux loss"
FACTORS: dict[str, tuple[Any, ...]] = {
    "loss_type": LOSS_TYPES,
    "importance_mode": (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    # qwen2 has a window; gemma2 a window, and soft caps on scores and logits
    "model": ("llama", "qwen2", "gemma2", "qwen3_moe", WITH_AUX_LOSS),
    # micro-batches a generation: as many as a window; some more, so that windows straddle generations; half, so that a
    # window has two; one, with too few rows to fill the last window
    "generation": ("a window", "longer", "shorter", "short last window"),
    "tuning": ("full", "new adapter", "trained adapter"),
    "checkpointing": ("off", "reentrant", "not reentrant"),
    "max_tokens_per_pack": (6, 20, None),
    "share_prompts": (True, False, "auto"),
    "accumulation": (1, 2, 4),
    "kl": (None, "plain", "bias-corrected"),
    "num_generations": (2, 3, 4),
    "processes": (1, 2),
    # one process of two gets no completions with a token in them
    "has_silent_process": (False, True),
    # three: the old policy's log-probs outlast the second pass
    "num_iterations": (1, 3),
    # whether a step trains on rows of older weights, which the two above decide
    "is_off_policy": (False, True),
    "tied": (False, True),
    "trains_head": (True, False),
    "importance_sampling_level": ("token", "sequence"),
    "has_zero_advantages": (False, True),
    "masks_truncated": (False, True),
    "has_env_mask": (False, True),
    "reports_logps": (True, False),
    "entropy_coef": (0.0, 0.05),
    # of no number of tokens that occurs an order statistic, where rounding would decide
    "top_entropy_quantile": (1.0, 0.437),
    "delta": (None, 1.1),
    "off_policy_mask_threshold": (None, 0.05),
    "temperature": (1.0, 0.7),
}

# with which no case has an entropy at its threshold, where rounding would decide
SEED = 0
EOS = 1
# of the tokenizer's characters
TOKENS = range(3, 40)
MAX_COMPLETION = 7


def _contradicts(is_off_policy: bool, generation: str, num_iterations: int) -> bool:
    return (num_iterations > 1 or generation == "longer") != is_off_policy


# what the config refuses, or cannot be
CONSTRAINTS: tuple[Constraint, ...] = (
    (("loss_type", "importance_mode"), lambda loss, mode: loss == "vespo" and (mode or "").startswith("sequence")),
    (("loss_type", "delta"), lambda loss, delta: loss in UNCLIPPED and delta is not None),
    (("importance_mode", "reports_logps"), lambda mode, reports: mode is not None and not reports),
    # reentrant checkpoints record what routers say without its gradient, for TRL, too
    (("model", "checkpointing"), lambda model, kind: model == WITH_AUX_LOSS and kind == "reentrant"),
    (("processes", "has_silent_process"), lambda processes, is_silent: processes == 1 and is_silent),
    # the quantile puts a micro-batch's packs into one graph: several backward passes through one reentrant checkpoint,
    # which DDP does not count
    (
        ("processes", "checkpointing", "top_entropy_quantile"),
        lambda processes, kind, share: processes > 1 and kind == "reentrant" and share < 1,
    ),
    # half of one micro-batch; a window of one cannot be short
    (("generation", "accumulation"), lambda kind, number: kind in ("shorter", "short last window") and number == 1),
    (("is_off_policy", "generation", "num_iterations"), _contradicts),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt with a completion, and what the outside world says of it.

    Attributes:
        prompt: Token ids.
        completion: Token ids, possibly none.
        score: The reward.
        advantage: From the rewards of its group.
        env_mask: 1 where the model wrote the token.
        noise: What the sampler's log-prob of each token is off the policy's; None where it reports none.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    score: float
    advantage: float
    env_mask: tuple[int, ...]
    noise: tuple[float | None, ...]

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a padded micro-batch shows of it."""
        return self.prompt, self.completion

    @property
    def silent(self) -> Row:
        """The same without a completion."""
        return replace(self, completion=(), env_mask=(), noise=())


@dataclass(frozen=True, kw_only=True)
class Case:
    """A level of every factor."""

    loss_type: str
    importance_mode: str | None
    model: str
    generation: str
    tuning: str
    checkpointing: str
    max_tokens_per_pack: int | None
    share_prompts: bool | str
    accumulation: int
    kl: str | None
    num_generations: int
    processes: int
    has_silent_process: bool
    num_iterations: int
    is_off_policy: bool
    tied: bool
    trains_head: bool
    importance_sampling_level: str
    has_zero_advantages: bool
    masks_truncated: bool
    has_env_mask: bool
    reports_logps: bool
    entropy_coef: float
    top_entropy_quantile: float
    delta: float | None
    off_policy_mask_threshold: float | None
    temperature: float

    @property
    def name(self) -> str:
        """All levels, for a failure to be read."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @property
    def family(self) -> str:
        """The builder of the model."""
        return self.model.split()[0]

    @property
    def aux_loss_coef(self) -> float | None:
        """Weight of the router's auxiliary loss; None for models without routers."""
        return None if self.family != "qwen3_moe" else 0.1 if self.model == WITH_AUX_LOSS else 0.0

    @property
    def beta(self) -> float:
        return 0.0 if self.kl is None else 0.1

    @property
    def epsilons(self) -> tuple[float, float]:
        """Ratios of whole sequences are nearer 1: bounds as wide as for tokens would clip none."""
        low, high = (0.2, 0.28) if self.importance_sampling_level == "token" else (0.05, 0.07)
        return low, 1 + high if self.loss_type == "cispo" else high

    @property
    def steps_per_generation(self) -> int:
        half = max(1, self.accumulation // 2)
        longer = self.accumulation + half
        return {"a window": self.accumulation, "longer": longer, "shorter": half, "short last window": 1}[
            self.generation
        ]

    @property
    def rows_per_micro_batch(self) -> int:
        """Of a process; small, and at least two groups a generation."""
        is_lone = self.steps_per_generation * self.processes == 1
        return 2 * self.num_generations if is_lone or self.num_generations < 4 else self.num_generations

    @property
    def num_steps(self) -> int:
        """Optimizer steps: until every generation has been passed often enough to be off-policy, or straddled."""
        micro_steps = self.steps_per_generation * self.num_iterations
        if self.generation == "short last window":
            return -1
        return min(-(-micro_steps // self.accumulation), 3)

    @property
    def num_rollouts(self) -> int:
        """Generations there are prompts for."""
        if self.generation != "short last window":
            return -(-self.num_steps * self.accumulation // (self.steps_per_generation * self.num_iterations))
        # some windows, and a part of another
        return self.accumulation + 1 if self.num_iterations == 1 else 3

    @property
    def prompts_per_rollout(self) -> int:
        return self.rows_per_micro_batch * self.steps_per_generation * self.processes // self.num_generations

    @cached_property
    def groups(self) -> list[list[Row]]:
        """The completions of every prompt of the data set."""
        rng = random.Random(f"{SEED} {self.name}")
        groups: list[list[Row]] = []
        for i in range(self.prompts_per_rollout * self.num_rollouts):
            # two data set rows may have the same prompt
            again = i % 5 == 4
            prompt = groups[i - 1][0].prompt if again else self._prompt(rng, 1 + i % 6, groups)
            lengths = [(i + 3 * k) % (MAX_COMPLETION + 1) for k in range(self.num_generations)]
            # equal rows must have equal advantages: one of the two groups only has empty completions
            lengths = [max(length, 2) if again else length for length in lengths]
            # completions of a prompt part at their first token
            taken = {row.completion[0] for row in groups[i - 1] if row.completion} if again else set()
            firsts = rng.sample([token for token in TOKENS if token not in taken], len(lengths))
            completions = [self._completion(rng, *pair) for pair in zip(firsts, lengths, strict=True)]
            is_flat = self.has_zero_advantages and i % 2 == 0
            scores = [1.0 if is_flat else (k * 3 % 4) / 2 + i % 3 for k in range(len(completions))]
            rows = zip(completions, scores, advantages(scores), strict=True)
            groups.append([self._row(rng, prompt, groups, again or k > 0, *row) for k, row in enumerate(rows)])
        keys = [row.key for group in groups for row in group]
        assert len(set(keys)) == len(keys), "rows must be told apart"
        return groups

    def _prompt(self, rng: random.Random, length: int, groups: list[list[Row]]) -> tuple[int, ...]:
        """One that no group has; longer if there is none of the length."""
        taken = {row.prompt for group in groups for row in group}
        drawn = (draw(rng, length + attempt // 50) for attempt in itertools.count())
        return next(prompt for prompt in drawn if prompt not in taken)

    @cached_property
    def rows(self) -> dict[tuple[tuple[int, ...], tuple[int, ...]], Row]:
        """By what a micro-batch shows of them; a silent process's, whatever their advantage, too."""
        every = [row for group in self.groups for row in group]
        silent = {row.silent.key: row.silent for row in every} if self.has_silent_process else {}
        return silent | {row.key: row for row in every}

    def _completion(self, rng: random.Random, first: int, length: int) -> tuple[int, ...]:
        tokens = (first, *draw(rng, length - 1)) if length else ()
        is_truncated = rng.random() < 0.3
        return tokens if is_truncated or not tokens else (*tokens[:-1], EOS)

    def _row(
        self,
        rng: random.Random,
        prompt: tuple[int, ...],
        groups: list[list[Row]],
        repeats_prompt: bool,
        completion: tuple[int, ...],
        score: float,
        advantage: float,
    ) -> Row:
        env_mask = [1] * len(completion)
        if self.has_env_mask:
            writes_none = rng.random() < 0.1
            env_mask = [int(rng.random() < 0.7 and not writes_none) for _ in completion]
        if self.top_entropy_quantile < 1 and repeats_prompt:
            # the first tokens of a prompt's completions are equally uncertain: rounding would decide which of them
            # reach a threshold between them, so at most one is in the loss, or the prompts differ
            if self.has_env_mask:
                env_mask[:1] = [0] * len(env_mask[:1])
            else:
                prompt = self._prompt(rng, len(prompt), groups)
        return Row(
            prompt=prompt,
            completion=completion,
            score=score,
            advantage=advantage,
            env_mask=tuple(env_mask),
            noise=tuple(None if rng.random() < 0.05 else rng.uniform(-0.3, 0.3) for _ in completion),
        )


def draw(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.choice(TOKENS) for _ in range(length))


def advantages(scores: list[float]) -> list[float]:
    """TRL's, of one group: standardised with Bessel's correction."""
    mean = sum(scores) / len(scores)
    std = (sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)) ** 0.5
    return [(score - mean) / (std + 1e-4) for score in scores]


CASES = [Case(**levels) for levels in covering_array(FACTORS, CONSTRAINTS)]
