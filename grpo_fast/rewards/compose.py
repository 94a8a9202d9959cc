"""Rewards made of rewards: a weighted sum, one that counts only under a condition, one by the source of a row.

Each combinator is a reward function itself, also in TRL's trainer, and is async if one of its parts is. A part's
rewards are logged as `rewards/<combinator>/<part>`, their mean over the rows where it applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias

from grpo_fast.rewards.marks import DROP, callable_name, is_async

Function: TypeAlias = Callable[..., Any]
Values: TypeAlias = list[float | None]

# what a reward function is called with that is not one value a completion
SHARED = ("trainer_state", "log_metric", "log_extra")


def weighted(
    rewards: Sequence[Function], weights: Sequence[float] | None = None, *, name: str = "weighted"
) -> Function:
    """The weighted sum of rewards, over those that apply to a row; None where none does, `DROP` where one says so.

    Raises:
        ValueError: If there are no rewards, or not as many weights.
    """
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    if not rewards or len(weights) != len(rewards):
        raise ValueError(f"weighted: {len(rewards)} rewards need as many weights, there are {len(weights)}")

    def combine(columns: list[Values]) -> Values:
        return [_weighted_sum(row, weights) for row in zip(*columns, strict=True)]

    return _combined(list(rewards), combine, name)


def gate(
    reward: Function,
    condition: Function,
    *,
    at_least: float = 1.0,
    otherwise: float | None = 0.0,
    name: str | None = None,
) -> Function:
    """`reward` where `condition` is at least `at_least`, else `otherwise`; also where `condition` is None.

    "Format only counts if the answer is right" is `gate(format, accuracy)`. `DROP` of either stays.
    """

    def combine(columns: list[Values]) -> Values:
        return [
            DROP if DROP in (value, passed) else value if passed is not None and passed >= at_least else otherwise
            for value, passed in zip(*columns, strict=True)
        ]

    return _combined([reward, condition], combine, name or f"{callable_name(reward)}_if_{callable_name(condition)}")


def route(
    rewards: Mapping[Any, Function], column: str, *, default: Function | None = None, name: str = "routed"
) -> Function:
    """Each row's reward by its value in a column of the data set: code by tests, mathematics by accuracy.

    A reward function is called once, with its own rows only.

    Args:
        rewards: The reward function of each value.
        column: The column.
        default: That of all other values; without one they are an error.
        name: In the metrics.
    """
    return (
        _Routed(rewards, column, default, name)
        if not _any_async([*rewards.values(), default])
        else _AsyncRouted(rewards, column, default, name)
    )


def parts_of(function: Any, columns: dict[str, Any]) -> list[tuple[Any, list[int]]]:
    """The functions that a reward is made of, each with the rows that it scores, itself if it is of one piece."""
    count = len(next(iter(columns.values()))) if columns else 0
    if isinstance(function, _Routed):
        found = []
        for part, rows in function.assigned(columns):
            inner = {name: [values[row] for row in rows] for name, values in columns.items()}
            found += [(leaf, [rows[i] for i in indices]) for leaf, indices in parts_of(part, inner)]
        return found
    if hasattr(function, "parts"):
        return [pair for part in function.parts for pair in parts_of(part, columns)]
    return [(function, list(range(count)))]


def _weighted_sum(row: Sequence[float | None], weights: Sequence[float]) -> float | None:
    if any(value is DROP for value in row):
        return DROP
    terms = [weight * value for value, weight in zip(row, weights, strict=True) if value is not None]
    return sum(terms) if terms else None


def _combined(parts: list[Function], combine: Callable[[list[Values]], Values], name: str) -> Function:
    kind = _AsyncCombined if _any_async(parts) else _Combined
    return kind(parts, combine, name)


def _any_async(parts: Sequence[Function | None]) -> bool:
    return any(part is not None and is_async(part) for part in parts)


class _Combined:
    """Parts that are called with all rows."""

    def __init__(self, parts: list[Function], combine: Callable[[list[Values]], Values], name: str) -> None:
        self.__name__ = name
        self.parts, self._combine = parts, combine
        self._names = _distinct([callable_name(part) for part in parts])

    def __call__(self, **columns: Any) -> Any:
        return self._finish([part(**columns) for part in self.parts], columns)

    def _finish(self, values: list[Any], columns: dict[str, Any]) -> Values:
        found = [
            _listed(value, part_name, self.__name__, columns)
            for value, part_name in zip(values, self._names, strict=True)
        ]
        _log(self.__name__, dict(zip(self._names, found, strict=True)), columns)
        return self._combine(found)


class _AsyncCombined(_Combined):
    async def __call__(self, **columns: Any) -> Any:
        return self._finish(await _together([part(**columns) for part in self.parts]), columns)


class _Routed:
    """Parts that are called with their rows only."""

    def __init__(self, rewards: Mapping[Any, Function], column: str, default: Function | None, name: str) -> None:
        if not rewards:
            raise ValueError("route: rewards must map values of the column to reward functions, it is empty")
        self.__name__ = name
        self._rewards, self._column, self._default = dict(rewards), column, default
        self.parts = [*rewards.values(), *([] if default is None else [default])]

    def assigned(self, columns: dict[str, Any]) -> list[tuple[Function, list[int]]]:
        """Each function with its rows.

        Raises:
            ValueError: If there is no such column, or a value of it has no function.
        """
        if self._column not in columns:
            raise ValueError(f"{self.__name__}: the data set has no column {self._column!r}")
        rows: dict[int, tuple[Function, list[int]]] = {}
        for row, value in enumerate(columns[self._column]):
            function = self._rewards.get(value, self._default)
            if function is None:
                known = ", ".join(map(repr, self._rewards))
                raise ValueError(
                    f"{self.__name__}: no reward is for {self._column}={value!r} of row {row}; they are for {known}"
                )
            rows.setdefault(id(function), (function, []))[1].append(row)
        return list(rows.values())

    def __call__(self, **columns: Any) -> Any:
        assigned = self.assigned(columns)
        parts = [_of_rows(columns, rows) for _, rows in assigned]
        values = [function(**part) for (function, _), part in zip(assigned, parts, strict=True)]
        return self._finish(assigned, parts, values, columns)

    def _finish(
        self,
        assigned: list[tuple[Function, list[int]]],
        parts: list[dict[str, Any]],
        values: list[Any],
        columns: dict[str, Any],
    ) -> Values:
        result: Values = [None] * len(columns["completions"])
        named: dict[str, Values] = {}
        names = _distinct([callable_name(function) for function, _ in assigned])
        for name, (_, rows), part, value in zip(names, assigned, parts, values, strict=True):
            named[name] = _listed(value, name, self.__name__, part)
            for row, reward in zip(rows, named[name], strict=True):
                result[row] = reward
        _log(self.__name__, named, columns)
        return result


class _AsyncRouted(_Routed):
    async def __call__(self, **columns: Any) -> Any:
        assigned = self.assigned(columns)
        parts = [_of_rows(columns, rows) for _, rows in assigned]
        values = await _together([function(**part) for (function, _), part in zip(assigned, parts, strict=True)])
        return self._finish(assigned, parts, values, columns)


def _of_rows(columns: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The call for some rows; what is logged for the table gets None in the others."""
    count = len(columns["completions"])
    part = {name: value if name in SHARED else [value[row] for row in rows] for name, value in columns.items()}
    log_extra = columns.get("log_extra")
    if log_extra is not None:

        def spread(column: str, values: list[Any]) -> None:
            by_row = dict(zip(rows, values, strict=False))
            log_extra(column, [by_row.get(row) for row in range(count)])

        part["log_extra"] = spread
    return part


async def _together(values: list[Any]) -> list[Any]:
    """Results of async parts, side by side, and of plain ones as they are."""
    pending: list[Coroutine[Any, Any, Any]] = [value for value in values if asyncio.iscoroutine(value)]
    results = iter(await asyncio.gather(*pending))
    return [next(results) if asyncio.iscoroutine(value) else value for value in values]


def _listed(values: Any, part: str, name: str, columns: dict[str, Any]) -> Values:
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    count = len(columns["completions"])
    if len(found) != count:
        raise ValueError(
            f"{part!r} in {name!r} must return one value a completion: {count} completions, {len(found)} values"
        )
    return found


def _log(name: str, parts: dict[str, Values], columns: dict[str, Any]) -> None:
    log_metric = columns.get("log_metric")
    if log_metric is None:
        return
    for part, values in parts.items():
        numbers = [float(value) for value in values if value is not None and value is not DROP]
        if numbers:
            log_metric(f"rewards/{name}/{part}", sum(numbers) / len(numbers))


def _distinct(names: list[str]) -> list[str]:
    """Names of parts, numbered where two are alike."""
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
