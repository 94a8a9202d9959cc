"""Metrics: sums taken on the device during a micro-batch, reduced once over the processes, in TRL's names."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

SUMS = ("tokens", "entropy", "kl", "low", "high", "difference", "differences", "ratio", "ratios")
# minima travel as the maxima of their negatives
MAXIMA = ("-low", "high", "difference", "-ratio", "ratio")


@dataclass(frozen=True)
class Stats:
    """What one pack contributes to the metrics of its micro-batch.

    Attributes:
        sums: [len(SUMS)] fp32: scored tokens; sums over them of entropy, KL, and tokens clipped at the low and the high
            side; sum and count of |trainer's - sampler's log-prob|; sum and count of importance weights.
        maxima: [len(MAXIMA)] fp32, -inf where there is nothing: over rows, of minus the low-clipped share and of the
            high-clipped share; of the log-prob difference; of minus the importance weight and of the weight.
    """

    sums: Tensor
    maxima: Tensor

    @staticmethod
    def empty(device: torch.device) -> Stats:
        """No tokens."""
        return Stats(torch.zeros(len(SUMS), device=device), torch.full((len(MAXIMA),), -math.inf, device=device))

    def __add__(self, other: Stats) -> Stats:
        return Stats(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def vector(self) -> Tensor:
        """[len(SUMS) + len(MAXIMA)] fp32, for one gather over the processes."""
        return torch.cat([self.sums, self.maxima])


def to_metrics(gathered: Tensor, *, has_kl: bool, has_sampler: bool) -> dict[str, float]:
    """TRL's metrics from `gathered`: [processes, len(SUMS) + len(MAXIMA)], each process's `Stats.vector()`."""
    sums = dict(zip(SUMS, gathered[:, : len(SUMS)].sum(0).tolist(), strict=True))
    maxima = dict(zip(MAXIMA, gathered[:, len(SUMS) :].amax(0).tolist(), strict=True))
    tokens = max(sums["tokens"], 1.0)
    metrics = {
        "entropy": sums["entropy"] / tokens,
        "clip_ratio/low_mean": sums["low"] / tokens,
        "clip_ratio/low_min": _finite(-maxima["-low"]),
        "clip_ratio/high_mean": sums["high"] / tokens,
        "clip_ratio/high_max": _finite(maxima["high"]),
        "clip_ratio/region_mean": (sums["low"] + sums["high"]) / tokens,
    }
    if has_kl:
        metrics["kl"] = sums["kl"] / tokens
    if has_sampler:
        metrics["sampling/sampling_logp_difference/mean"] = sums["difference"] / max(sums["differences"], 1.0)
        metrics["sampling/sampling_logp_difference/max"] = max(maxima["difference"], 0.0)
        metrics["sampling/importance_sampling_ratio/min"] = _finite(-maxima["-ratio"])
        metrics["sampling/importance_sampling_ratio/mean"] = sums["ratio"] / max(sums["ratios"], 1.0)
        metrics["sampling/importance_sampling_ratio/max"] = _finite(maxima["ratio"])
    return metrics


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def mean_without_nan(values: list[float]) -> float | None:
    """The mean of what is not NaN, or None: JSON loggers refuse NaN."""
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else None


class PhaseTimer:
    """Wall seconds by phase since the last `take`; a phase inside another is charged to the inner one only."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Give the seconds since the last change of phase to the innermost open one."""
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """The seconds by phase, starting again from 0."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class StepTimer(TrainerCallback):
    """Times the optimizer, and files the phases of each optimizer step as `time/<phase>` seconds."""

    def __init__(self, timer: PhaseTimer, metrics: dict[str, list[float]]) -> None:
        self.timer = timer
        self.metrics = metrics
        self._stack = ExitStack()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        # evaluation between two steps ran the timer too
        self.timer.take()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._stack.enter_context(self.timer.phase("optimizer"))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._stack.close()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for phase, seconds in self.timer.take().items():
            self.metrics[f"time/{phase}"].append(seconds)
