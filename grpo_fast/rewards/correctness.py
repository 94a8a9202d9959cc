"""Whether completions are right, for rewards that depend on it: said by another reward function, or by a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo_fast.event_loop import run_coroutine
from grpo_fast.rewards.marks import callable_name, is_async


class Correctness:
    """What is right: completions to which a function gives more than `threshold`, or of whose row a column says so."""

    def __init__(
        self, correct: Callable[..., Any] | None, column: str | None, *, name: str, threshold: float = 0.5
    ) -> None:
        """Nothing is called.

        Args:
            correct: A reward function, sync or async, such as `accuracy`.
            column: In the place of a function, the name of a column of truth values or numbers, as a rollout function
                may return them.
            name: Of the reward that asks, for errors.
            threshold: A larger number is right.

        Raises:
            ValueError: If there is not exactly one of `correct` and `column`, or `correct` cannot be called.
        """
        if (correct is None) == (column is None):
            raise ValueError(
                f"{name} needs to know which completions are right: give one of `correct`, a reward function, and "
                "`column`, the name of a column"
            )
        if correct is not None and not callable(correct):
            raise ValueError(f"{name}: correct must be a reward function, it is {type(correct).__name__}")
        self._function, self._column, self._name, self._threshold = correct, column, name, threshold

    def of(self, rows: dict[str, Any], log_metric: Any, log_extra: Any) -> list[bool | None]:
        """One a completion; None where the function does not apply or the column has none.

        Raises:
            ValueError: If the column is not there, or the function returns another number of values.
        """
        completions = rows["completions"]
        values = self._column_values(rows) if self._function is None else self._call(rows, log_metric, log_extra)
        if len(values) != len(completions):
            raise ValueError(
                f"{self._name}: {self._column or callable_name(self._function)!r} has {len(values)} values for "
                f"{len(completions)} completions"
            )
        # NaN is how some say None
        return [None if value is None or value != value else float(value) > self._threshold for value in values]

    def _call(self, rows: dict[str, Any], log_metric: Any, log_extra: Any) -> Sequence[Any]:
        assert self._function is not None
        arguments = dict(rows)
        for key, value in (("log_metric", log_metric), ("log_extra", log_extra)):
            if value is not None:
                arguments[key] = value
        values = self._function(**arguments)
        values = run_coroutine(values) if is_async(self._function) else values
        return values.flatten().tolist() if hasattr(values, "flatten") else list(values)

    def _column_values(self, rows: dict[str, Any]) -> Sequence[Any]:
        if self._column not in rows:
            shared = ("prompts", "completions", "completion_ids", "trainer_state")
            names = [name for name in rows if name not in shared]
            raise ValueError(f"{self._name} needs the column {self._column!r}; there is {', '.join(names) or 'none'}")
        return rows[self._column]
