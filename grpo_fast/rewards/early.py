"""Reward functions called group by group, beside the generation of the groups that are still to come."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from grpo_fast.event_loop import start_coroutine
from grpo_fast.rewards.calling import RewardCall, call, call_async, is_async
from grpo_fast.rewards.steps import Steps


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one function made of one group.

    Attributes:
        rewards: [the group's completions] fp32, NaN where the function returned None.
        seconds: How long it took.
        extra: What it gave to `log_extra`, by column.
        metrics: What it gave to `log_metric`, in order.
        steps: The steps of each completion, if it gives rewards of steps.
    """

    rewards: Tensor
    seconds: float
    extra: dict[str, list[Any]]
    metrics: list[tuple[str, Any]]
    steps: list[Steps] | None = None


class EarlyRewards:
    """Scores the groups of one batch as they come, in a thread that ends with the batch.

    Functions are called one after another, so that none runs beside itself or another, in the order of the groups'
    arrival; async functions run side by side on the process's event loop. In the thread autograd and the current
    device are as where this was made.
    """

    def __init__(self, functions: dict[int, tuple[Callable[..., Any], str]], device: torch.device) -> None:
        """Nothing runs yet.

        Args:
            functions: The reward functions by their place among all sources of rewards, each with its name.
            device: The process's device.
        """
        self._functions = functions
        self._scores: dict[tuple[int, int], Future[Score]] = {}
        self._thread = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="grpo-fast-rewards",
            initializer=_enter_thread,
            initargs=(device, torch.is_grad_enabled()),
        )

    def submit(self, group: RewardCall) -> None:
        """Start every function on a group; `group.first_row` is its place in the batch."""
        assert group.first_row is not None
        for place, (function, name) in self._functions.items():
            if is_async(function):
                future = start_coroutine(_score_async(function, name, group))
            else:
                future = self._thread.submit(_score, function, name, group)
            self._scores[place, group.first_row] = future

    def results(self) -> Iterator[tuple[int, str, list[Score]]]:
        """Each function's place, its name and its scores in the order of the rows; waits for them.

        Raises:
            RuntimeError: As `call`, for the first function, and of its groups the first in the batch, that failed.
            ValueError: In the same way.
        """
        for place, (_, name) in self._functions.items():
            yield place, name, [self._scores[key].result() for key in sorted(self._scores) if key[0] == place]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what has not begun; what runs in the thread runs on, and nobody waits for it."""
        for future in self._scores.values():
            future.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _enter_thread(device: torch.device, is_grad_enabled: bool) -> None:
    # both are a thread's own
    torch.set_grad_enabled(is_grad_enabled)
    if device.type == "cuda":
        torch.cuda.set_device(device)


class _CallLog:
    """Takes what a function logs in one call: what is logged for several groups must not mix."""

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.metrics: list[tuple[str, Any]] = []

    def given_to(self, group: RewardCall) -> RewardCall:
        return replace(group, shared=group.shared | {"log_extra": self._log_extra, "log_metric": self._log_metric})

    def _log_extra(self, column: str, values: list[Any]) -> None:
        self.extra[column].extend(values)

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.append((name, value))


def _score(function: Callable[..., Any], name: str, group: RewardCall) -> Score:
    log, start = _CallLog(), time.perf_counter()
    rewards = call(function, name, log.given_to(group))
    return _scored(rewards, time.perf_counter() - start, log, group.steps.get(name))


async def _score_async(function: Callable[..., Any], name: str, group: RewardCall) -> Score:
    log, start = _CallLog(), time.perf_counter()
    rewards = await call_async(function, name, log.given_to(group))
    return _scored(rewards, time.perf_counter() - start, log, group.steps.get(name))


def _scored(rewards: Tensor, seconds: float, log: _CallLog, steps: list[Steps] | None) -> Score:
    return Score(rewards=rewards, seconds=seconds, extra=log.extra, metrics=log.metrics, steps=steps)
