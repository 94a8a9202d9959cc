"""Rewards of lengths and of repetition, all in tokens.

A length is the number of a completion's ids, the end-of-sequence token and what tools wrote included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from grpo_fast.rewards.correctness import Correctness
from grpo_fast.rewards.texts import LogMetric, groups_of


class CosineLength:
    r"""Correctness scaled by length: what is right should be short, what is wrong may be long.

    Source: "Demystifying Long Chain-of-Thought Reasoning" (arXiv:2502.03373), appendix C.1; names and bounds are TRL's.

        v_min + (v_max - v_min) (1 + cos(pi min(|y| / L, 1))) / 2

    A right completion falls from `max_value_correct` to `min_value_correct`, a wrong one rises from `min_value_wrong`
    to `max_value_wrong`; beyond L = `max_len` both stay where they are. `exceeded` is the paper's r_e, which it gives
    to completions that reach L, right or wrong; None, TRL's, gives them the value at L. The reward is None where it is
    not known what is right.
    """

    def __init__(
        self,
        max_len: int,
        correct: Callable[..., Any] | None = None,
        *,
        column: str | None = None,
        min_value_wrong: float = -1.0,
        max_value_wrong: float = -0.5,
        min_value_correct: float = 0.5,
        max_value_correct: float = 1.0,
        exceeded: float | None = None,
        name: str = "cosine_length",
    ) -> None:
        """Nothing is called.

        Args:
            max_len: L, in tokens.
            correct: The reward function that says what is right (above 0.5).
            column: Or the column that does.
            min_value_wrong: Of a wrong completion without a token.
            max_value_wrong: Of a wrong completion of L tokens or more.
            min_value_correct: Of a right completion of L tokens or more.
            max_value_correct: Of a right completion without a token.
            exceeded: Of a completion of L tokens or more.
            name: In the metrics.

        Raises:
            ValueError: If L is below 1, a minimum above its maximum, or `correct` and `column` are not one.
        """
        if max_len < 1:
            raise ValueError(f"{name}: max_len must be at least 1 token, it is {max_len}")
        for kind, low, high in (
            ("wrong", min_value_wrong, max_value_wrong),
            ("correct", min_value_correct, max_value_correct),
        ):
            if low > high:
                raise ValueError(f"{name}: min_value_{kind} ({low}) must not be above max_value_{kind} ({high})")
        self.__name__ = name
        self._correctness = Correctness(correct, column, name=name)
        self._max_len, self._exceeded = max_len, exceeded
        self._right = (max_value_correct, min_value_correct)
        self._wrong = (min_value_wrong, max_value_wrong)

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_metric: LogMetric | None = None,
        log_extra: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        rows = {"completions": completions, "completion_ids": completion_ids, **columns}
        is_right = self._correctness.of(rows, log_metric, log_extra)
        return [
            None if right is None else self._value(len(ids), right)
            for ids, right in zip(completion_ids, is_right, strict=True)
        ]

    def _value(self, length: int, is_right: bool) -> float:
        if self._exceeded is not None and length >= self._max_len:
            return self._exceeded
        first, last = self._right if is_right else self._wrong
        return last + (first - last) * (1 + math.cos(math.pi * min(length / self._max_len, 1.0))) / 2


class GroupLength:
    r"""Short completions of a group over long ones; Kimi k1.5 (arXiv:2501.12599), section 2.3.3.

        lambda = 0.5 - (|y| - shortest) / (longest - shortest)

    A right completion gets lambda, a wrong one min(0, lambda), and all get 0 if all are of one length. Shortest and
    longest are of the group, which is told by equal prompts that follow each other. A group that lies in two processes
    is two groups. None where it is not known what is right; the length counts for the others all the same.
    """

    def __init__(
        self,
        correct: Callable[..., Any] | None = None,
        *,
        column: str | None = None,
        num_generations: int | None = None,
        name: str = "group_length",
    ) -> None:
        """Nothing is called.

        Args:
            correct: The reward function that says what is right (above 0.5).
            column: Or the column that does.
            num_generations: As the run's; it tells two groups of equal prompts apart, should the data set have such
                prompts beside each other.
            name: In the metrics.

        Raises:
            ValueError: If `num_generations` is below 1, or `correct` and `column` are not one.
        """
        if num_generations is not None and num_generations < 1:
            raise ValueError(f"{name}: num_generations must be at least 1, it is {num_generations}")
        self.__name__ = name
        self._correctness = Correctness(correct, column, name=name)
        self._num_generations = num_generations

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_metric: LogMetric | None = None,
        log_extra: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        is_right = self._correctness.of(rows, log_metric, log_extra)
        rewards: list[float | None] = [None] * len(completions)
        for group in groups_of(prompts, self._num_generations):
            lengths = [len(completion_ids[row]) for row in group]
            shortest, longest = min(lengths), max(lengths)
            for row, length in zip(group, lengths, strict=True):
                right = is_right[row]
                if right is not None:
                    share = 0.0 if longest == shortest else 0.5 - (length - shortest) / (longest - shortest)
                    rewards[row] = share if right else min(0.0, share)
        return rewards


class RepetitionPenalty:
    """(1 - different / all n-grams of tokens) times `max_penalty`; 0 for a completion of fewer than n tokens.

    Source: arXiv:2502.03373, appendix C.2, per completion and not per token; TRL's `get_repetition_penalty_reward`.
    """

    def __init__(self, *, ngram_size: int = 3, max_penalty: float = -1.0, name: str = "repetition_penalty") -> None:
        """Nothing is read.

        Args:
            ngram_size: n, in tokens.
            max_penalty: What a completion that only repeats itself comes near to.
            name: In the metrics.

        Raises:
            ValueError: If n is below 1 or the penalty above 0.
        """
        if ngram_size < 1:
            raise ValueError(f"{name}: ngram_size must be at least 1, it is {ngram_size}")
        if max_penalty > 0:
            raise ValueError(f"{name}: max_penalty must not be above 0, it is {max_penalty}")
        self.__name__ = name
        self._ngram_size, self._max_penalty = ngram_size, max_penalty

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [self._penalty(ids) for ids in completion_ids]

    def _penalty(self, ids: Sequence[int]) -> float:
        total = len(ids) - self._ngram_size + 1
        if total < 1:
            return 0.0
        different = len(set(zip(*(ids[i : i + total] for i in range(self._ngram_size)), strict=True)))
        # 0.0 rather than the -0.0 of a product
        return self._max_penalty * (1 - different / total) if different < total else 0.0


class SoftOverlong:
    """DAPO's punishment of overlong completions (arXiv:2503.14476), eq. 13, in tokens.

    0 up to `max_completion_len - soft_punish_cache`, falling in a line to -1 at `max_completion_len`, -1 beyond. With a
    cache of 0 it is 0 up to `max_completion_len` and -1 beyond. A completion that was cut off at the run's
    `max_completion_length` has that many tokens: with an equal or larger `max_completion_len` and no cache nothing is
    ever punished.
    """

    def __init__(
        self, max_completion_len: int, soft_punish_cache: int = 0, *, name: str = "soft_overlong_punishment"
    ) -> None:
        """Nothing is read; the names are TRL's.

        Args:
            max_completion_len: From here on -1, in tokens.
            soft_punish_cache: Over so many tokens it falls.
            name: In the metrics.

        Raises:
            ValueError: If the length is below 1 or the cache not within 0 and the length.
        """
        if max_completion_len < 1:
            raise ValueError(f"{name}: max_completion_len must be at least 1 token, it is {max_completion_len}")
        if not 0 <= soft_punish_cache <= max_completion_len:
            raise ValueError(
                f"{name}: soft_punish_cache must be from 0 to max_completion_len ({max_completion_len}), it is "
                f"{soft_punish_cache}"
            )
        self.__name__ = name
        self._max_len, self._cache = max_completion_len, soft_punish_cache

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [self._punishment(len(ids)) for ids in completion_ids]

    def _punishment(self, length: int) -> float:
        free = self._max_len - self._cache
        if length <= free:
            return 0.0
        return (free - length) / self._cache if length <= self._max_len else -1.0
