"""Metrics: sums taken on the device during a micro-batch, reduced once over the processes, in TRL's names; phases."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from grpo_fast.memory import MemoryMeter
from grpo_kernels.options import PolicyOptions

SUMS = (
    "tokens",  # in the loss
    "entropy",
    "kl",
    "low",  # clipped at the low and at the high side
    "high",
    "flags",  # what could have been: tokens, or rows at sequence level
    "phi",  # VESPO's weights
    "phis",
    "policy",  # the loss without its entropy bonus
    "bonus_entropy",  # over the tokens that the bonus counts
    "bonus_tokens",
    "aux",  # the auxiliary loss, once a micro-batch
    "ratio",  # the sampler's importance weights
    "ratios",
    "unclipped_ratio",
    "samplers",  # micro-batches whose loss pass compares the policy with the sampler
    "silent",  # rows that are left out because nothing of them reaches a gradient
    "masked",  # rows without a token in the loss
    "run",  # tokens through the model, padding included
    "unpadded",  # those that are no padding
    "unshared",  # what they would be if no row shared a prompt
)
# over rows, of minus the low-clipped share and of the high-clipped share; of minus the sampler's weight, and of it
MAXIMA = ("low", "high", "low_ratio", "ratio")


@dataclass(frozen=True)
class Stats:
    """What some rows contribute to the metrics of their micro-batch.

    Attributes:
        sums: [len(SUMS)] fp32.
        maxima: [len(MAXIMA)] fp32, -inf where there is nothing; minima travel as the maxima of their negatives.
        log_ratios: [tokens] fp32 each: the trainer's minus the sampler's log-probs, NaN where not reported. No sum
            gives a percentile.
    """

    sums: Tensor
    maxima: Tensor
    log_ratios: list[Tensor] = field(default_factory=list)

    @staticmethod
    def empty(device: torch.device) -> Stats:
        """No tokens."""
        return Stats(torch.zeros(len(SUMS), device=device), torch.full((len(MAXIMA),), -math.inf, device=device))

    def add(self, **values: Tensor | float) -> None:
        """Add to the sums, in place."""
        for name, value in values.items():
            self.sums[SUMS.index(name)] += value

    def at_least(self, **values: Tensor) -> None:
        """Raise the maxima, in place."""
        for name, value in values.items():
            i = MAXIMA.index(name)
            self.maxima[i] = torch.maximum(self.maxima[i], value)

    def of(self, *names: str) -> Tensor:
        """Some of the sums, [len(names)]."""
        return self.sums[[SUMS.index(name) for name in names]]

    def __add__(self, other: Stats) -> Stats:
        maxima = torch.maximum(self.maxima, other.maxima)
        return Stats(self.sums + other.sums, maxima, self.log_ratios + other.log_ratios)

    def vector(self) -> Tensor:
        """[len(SUMS) + len(MAXIMA)] fp32, for one gather over the processes."""
        return torch.cat([self.sums, self.maxima])


def _named(gathered: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Sums and maxima over the first dimension of vectors [..., len(SUMS) + len(MAXIMA)]."""
    sums, maxima = gathered[:, : len(SUMS)].sum(0), gathered[:, len(SUMS) :].amax(0)
    return dict(zip(SUMS, sums.tolist(), strict=True)), dict(zip(MAXIMA, maxima.tolist(), strict=True))


def loss_metrics(
    gathered: Tensor, options: PolicyOptions, *, has_bonus: bool, has_aux_loss: bool, policy_scale: float
) -> dict[str, float]:
    """TRL's metrics of one micro-batch.

    Args:
        gathered: [processes, len(SUMS) + len(MAXIMA)] fp32, each process's `Stats.vector()`.
        options: The policy loss: each type has its own.
        has_bonus: Whether there is an entropy bonus.
        has_aux_loss: Whether there is an auxiliary loss.
        policy_scale: What the policy loss was divided by for gradient accumulation.
    """
    sums, maxima = _named(gathered)
    tokens, flags = max(sums["tokens"], 1.0), max(sums["flags"], 1.0)
    metrics = {"entropy": sums["entropy"] / tokens}
    if options.beta:
        metrics["kl"] = sums["kl"] / tokens
    if options.is_clipped:
        metrics["clip_ratio/low_mean"] = sums["low"] / flags
        metrics["clip_ratio/low_min"] = _finite(-maxima["low"])
        metrics["clip_ratio/high_mean"] = sums["high"] / flags
        metrics["clip_ratio/high_max"] = _finite(maxima["high"])
        metrics["clip_ratio/region_mean"] = (sums["low"] + sums["high"]) / flags
    elif options.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = sums["high"] / flags
    elif options.loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = sums["phi"] / max(sums["phis"], 1.0)
    if has_bonus:
        metrics["policy_loss"] = policy_scale * sums["policy"] / len(gathered)
    if has_aux_loss:
        metrics["aux_loss"] = sums["aux"] / len(gathered)
    # nothing was run that could be measured
    return dict.fromkeys(metrics, math.nan) if sums["silent"] and not sums["tokens"] else metrics


