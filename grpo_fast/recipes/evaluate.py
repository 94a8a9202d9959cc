"""Held-out accuracy through the run's own engine: greedy, and pass@1 of samples at temperature 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from grpo_fast.batch import Sampling
from grpo_fast.data import is_conversational, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_fast.generation import Engine

# two-sided 95 %
Z = 1.959964

AccuracyFunc = Callable[..., list[float]]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A share of right answers with its 95 % interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model answers to the held-out problems.

    Attributes:
        greedy: Accuracy of the greedy completions.
        sampled: pass@1 of `num_samples` completions a problem at temperature 1.
        num_problems: Held-out problems.
        num_samples: Samples a problem.
        greedy_texts: The greedy completion of each problem.
        sampled_texts: The first sample of each problem.
    """

    greedy: Accuracy
    sampled: Accuracy
    num_problems: int
    num_samples: int
    greedy_texts: list[str]
    sampled_texts: list[str]


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share observed in `count` independent trials (`count` need not be whole)."""
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def grouped_accuracy(scores: list[list[float]]) -> Accuracy:
    """Accuracy over problems with several 0/1 scores each.

    Samples of one problem succeed or fail together, so the interval counts them as the number of independent trials
    whose mean would vary as much as the problems' means do: at least one a problem, at most every sample.

    Args:
        scores: For each problem the scores of its samples, the same number for all.
    """
    means = [sum(row) / len(row) for row in scores]
    share = sum(means) / len(means)
    samples = len(means) * len(scores[0])
    variance = sum((mean - share) ** 2 for mean in means) / max(len(means) - 1, 1) / len(means)
    effective = share * (1 - share) / variance if variance > 0 else samples
    low, high = wilson_interval(share, min(max(effective, len(means)), samples))
    return Accuracy(share=share, low=low, high=high)


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    accuracy_func: AccuracyFunc,
    *,
    max_tokens: int,
    num_samples: int,
    seed: int,
) -> Evaluation:
    """Answer every problem greedily and `num_samples` times at temperature 1.

    Args:
        engine: Generates with its present weights.
        tokenizer: Renders and decodes.
        dataset: Columns `prompt` and those `accuracy_func` reads.
        accuracy_func: A reward function whose values are 1.0 (right) and 0.0.
        max_tokens: Most new tokens of a completion.
        num_samples: Samples a problem.
        seed: Seed of the samples.
    """
    rows: list[dict[str, Any]] = dataset.to_list()
    prompt_ids = tokenize_prompts([row["prompt"] for row in rows], tokenizer, {})

    def answer(sampling: Sampling, repeats: int) -> tuple[list[str], list[list[float]]]:
        repeated = [ids for ids in prompt_ids for _ in range(repeats)]
        generated = engine.generate(repeated, sampling)
        texts: list[str] = tokenizer.batch_decode(generated.ids, skip_special_tokens=True)
        scores = _score(rows, texts, accuracy_func, repeats)
        return texts[::repeats], [scores[start : start + repeats] for start in range(0, len(scores), repeats)]

    greedy_texts, greedy_scores = answer(Sampling(max_tokens=max_tokens, temperature=0.0), 1)
    sampled_texts, sampled_scores = answer(Sampling(max_tokens=max_tokens, temperature=1.0, seed=seed), num_samples)
    return Evaluation(
        greedy=grouped_accuracy(greedy_scores),
        sampled=grouped_accuracy(sampled_scores),
        num_problems=len(rows),
        num_samples=num_samples,
        greedy_texts=greedy_texts,
        sampled_texts=sampled_texts,
    )


def _score(rows: list[dict[str, Any]], texts: list[str], accuracy_func: AccuracyFunc, repeats: int) -> list[float]:
    """`accuracy_func` on `repeats` completions of each row, called as the trainer calls reward functions."""
    repeated = [row for row in rows for _ in range(repeats)]
    columns = {name: [row[name] for row in repeated] for name in rows[0] if name != "prompt"}
    completions: list[Any] = list(texts)
    if is_conversational(rows[0]):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    return accuracy_func(prompts=[row["prompt"] for row in repeated], completions=completions, **columns)
