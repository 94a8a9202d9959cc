"""Length profiles of GRPO jobs, and one optimizer step's rows for each: 8 prompts with 8 completions of random tokens.

Prompt and completion lengths are log-normal. A profile takes the mid-quantiles of the distribution, 8 for the prompts
and 64 for the completions, in an order drawn with the seed: the longest row, which padding is measured by, is then no
matter of luck.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass
from statistics import NormalDist

PROMPTS = 8
# completions a prompt
GENERATIONS = 8
# rows of a micro-batch
MICRO_BATCH = 4
MICRO_BATCHES = PROMPTS * GENERATIONS // MICRO_BATCH
PAD, EOS = 0, 1
FIRST_WORD = 2


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Lengths in tokens; medians and sigmas (of the logarithm) of the log-normal distributions.

    Attributes:
        prompt: Median.
        prompt_sigma: Spread.
        completion: Median.
        completion_sigma: Spread.
        max_completion: Longer completions are cut there; None cuts nothing.
        target: Tokens that TRL 1.16 runs over the tokens of packed rows with shared prompts.
        timed_scale: What all lengths are multiplied by where seconds are measured.
        timed_micro_batches: How many of TRL's micro-batches, which are all of one shape, are run there.
    """

    prompt: int
    prompt_sigma: float
    completion: int
    completion_sigma: float
    max_completion: int | None = None
    target: float
    timed_scale: float = 1.0
    timed_micro_batches: int = MICRO_BATCHES


PROFILES = {
    "math": Profile(
        prompt=100,
        prompt_sigma=0.3,
        completion=250,
        completion_sigma=0.55,
        max_completion=1000,
        target=3.5,
        timed_micro_batches=4,
    ),
    "cot": Profile(
        prompt=150,
        prompt_sigma=0.4,
        completion=1200,
        completion_sigma=0.65,
        max_completion=4000,
        target=2.9,
        timed_micro_batches=2,
    ),
    "r1": Profile(
        prompt=150,
        prompt_sigma=0.4,
        completion=4000,
        completion_sigma=0.65,
        max_completion=16000,
        target=3.3,
        timed_scale=0.25,
        timed_micro_batches=2,
    ),
    "rag": Profile(
        prompt=1500,
        prompt_sigma=0.45,
        completion=250,
        completion_sigma=0.55,
        target=7.8,
        timed_micro_batches=2,
    ),
    "agent": Profile(
        prompt=3000,
        prompt_sigma=0.35,
        completion=300,
        completion_sigma=0.75,
        target=8.8,
        timed_micro_batches=2,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Token ids of a prompt and of one of its completions, and the completion's reward."""

    prompt: list[int]
    completion: list[int]
    reward: float


def quantile_lengths(median: int, sigma: float, count: int, *, scale: float, limit: int | None = None) -> list[int]:
    """`count` mid-quantiles of a log-normal distribution, ascending, cut at `limit`, then scaled; at least 2."""
    normal = NormalDist(math.log(median), sigma)
    exact = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [max(2, round(scale * min(length, limit or math.inf))) for length in exact]


def draw_rows(profile: Profile, *, scale: float, vocabulary: int, seed: int) -> list[list[Row]]:
    """The rows of each prompt. Rewards alternate between 0 and 1, so that every row has a gradient.

    Raises:
        ValueError: If the vocabulary is too small to tell prompts apart.
    """
    if vocabulary < 2 * FIRST_WORD:
        raise ValueError(f"vocabulary must be at least {2 * FIRST_WORD}, got {vocabulary}")
    draw = random.Random(seed)
    prompts = quantile_lengths(profile.prompt, profile.prompt_sigma, PROMPTS, scale=scale)
    completions = quantile_lengths(
        profile.completion,
        profile.completion_sigma,
        PROMPTS * GENERATIONS,
        scale=scale,
        limit=profile.max_completion,
    )
    draw.shuffle(prompts)
    draw.shuffle(completions)
    groups = []
    for i, length in enumerate(prompts):
        prompt = draw.choices(range(FIRST_WORD, vocabulary), k=length)
        rows = []
        for j, size in enumerate(completions[i * GENERATIONS : (i + 1) * GENERATIONS]):
            completion = [*draw.choices(range(FIRST_WORD, vocabulary), k=size - 1), EOS]
            rows.append(Row(prompt=prompt, completion=completion, reward=float(j % 2)))
        groups.append(rows)
    return groups


def true_tokens(groups: list[list[Row]]) -> int:
    """Tokens of all rows, prompts repeated, nothing padded."""
    return sum(len(row.prompt) + len(row.completion) for rows in groups for row in rows)


def longest(groups: list[list[Row]]) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest completion."""
    rows = [row for rows in groups for row in rows]
    return max(len(row.prompt) for row in rows), max(len(row.completion) for row in rows)


def digest(groups: list[list[Row]]) -> str:
    """What tells two sets of rows apart."""
    text = json.dumps([[row.prompt, row.completion, row.reward] for rows in groups for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
