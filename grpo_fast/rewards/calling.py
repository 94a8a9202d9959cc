"""Calling reward functions as TRL does, sync and async; errors name the function, the step and the row."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

RewardFunc = Callable[..., Sequence[float | None] | Coroutine[Any, Any, Sequence[float | None]]]


class RewardFunctions:
    """The reward functions of a run, called on one batch at a time.

    Each is called as `func(prompts=..., completions=..., completion_ids=..., **columns)`, every value a list with one
    entry a completion, and returns one float a completion, or None where it does not apply.

    Args:
        functions: One function or several: plain, async, `functools.partial`, or objects with `__call__`.
        weights: One weight a function; None means 1.

    Attributes:
        names: Each function's name in the metrics.
        weights: [functions] fp32.

    Raises:
        ValueError: If there is no function, one is not callable, or the number of weights differs.
    """

    def __init__(self, functions: RewardFunc | list[RewardFunc] | None, weights: list[float] | None = None) -> None:
        self.functions: list[Any] = list(functions) if isinstance(functions, list | tuple) else [functions]
        if functions is None or not self.functions:
            raise ValueError("reward_funcs is needed: a function, or a list of functions, that scores completions")
        for i, function in enumerate(self.functions):
            if isinstance(function, str | torch.nn.Module):
                raise ValueError(f"reward_funcs[{i}] is a reward model, which is not supported; pass a function")
            if not callable(function):
                raise ValueError(f"reward_funcs[{i}] must be callable, it is {type(function).__name__}")
        if weights is not None and len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights must have one weight a reward function: {len(self.functions)} functions, "
                f"{len(weights)} weights"
            )
        self.names = [callable_name(function) for function in self.functions]
        self.weights = torch.tensor(weights or [1.0] * len(self.functions), dtype=torch.float32)

    def __call__(self, *, step: int, num_rows: int, arguments: dict[str, Any], row_arguments: Sequence[str]) -> Tensor:
        """Score one batch.

        Args:
            step: The optimizer step, for error messages.
            num_rows: Completions in the batch.
            arguments: Keyword arguments of every function.
            row_arguments: The names among them that hold one value a completion.

        Returns:
            [num_rows, functions] fp32; NaN where a function returned None.

        Raises:
            RuntimeError: If a function raises; names the function, the step and, if one row alone raises, the row.
            ValueError: If a function returns something other than one number or None a completion.
        """
        rewards = torch.empty(num_rows, len(self.functions))
        pending: dict[int, Coroutine[Any, Any, Any]] = {}
        for i, function in enumerate(self.functions):
            if is_async(function):
                pending[i] = self._guarded_async(i, step, arguments, row_arguments)
            else:
                rewards[:, i] = self._column(i, self._guarded(i, step, arguments, row_arguments), num_rows)
        if pending:
            # a thread of its own: a notebook's thread already runs an event loop
            with ThreadPoolExecutor(max_workers=1) as executor:
                results = executor.submit(asyncio.run, _gather(list(pending.values()))).result()
            for i, values in zip(pending, results, strict=True):
                rewards[:, i] = self._column(i, values, num_rows)
        return rewards

    def _guarded(self, i: int, step: int, arguments: dict[str, Any], row_arguments: Sequence[str]) -> Any:
        try:
            return self.functions[i](**arguments)
        except Exception as error:
            row = self._raising_row(i, arguments, row_arguments)
            raise RuntimeError(self._failure(i, step, row, error, arguments)) from error

    async def _guarded_async(self, i: int, step: int, arguments: dict[str, Any], row_arguments: Sequence[str]) -> Any:
        try:
            return await self.functions[i](**arguments)
        except Exception as error:
            raise RuntimeError(self._failure(i, step, None, error, arguments)) from error

    def _raising_row(self, i: int, arguments: dict[str, Any], row_arguments: Sequence[str]) -> int | None:
        """The first row that raises when it is scored alone; the run is ending, so a second call does no harm."""
        for row in range(len(arguments["completions"])):
            alone = {k: [v[row]] if k in row_arguments else v for k, v in arguments.items()}
            try:
                self.functions[i](**alone)
            except Exception:
                return row
        return None

    def _failure(self, i: int, step: int, row: int | None, error: Exception, arguments: dict[str, Any]) -> str:
        where = "the batch as a whole"
        if row is not None:
            where = f"row {row}, completion {arguments['completions'][row]!r:.300}"
        return f"reward function {self.names[i]!r} raised {type(error).__name__} at step {step} on {where}: {error}"

    def _column(self, i: int, values: Any, num_rows: int) -> Tensor:
        name = self.names[i]
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise ValueError(
                f"reward function {name!r} must return a list of one number or None a completion, "
                f"it returned {type(values).__name__} {values!r:.100}"
            )
        if len(values) != num_rows:
            raise ValueError(
                f"reward function {name!r} must return one value a completion: {num_rows} completions, "
                f"{len(values)} values"
            )
        column = torch.empty(num_rows)
        for row, value in enumerate(values):
            if isinstance(value, str):
                raise ValueError(f"reward function {name!r} returned the string {value!r:.100} for row {row}")
            column[row] = math.nan if value is None else float(value)
        return column


def callable_name(function: Any) -> str:
    """A function's name in the metrics: that of the function inside a `partial`, or of an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def is_async(function: Any) -> bool:
    """Whether calling `function` gives a coroutine, also through `partial` and callable objects."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004 - the method is inspected, not tested for


async def _gather(coroutines: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    return list(await asyncio.gather(*coroutines))
