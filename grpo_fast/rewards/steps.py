"""Rewards of steps: what a reward function that judges a completion's steps one by one may return.

Source: DeepSeekMath (arXiv:2402.03300), section 4.1.3, process supervision.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
# the tokens of a completion up to a step's end, and the step's reward
Step: TypeAlias = tuple[int, float]
Steps: TypeAlias = list[Step]


class Settings(Protocol):
    """The fields of the config that decide what steps can be trained with."""

    importance_sampling_level: str
    multi_objective_aggregation: str


def process_reward(function: Function) -> Function:
    """Mark a reward function, sync or async, as one that returns rewards of steps.

    For each completion it returns a list of pairs `(end, reward)`, or None or an empty list where it does not apply:
    `end` is how many of the completion's tokens (`completion_ids`) there are up to the end of the step, from 1 to all
    of them. A class may have `returns_steps = True` instead.
    """
    function.returns_steps = True  # type: ignore[attr-defined]
    return function


def returns_steps(function: Any) -> bool:
    """Whether a reward function is marked by `process_reward`, also through `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return bool(getattr(function, "returns_steps", False))


def check_process_rewards(functions: Sequence[Any], names: Sequence[str], args: Settings) -> None:
    """Refuse what rewards of steps cannot be trained with (ValueError)."""
    process = [name for function, name in zip(functions, names, strict=True) if returns_steps(function)]
    if not process:
        return
    if args.importance_sampling_level == "sequence":
        raise ValueError(
            f"reward {process[0]!r} gives rewards of steps, which needs importance_sampling_level='token': with "
            "'sequence' one ratio carries the gradients of all tokens, so that none would learn from its own step"
        )
    if args.multi_objective_aggregation == "normalize_then_sum":
        raise ValueError(
            f"reward {process[0]!r} gives rewards of steps, which needs multi_objective_aggregation="
            "'sum_then_normalize': 'normalize_then_sum' is defined for one number a completion"
        )
    for name, count in Counter(process).items():
        if count > 1:
            raise ValueError(f"{count} reward functions that give rewards of steps are named {name!r}: name them apart")


def parsed_steps(values: Any, name: str, completion_ids: Sequence[Sequence[int]], first_row: int = 0) -> list[Steps]:
    """What a process reward returned, checked.

    Args:
        values: One list of pairs or None a completion.
        name: The function's, for errors.
        completion_ids: The completions' tokens.
        first_row: The first one's place in the batch, for errors.

    Returns:
        As many lists; empty where the function did not apply.

    Raises:
        ValueError: If it is anything else, an end lies outside of its completion, or a reward is not finite.
    """
    if isinstance(values, str | dict) or not hasattr(values, "__iter__"):
        raise ValueError(
            f"reward function {name!r} is marked as a process_reward: it must return a list of steps or None a "
            f"completion, it returned {type(values).__name__} {values!r:.100}"
        )
    values = list(values)
    if len(values) != len(completion_ids):
        raise ValueError(
            f"reward function {name!r} must return one list of steps a completion: {len(completion_ids)} completions, "
            f"{len(values)} lists"
        )
    return [
        _parsed_row(row, name, len(ids), first_row + i)
        for i, (row, ids) in enumerate(zip(values, completion_ids, strict=True))
    ]


def _parsed_row(row: Any, name: str, num_tokens: int, place: int) -> Steps:
    steps: Steps = []
    try:
        for end, value in row or ():
            is_end = int(end) == end and 1 <= end <= num_tokens
            if not (is_end and math.isfinite(value)):
                raise ValueError
            steps.append((int(end), float(value)))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"reward function {name!r} must return pairs (end, reward) for row {place}, with ends from 1 to its "
            f"{num_tokens} tokens and finite rewards; it returned {row!r:.200}"
        ) from error
    return steps


def mean_of(steps: Steps) -> float | None:
    """The mean reward of a completion's steps, which the metrics and TRL's tables have; None without steps."""
    return sum(value for _, value in steps) / len(steps) if steps else None


class StepScorer:
    """A process reward from a function that scores texts of steps: steps end with `separator`.

    A separator within a token ends the step with that token. A blank step is none: it belongs to the next one, and at
    the end of the completion, as the end-of-sequence token does, to the last.
    """

    returns_steps = True

    def __init__(
        self,
        function: Callable[..., Sequence[Sequence[float] | None]],
        processing_class: Any,
        *,
        separator: str = "\n\n",
        name: str | None = None,
    ) -> None:
        """Nothing is called.

        Args:
            function: Called like a reward function, with `steps` besides, a list of texts a completion; it returns as
                many rewards, or None, for each.
            processing_class: The policy's tokenizer.
            separator: Ends a step.
            name: In the metrics; None is the function's.

        Raises:
            ValueError: If the separator is empty.
        """
        self.__name__ = name or getattr(function, "__name__", type(function).__name__)
        if not separator:
            raise ValueError(f"{self.__name__}: separator must not be empty")
        self._function, self._separator = function, separator
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[Steps | None]:
        ends, texts = zip(*(self._steps(ids) for ids in completion_ids), strict=True) if completion_ids else ((), ())
        rewards = list(self._function(steps=list(texts), completion_ids=completion_ids, **columns))
        if len(rewards) != len(texts):
            raise ValueError(f"{self.__name__} returned {len(rewards)} lists of rewards for {len(texts)} completions")
        result: list[Steps | None] = []
        for row, (places, steps, values) in enumerate(zip(ends, texts, rewards, strict=True)):
            if values is not None and len(values) != len(steps):
                raise ValueError(
                    f"{self.__name__} returned {len(values)} rewards for the {len(steps)} steps of row {row}"
                )
            result.append(None if values is None else list(zip(places, map(float, values), strict=True)))
        return result

    def _steps(self, ids: Sequence[int]) -> tuple[list[int], list[str]]:
        """Where each step ends, in tokens, and its text."""
        ends: list[int] = []
        texts: list[str] = []
        begin, tail, overlap = 0, "", len(self._separator) - 1
        for place, piece in enumerate(self._pieces(ids), 1):
            # a separator may begin in the tokens before
            recent = tail + piece
            tail = recent[len(recent) - overlap :]
            if self._separator not in recent and place < len(ids):
                continue
            text = self._tokenizer.decode(ids[begin:place], skip_special_tokens=True).strip()
            if text:
                ends.append(place)
                texts.append(text)
                begin, tail = place, ""
        if ends:
            ends[-1] = len(ids)
        return ends, texts

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        return self._tokenizer.batch_decode([[i] for i in ids])