def work_metrics(gathered: Tensor) -> dict[str, float]:
    """What the model was run on in an optimizer step, over all processes.

    - `rows/skipped`: rows that were not run: silent ones, and those without a token in the loss.
    - `tokens/useful_ratio`: tokens in the loss over tokens run.
    - `tokens/padding_ratio`: the share of the tokens run that is padding.
    - `tokens/shared_ratio`: the share of the rows' tokens that was not run because another row had run it.

    Args:
        gathered: [processes, micro-batches, len(SUMS) + len(MAXIMA)] fp32.
    """
    sums, _ = _named(gathered.flatten(0, 1))
    metrics = {"rows/skipped": sums["silent"] + sums["masked"]}
    if sums["run"]:
        metrics["tokens/useful_ratio"] = sums["tokens"] / sums["run"]
        metrics["tokens/padding_ratio"] = 1 - sums["unpadded"] / sums["run"]
        metrics["tokens/shared_ratio"] = 1 - sums["unpadded"] / sums["unshared"]
    return metrics


def has_samplers(gathered: Tensor) -> bool:
    """Whether a micro-batch of any process compared the policy with the sampler; [..., len(SUMS) + len(MAXIMA)]."""
    return bool(gathered[..., SUMS.index("samplers")].any())


def ratio_metrics(gathered: Tensor) -> dict[str, float]:
    """TRL's metrics of the sampler's importance weights, over the micro-batches of an optimizer step.

    And the mean before clipping or masking: 1 where sampler and trainer agree on temperature, support and weights,
    whatever the bounds hide.

    Args:
        gathered: [processes, micro-batches, len(SUMS) + len(MAXIMA)] fp32.
    """
    sums, maxima = _named(gathered.flatten(0, 1))
    processes = [_named(process)[0] for process in gathered]
    # the mean of the processes' means, as in TRL
    mean_ratio = sum(s["ratio"] / max(s["ratios"], 1.0) for s in processes) / len(processes)
    has_ratios = sums["ratios"] > 0
    return {
        "sampling/importance_sampling_ratio/min": -maxima["low_ratio"] if has_ratios else 0.0,
        "sampling/importance_sampling_ratio/mean": mean_ratio,
        "sampling/importance_sampling_ratio/max": maxima["ratio"] if has_ratios else 0.0,
        "sampling/importance_sampling_ratio/unclipped_mean": sums["unclipped_ratio"] / max(sums["ratios"], 1.0),
    }


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


class RowMean(float):
    """A mean that knows of how many values it is, for `mean_without_nan`."""

    num_rows: float

    def __new__(cls, mean: float, num_rows: float) -> RowMean:
        """A float as any other, with `num_rows`."""
        self = super().__new__(cls, mean)
        self.num_rows = num_rows
        return self


def mean_without_nan(values: list[float]) -> float | None:
    """The mean of what is not NaN, where a `RowMean` counts `num_rows` times; or None: JSON loggers refuse NaN."""
    valid = [value for value in values if not math.isnan(value)]
    weights = [getattr(value, "num_rows", 1) for value in valid]
    if sum(weights) == 0:
        weights = [1] * len(valid)
    weighted = [weight * value for weight, value in zip(weights, valid, strict=True)]
    return sum(weighted) / sum(weights) if valid else None


class PhaseTimer:
    """Wall seconds and the most memory by phase since the last `take`.

    A phase inside another is charged to the inner one only: the outer one has what its own stretches take.
    """

    def __init__(self, meter: MemoryMeter | None = None) -> None:
        """Begin with no phase; without a `meter` only seconds are taken."""
        self.meter = meter
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to `name`, and raise its memory to the block's."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Give the seconds and the memory since the last change of phase to the innermost open one."""
        now = time.perf_counter()
        peaks = {} if self.meter is None else self.meter.take()
        if self._open:
            phase = self._open[-1]
            self._seconds[f"time/{phase}"] += now - self._since
            for kind, mib in peaks.items():
                name = f"memory/{phase}_{kind}"
                self._peaks[name] = max(self._peaks[name], mib)
        self._since = now

    def take(self) -> dict[str, float]:
        """`time/<phase>` in seconds and `memory/<phase>_...` in MiB, starting again from 0."""
        taken = {**self._seconds, **self._peaks}
        self._seconds.clear()
        self._peaks.clear()
        return taken


class StepTimer(TrainerCallback):
    """Times the optimizer, and files the phases of each optimizer step: this process's, not all processes'."""

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
        for name, value in self.timer.take().items():
            self.metrics[name].append(value)
