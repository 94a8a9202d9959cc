"""Calling reward functions as TRL does, sync and async; errors name the function, the step and the row."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.event_loop import run_coroutine


@dataclass(frozen=True, kw_only=True)
class RewardCall:
    """What every reward function is called with, for a batch or for one of its groups.

    Attributes:
        rows: Keyword arguments that hold one value a completion: `prompts`, `completions`, `completion_ids` and the
            data set's columns.
        shared: Keyword arguments that belong to the batch as a whole, such as `trainer_state`.
        step: The optimizer step, for error messages.
        first_row: A group's place in the batch, for error messages; None for a batch.
    """

    rows: Mapping[str, Sequence[Any]]
    shared: dict[str, Any]
    step: int
    first_row: int | None = None

    @property
    def num_rows(self) -> int:
        """How many completions there are to score."""
        return len(self.rows["completions"])

    def row(self, index: int) -> RewardCall:
        """The same call for one completion."""
        rows = {name: [values[index]] for name, values in self.rows.items()}
        return RewardCall(rows=rows, shared=self.shared, step=self.step)

    def of(self, function: Callable[..., Any]) -> Any:
        """What `function` returns for this batch."""
        return function(**{**self.rows, **self.shared})


def call(function: Callable[..., Any], name: str, batch: RewardCall) -> Tensor:
    """Score a batch with one function.

    Args:
        function: Takes the keyword arguments of `batch` and returns one number or None a completion.
        name: What errors call it.
        batch: The completions.

    Returns:
        [num_rows] fp32, NaN where the function returned None.

    Raises:
        RuntimeError: If the function raises; names the function, the step and, if one row alone raises, the row.
        ValueError: If it returns something other than one number or None a completion.
    """
    try:
        values = batch.of(function)
    except Exception as error:
        raise failure(name, batch, error, row=_raising_row(function, batch)) from error
    return column(values, name, batch)


async def call_async(function: Callable[..., Any], name: str, batch: RewardCall) -> Tensor:
    """As `call`, for an async function; an error does not say which row raised."""
    try:
        values = await batch.of(function)
    except Exception as error:
        raise failure(name, batch, error) from error
    return column(values, name, batch)


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
    """What a reward function returned for `batch` as [num_rows] fp32, NaN for None; ValueError as in `call`."""
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
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32)


def _raising_row(function: Callable[..., Any], batch: RewardCall) -> int | None:
    """The first row that raises when it is scored alone; the run is ending, so a second call does no harm."""
    for row in range(batch.num_rows):
        try:
            batch.row(row).of(function)
        except Exception:
            return row
    return None
