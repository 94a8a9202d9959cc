"""`accuracy`: 1 for a right final answer, 0 for a wrong one, graded in processes that are killed when they are late."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from grpo_fast.rewards.marks import DROP
from grpo_fast.rewards.math.extraction import PLACES, Place
from grpo_fast.rewards.pool import Outcome, WorkerPool
from grpo_fast.rewards.texts import completion_text

Result: TypeAlias = float | Literal["drop"] | None

GOLD_COLUMNS = ("solution", "answer", "gold", "ground_truth", "target")
# address space of a worker; sympy and its parsers need an eighth of it
MEMORY_BYTES = 1 << 30
STATUSES = ("timeout", "unparsed_gold", "unparsed_answer", "error")


class Accuracy:
    r"""Mathematical accuracy of final answers: a reward function, for TRL's trainer, too.

    Where the final answer is looked for: `grpo_fast.rewards.math.extraction`. What equals what:
    `grpo_fast.rewards.math.comparing`. Grading runs in worker processes (`grpo_fast.rewards.pool`), which the first
    call starts.

    The share of a call's completions of each doubtful outcome is logged as `rewards/<name>/timeout` (out of time or
    memory), `rewards/<name>/unparsed_gold` (the gold answer cannot be read), `rewards/<name>/unparsed_answer` (there is
    no final answer, or it cannot be read) and `rewards/<name>/error` (the worker crashed or raised). The completions
    table gets the columns `<name>_answer`, what was found, and `<name>_outcome`.
    """

    def __init__(
        self,
        *,
        column: str | None = None,
        timeout: float = 5.0,
        on_timeout: Result = 0.0,
        on_unparsed_gold: Result = None,
        on_unparsed_answer: Result = 0.0,
        on_error: Result = None,
        places: Sequence[Place] = PLACES,
        needs_think: bool = False,
        tolerance: float = 1e-6,
        workers: int | None = None,
        name: str = "accuracy",
    ) -> None:
        """Nothing is started.

        Args:
            column: The data set's column of gold answers: texts, numbers, or lists of them, each of which is right.
                None is the first there is of `solution` (TRL's), `answer`, `gold`, `ground_truth` and `target`.
            timeout: Most seconds a completion may take.
            on_timeout: The reward of a completion that takes longer or needs more than 1 GiB: a number, None (not
                applicable: other functions alone score it) or 'drop' (out of its group, whatever others say: its
                advantage is 0; in TRL's trainer it is None).
            on_unparsed_gold: The same, where the gold answer cannot be read.
            on_unparsed_answer: The same, where there is no final answer, or none that can be read.
            on_error: The same, where the worker crashed or raised.
            places: Where a final answer may stand: some of 'boxed', 'tag', 'phrase' and 'whole'.
            needs_think: A completion without `</think>` has no final answer.
            tolerance: Of decimals, relative to the gold value.
            workers: Most worker processes; None is one a processor, at most 8.
            name: In the metrics.

        Raises:
            ValueError: If an argument is not one of these.
        """
        results = {
            "on_timeout": on_timeout,
            "on_unparsed_gold": on_unparsed_gold,
            "on_unparsed_answer": on_unparsed_answer,
            "on_error": on_error,
        }
        for argument, result in results.items():
            if not (result is None or result == "drop" or isinstance(result, int | float)):
                raise ValueError(f"accuracy: {argument} must be a number, None or 'drop', it is {result!r}")
        wrong = [place for place in ([places] if isinstance(places, str) else places) if place not in PLACES]
        if wrong or isinstance(places, str) or not places:
            raise ValueError(f"accuracy: places must be a list of some of {', '.join(PLACES)}, it is {places!r}")
        if not timeout > 0:
            raise ValueError(f"accuracy: timeout must be above 0 seconds, it is {timeout!r}")
        self.__name__ = name
        self._results = {argument.removeprefix("on_"): result for argument, result in results.items()}
        self._column, self._timeout, self._workers = column, float(timeout), workers
        self._settings = (tuple(places), needs_think, tolerance)

    def __call__(
        self,
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward a completion, as TRL calls it; `DROP` among them is NaN to those who do not know it."""
        golds = self.golds(columns)
        items = [(gold, completion_text(text), *self._settings) for gold, text in zip(golds, completions, strict=True)]
        outcomes = self.pool().run(_function("grade"), items, timeout_s=self._timeout)
        graded = [_status(outcome) for outcome in outcomes]
        if log_metric is not None and graded:
            for status in STATUSES:
                log_metric(f"rewards/{self.__name__}/{status}", sum(s == status for s, _ in graded) / len(graded))
        if log_extra is not None:
            log_extra(f"{self.__name__}_answer", [answer for _, answer in graded])
            log_extra(f"{self.__name__}_outcome", [status for status, _ in graded])
        return [self._reward(status) for status, _ in graded]

    def golds(self, columns: dict[str, Any]) -> list[list[str]]:
        """The gold answers of each row, as texts.

        Raises:
            ValueError: If there is no column of them.
        """
        column = self._column or next((name for name in GOLD_COLUMNS if name in columns), None)
        if column not in columns:
            wanted = f"the column {column!r}" if column else f"one of the columns {', '.join(GOLD_COLUMNS)}"
            names = [name for name in columns if name not in ("prompts", "completion_ids", "trainer_state")]
            raise ValueError(
                f"reward {self.__name__!r} needs {wanted} of gold answers (argument `column`); "
                f"the data set has {', '.join(names) or 'none'}"
            )
        return [_texts(value) for value in columns[column]]

    def describe_golds(self, columns: dict[str, Any]) -> list[tuple[str, str]]:
        """For the linter: each gold answer's kind, and why nothing could score against it ('' if something can)."""
        items = [(gold, self._settings[2]) for gold in self.golds(columns)]
        outcomes = self.pool().run(_function("describe_gold"), items, timeout_s=self._timeout)
        late = f"reading it takes more than {self._timeout:g} s or 1 GiB"
        return [
            (outcome.value[0], outcome.value[1])
            if outcome.status == "done"
            else ("unreadable", late if outcome.status in ("timeout", "memory") else str(outcome.value))
            for outcome in outcomes
        ]

    def pool(self) -> WorkerPool:
        """The worker processes, shared by all rewards of this kind with as many workers."""
        return _pool(self._workers)

    def _reward(self, status: str) -> float | None:
        if status in ("right", "wrong"):
            return float(status == "right")
        result = self._results[status]
        return DROP if result == "drop" else None if result is None else float(result)


# in the registry's and TRL's form: a function with everything at its default
accuracy = Accuracy()


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [_text(item) for item in values if item is not None]


def _text(value: Any) -> str:
    # 4.0 is how a column of numbers gives the whole number 4
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _status(outcome: Outcome) -> tuple[str, str]:
    if outcome.status == "done":
        return outcome.value[0], outcome.value[1]
    return ("timeout" if outcome.status in ("timeout", "memory") else "error"), ""


@functools.cache
def _pool(workers: int | None) -> WorkerPool:
    return WorkerPool(preload=["grpo_fast.rewards.math.warm"], memory_bytes=MEMORY_BYTES, workers=workers)


@functools.cache
def _function(name: str) -> bytes:
    # by name: this process needs neither math-verify nor sympy
    return f"cgrpo_fast.rewards.math.grading\n{name}\n.".encode()
