"""Calling reward functions as TRL does, sync and async; errors name the function, the step and the row."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grpo_fast.event_loop import run_coroutine
from grpo_fast.rewards.marks import DROP, callable_name, is_async
from grpo_fast.rewards.steps import Steps, mean_of, parsed_steps

__all__ = [
    "DROP",
    "RewardCall",
    "call",
    "call_async",
    "callable_name",
    "checked",
    "column",
    "failure",
    "gather",
    "is_async",
]

logger = logging.getLogger(__name__)

# `DROP` in a tensor of rewards; the infinities of functions are refused
DROPPED = math.inf


@dataclass(frozen=True, kw_only=True)
class RewardCall:
    """What every reward function is called with, for a batch or for one of its groups.

    Attributes:
        rows: Keyword arguments that hold one value a completion: `prompts`, `completions`, `completion_ids` and the
            data set's columns.
        shared: Keyword arguments that belong to the batch as a whole, such as `trainer_state`.
        step: The optimizer step, for error messages.
        first_row: A group's place in the batch, for error messages; None for a batch.
        errors: `GRPOConfig.reward_errors`.
        steps: The names of the functions that give rewards of steps; each call puts them here, a list a row.
    """

    rows: Mapping[str, Sequence[Any]]
    shared: dict[str, Any]
    step: int
    first_row: int | None = None
    errors: str = "raise"
    steps: dict[str, list[Steps]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """How many completions there are to score."""
        return len(self.rows["completions"])

    def row(self, index: int) -> RewardCall:
        """The same call for one completion."""
        return replace(self.of_rows([index]), first_row=None)

    def of_rows(self, indices: Sequence[int]) -> RewardCall:
        """The same call for some of the completions."""
        return replace(self, rows={name: [values[i] for i in indices] for name, values in self.rows.items()})

    def of(self, function: Callable[..., Any]) -> Any:
        """What `function` returns for this batch."""
        return function(**{**self.rows, **self.shared})


def call(function: Callable[..., Any], name: str, batch: RewardCall) -> Tensor:
    """Score a batch with one function.

    With `batch.errors == "none"` a completion on which the function raises, or for which it returns NaN or an infinity,
    has the reward None, and the share of them is logged as `rewards/<name>/error`. To find the completions on which it
    raises, it is called with each alone, and then once with the others; if it fails still, all of them have None.

    Args:
        function: Takes the keyword arguments of `batch` and returns one number or None a completion.
        name: What errors call it.
        batch: The completions.

    Returns:
        [num_rows] fp32, NaN where the function returned None, an infinity where it returned `DROP`.

    Raises:
        RuntimeError: If the function raises; names the function, the step and, if one row alone raises, the row.
        ValueError: If it returns something other than one finite number or None a completion.
    """
    if batch.errors == "none":
        return _run_at_once(_forgiving(function, name, batch))
    try:
        values = batch.of(function)
    except Exception as error:
        raise failure(name, batch, error, row=_raising_row(function, batch)) from error
    return column(values, name, batch)


async def call_async(function: Callable[..., Any], name: str, batch: RewardCall) -> Tensor:
    """As `call`, for an async function; an error does not say which row raised."""
    if batch.errors == "none":
        return await _forgiving(function, name, batch)
    try:
        values = await batch.of(function)
    except Exception as error:
        raise failure(name, batch, error) from error
    return column(values, name, batch)


async def _forgiving(function: Callable[..., Any], name: str, batch: RewardCall) -> Tensor:
    """`call` with None in the place of errors; suspends only where the function does."""
    logged: set[str] = set()
    batch = _watched(batch, logged)
    try:
        rewards = column(await _attempt(function, batch), name, batch)
    except ValueError:
        # what is wrong with the list as a whole is wrong in every batch
        raise
    except _RaisedError as raised:
        logger.warning("%s; its reward is None", failure(name, batch, raised.error))
        rewards = await _without_raising_rows(function, name, batch)
    num_errors = int(rewards.isneginf().sum())
    rewards[rewards.isneginf()] = math.nan
    metric = f"rewards/{name}/error"
    if "log_metric" in batch.shared and (num_errors or metric not in logged):
        batch.shared["log_metric"](metric, num_errors / batch.num_rows)
    return rewards


class _RaisedError(Exception):
    """A reward function raised `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


async def _attempt(function: Callable[..., Any], batch: RewardCall) -> Any:
    try:
        values = batch.of(function)
        return await values if inspect.isawaitable(values) else values
    except Exception as error:
        raise _RaisedError(error) from error


async def _without_raising_rows(function: Callable[..., Any], name: str, batch: RewardCall) -> Tensor:
    """[num_rows] fp32 with -inf where the function raises."""
    rewards = torch.full((batch.num_rows,), -math.inf)
    if name in batch.steps:
        batch.steps[name] = [[] for _ in range(batch.num_rows)]
    # called for its errors only: what it logs would count twice
    silent = replace(batch, shared=batch.shared | {"log_metric": _ignore, "log_extra": _ignore})
    kept = []
    for row in range(batch.num_rows):
        try:
            await _attempt(function, silent.row(row))
            kept.append(row)
        except _RaisedError:
            pass
    if 0 < len(kept) < batch.num_rows:
        try:
            part = _spread_extra(batch.of_rows(kept), kept, batch.num_rows)
            rewards[kept] = column(await _attempt(function, part), name, part)
            if name in batch.steps:
                of_kept = dict(zip(kept, batch.steps[name], strict=True))
                batch.steps[name] = [of_kept.get(row, []) for row in range(batch.num_rows)]
        except _RaisedError as raised:
            logger.warning("%s, also without the rows that raise alone", failure(name, batch, raised.error))
    return rewards


def _ignore(name: str, value: Any) -> None:
    """Takes the place of `log_metric` and `log_extra`."""


def _watched(batch: RewardCall, logged: set[str]) -> RewardCall:
    log_metric = batch.shared.get("log_metric")
    if log_metric is None:
        return batch

    def watching(name: str, value: float) -> None:
        logged.add(name)
        log_metric(name, value)

    return replace(batch, shared=batch.shared | {"log_metric": watching})


def _spread_extra(part: RewardCall, kept: list[int], num_rows: int) -> RewardCall:
    """`part` with a `log_extra` that puts None beside the rows that were left out."""
    log_extra = part.shared.get("log_extra")
    if log_extra is None:
        return part

    def spreading(column: str, values: list[Any]) -> None:
        by_row = dict(zip(kept, values, strict=False))
        log_extra(column, [by_row.get(row) for row in range(num_rows)])

    return replace(part, shared=part.shared | {"log_extra": spreading})


def _run_at_once(coroutine: Coroutine[Any, Any, Tensor]) -> Tensor:
    """The result of a coroutine that never suspends, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Tensor = end.value
        return result
    coroutine.close()
    raise RuntimeError("a reward function returned an awaitable; declare it with `async def`")


def gather(coroutines: Sequence[Coroutine[Any, Any, Tensor]]) -> list[Tensor]:
    """Run coroutines side by side to their end, also where an event loop runs already (a notebook)."""

    async def together() -> list[Tensor]:
        return list(await asyncio.gather(*coroutines))

    return run_coroutine(together())


def failure(name: str, batch: RewardCall, error: Exception, row: int | None = None) -> RuntimeError:
    """The error to raise for a reward function that raised `error`, on `row` if it is known."""
    first_row = batch.first_row or 0
    where = "the batch as a whole"
    if row is not None:
        where = f"row {first_row + row}, completion {batch.rows['completions'][row]!r:.300}"
    elif batch.first_row is not None:
        where = f"the group in rows {first_row} to {first_row + batch.num_rows - 1}"
    return RuntimeError(
        f"reward function {name!r} raised {type(error).__name__} at step {batch.step} on {where}: {error}"
    )


def column(values: Any, name: str, batch: RewardCall) -> Tensor:
    """What a reward function returned for `batch` as [num_rows] fp32: NaN for None, `DROPPED` for `DROP`.

    Raises:
        ValueError: As in `call`; with `batch.errors == "none"` numbers that are not finite become -inf instead.
    """
    if name in batch.steps:
        values = _means_of_steps(values, name, batch)
    if isinstance(values, Tensor):
        values = values.flatten().tolist()
    if isinstance(values, str | dict) or not hasattr(values, "__iter__"):
        raise ValueError(
            f"reward function {name!r} must return a list of one number or None a completion, "
            f"it returned {type(values).__name__} {values!r:.100}"
        )
    values = list(values)
    if len(values) != batch.num_rows:
        raise ValueError(
            f"reward function {name!r} must return one value a completion: {batch.num_rows} completions, "
            f"{len(values)} values"
        )
    for row, value in enumerate(values, batch.first_row or 0):
        if isinstance(value, str):
            raise ValueError(f"reward function {name!r} returned the string {value!r:.100} for row {row}")
    numbers = [None if value is None else value if value is DROP else float(value) for value in values]
    for row, value in enumerate(numbers):
        if value is not None and value is not DROP and not math.isfinite(value):
            if batch.errors != "none":
                raise ValueError(_not_finite(name, batch, row, value))
            numbers[row] = -math.inf
    return torch.tensor(
        [math.nan if value is None else DROPPED if value is DROP else value for value in numbers], dtype=torch.float32
    )


def _means_of_steps(values: Any, name: str, batch: RewardCall) -> list[float | None]:
    """What a process reward returned, with its steps put into `batch.steps`."""
    if hasattr(values, "__iter__") and not isinstance(values, str | dict):
        values = list(values)
        given: list[Any] = [None if value is DROP else value for value in values]
    else:
        given = values
    steps = batch.steps[name] = parsed_steps(given, name, batch.rows["completion_ids"], batch.first_row or 0)
    return [DROP if value is DROP else mean_of(some) for value, some in zip(values, steps, strict=True)]


def checked(scores: Tensor, name: str, batch: RewardCall) -> Tensor:
    """A reward model's scores, [num_rows] fp32 on the host, as `column` gives a function's, errors counted."""
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad and batch.errors != "none":
        raise ValueError(_not_finite(name, batch, bad[0], float(scores[bad[0]])))
    if batch.errors == "none" and "log_metric" in batch.shared:
        batch.shared["log_metric"](f"rewards/{name}/error", len(bad) / batch.num_rows)
    return scores.masked_fill(~scores.isfinite(), math.nan)


def _not_finite(name: str, batch: RewardCall, row: int, value: float) -> str:
    return (
        f"reward function {name!r} returned {value} at step {batch.step} for row {(batch.first_row or 0) + row}, "
        f"completion {batch.rows['completions'][row]!r:.300}; a reward must be a finite number, or None where the "
        "function does not apply"
    )


def _raising_row(function: Callable[..., Any], batch: RewardCall) -> int | None:
    """The first row that raises when it is scored alone; the run is ending, so a second call does no harm."""
    for row in range(batch.num_rows):
        try:
            batch.row(row).of(function)
        except Exception:
            return row
    return None
