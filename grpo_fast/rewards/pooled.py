"""A user's reward function in a worker process that is killed when it is late."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from grpo_fast.rewards.marks import DROP, callable_name, is_async
from grpo_fast.rewards.pool import WorkerPool, pickle_function

# rows of the batch that a worker process cannot be given, or need not be
NOT_SENT = ("trainer_state", "environments", "log_metric", "log_extra")


def in_pool(
    function: Callable[..., Any], *, timeout: float = 60.0, memory_gib: float | None = None
) -> Callable[..., Any]:
    """`function` in a worker process: a call that hangs ends at `timeout` with an error that names it.

    Args:
        function: Of a module that can be imported, not async. It is called as ever, without `trainer_state` and
            `environments`; what it logs arrives. A module-level state is the worker's own, and is lost with it.
        timeout: Most seconds of a call, which is of a batch (`overlap_rewards`: of a group).
        memory_gib: Most address space of the worker; None is no limit. Importing torch takes several GiB of it.

    Raises:
        ValueError: If the function cannot be imported by another process, or is async.
    """
    if is_async(function):
        raise ValueError(f"in_pool: {callable_name(function)} is async; a worker process runs plain functions")
    if not timeout > 0:
        raise ValueError(f"in_pool: timeout must be above 0 seconds, it is {timeout!r}")
    return _Pooled(function, timeout, None if memory_gib is None else int(memory_gib * 2**30))


class _Pooled:
    def __init__(self, function: Callable[..., Any], timeout: float, memory_bytes: int | None) -> None:
        self.__name__ = callable_name(function)
        self.parts = [function]
        self._pickled = pickle_function(functools.partial(_score, function), name=self.__name__)
        self._timeout, self._memory = timeout, memory_bytes

    def __call__(
        self,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        sent = {name: values for name, values in columns.items() if name not in NOT_SENT}
        (outcome,) = _pool(self._memory).run(self._pickled, [(sent,)], timeout_s=self._timeout)
        if outcome.status == "timeout":
            raise TimeoutError(f"it took more than {self._timeout:g} s and was cut off")
        if outcome.status == "memory":
            raise MemoryError("it took more memory than it may")
        if outcome.status != "done":
            raise RuntimeError(outcome.value or "its process ended by itself: a crash or an exit")
        rewards, metrics, extra = outcome.value
        if log_metric is not None:
            for name, value in metrics:
                log_metric(name, value)
        if log_extra is not None:
            for column, values in extra:
                log_extra(column, values)
        return [DROP if value == "drop" else value for value in rewards]


def _score(function: Callable[..., Any], columns: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """In the worker: the rewards, what was logged as a metric, and as columns; all of it fit for JSON."""
    metrics: list[tuple[str, float]] = []
    extra: list[tuple[str, list[Any]]] = []
    rewards = function(
        **columns,
        log_metric=lambda name, value: metrics.append((name, float(value))),
        log_extra=lambda column, values: extra.append((column, [_written(value) for value in values])),
    )
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if isinstance(rewards, str | dict) or not hasattr(rewards, "__iter__"):
        raise TypeError(f"it must return a list of numbers or None, it returned {type(rewards).__name__}")
    return [_written_reward(value) for value in rewards], metrics, extra


def _written_reward(value: Any) -> Any:
    if value is DROP:
        return "drop"
    return value if value is None or isinstance(value, str) else float(value)


def _written(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


@functools.cache
def _pool(memory_bytes: int | None) -> WorkerPool:
    return WorkerPool(memory_bytes=memory_bytes)
