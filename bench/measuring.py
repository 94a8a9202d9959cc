"""Timing variants of one piece of work fairly: in turn, on cold caches, until the device is done."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Step = Callable[[], object]
# runs a step so many times and returns the seconds that took
Timer = Callable[[Step, int], float]

# seconds below which several runs make one sample: what a clock or a launch adds must not show
MIN_SAMPLE_S = {"cpu": 0.005, "cuda": 0.001}
MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How often everything is measured: at least `least` times, at most `most`, in between until `budget_s` is spent.

    The budget is wall seconds of all variants together, warm-up not counted.
    """

    least: int = 3
    most: int = 50
    budget_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant's samples.

    Attributes:
        label: The variant.
        seconds: Of one run, each sample in order: CPU seconds of all threads on a CPU, the device's on CUDA.
        iterations: Runs that make one sample.
        peak_mib: Most memory above what was held before the run: resident on a CPU, torch's allocations on CUDA.
        error: What it died of, then without samples; else None.
    """

    label: str
    seconds: list[float] = field(default_factory=list)
    iterations: int = 1
    peak_mib: float = math.nan
    error: str | None = None

    @property
    def median(self) -> float:
        """Of the samples, in seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the samples, in seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = quantiles(self.seconds, n=4, method="inclusive")
        return first, third


class Rotation(Generic[T]):
    """Copies of a step's operands, handed out in turn, so that none is still in the cache when it comes again."""

    def __init__(self, make: Callable[[], T], copies: int) -> None:
        self._copies = [make() for _ in range(copies)]
        self._next = -1

    def __call__(self) -> T:
        self._next = (self._next + 1) % len(self._copies)
        return self._copies[self._next]


def copies_needed(num_bytes: int, device: torch.device, *, cache_bytes: int | None = None) -> int:
    """Copies of operands of `num_bytes` that are together more than twice the GPU's L2 cache; 1 on a CPU.

    Args:
        num_bytes: Of one copy.
        device: Where they lie.
        cache_bytes: Instead of the device's.
    """
    if cache_bytes is None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return 1 if cache_bytes == 0 else 2 * cache_bytes // max(num_bytes, 1) + 1


class Memory:
    """Extra peak memory since its creation, in MiB: resident size on a CPU, torch's allocations on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        gc.collect()
        if self._on_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device) / 2**20
        else:
            # what was freed but not returned would hide the first megabytes
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_mib("VmRSS")

    def extra_mib(self) -> float:
        """The peak so far above the start."""
        peak = torch.cuda.max_memory_allocated() / 2**20 if self._on_cuda else _status_mib("VmHWM")
        return peak - self._before


def _status_mib(name: str) -> float:
    # unlike getrusage's, this peak is not inherited from the parent, and can be reset
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(kib) / 1024


def timer_of(device: torch.device) -> Timer:
    """CPU seconds of all threads on a CPU, where other load stretches the wall clock; the device's seconds on CUDA."""
    return _time_on_cuda if device.type == "cuda" else _time_on_cpu


def _time_on_cpu(step: Step, iterations: int) -> float:
    before = time.process_time()
    for _ in range(iterations):
        step()
    return time.process_time() - before


def _time_on_cuda(step: Step, iterations: int) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(iterations):
        step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def measure(
    variants: Mapping[str, Step],
    *,
    device: torch.device,
    before: Mapping[str, Step] | None = None,
    warmups: int = 1,
    rounds: Rounds | None = None,
    timer: Timer | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Measurement]:
    """Run all variants in turn, round after round; who begins changes, so that load and clocks drift under all alike.

    Args:
        variants: The steps by label. One that raises is reported as such and not run again.
        device: Whose clock and memory count.
        before: What is run before a variant's step and not timed; such a variant makes one run a sample.
        warmups: Runs before anything is measured: one compiles and tunes; as many as there are copies of the inputs
            make what is kept beside each of them.
        rounds: How many.
        timer: Instead of the device's.
        now: What `rounds.budget_s` is read from.

    Returns:
        By label, in the order of `variants`.
    """
    before, rounds, timer = before or {}, rounds or Rounds(), timer or timer_of(device)
    found = {
        label: _warmed_up(label, step, before.get(label), device, timer, warmups) for label, step in variants.items()
    }
    started, order = now(), list(variants)
    for done in range(rounds.most):
        if done >= rounds.least and now() - started >= rounds.budget_s:
            break
        shift = done % max(len(order), 1)
        for label in order[shift:] + order[:shift]:
            if found[label].error is None:
                found[label] = _sampled(found[label], variants[label], before.get(label), timer)
    return found


def _warmed_up(
    label: str, step: Step, before: Step | None, device: torch.device, timer: Timer, warmups: int
) -> Measurement:
    """After the warm-up, a run for memory and for how many runs a sample needs."""

    def run() -> float:
        if before is not None:
            before()
        return timer(step, 1)

    try:
        for _ in range(warmups):
            run()
        if before is not None:
            before()
        memory = Memory(device)
        seconds = timer(step, 1)
        peak_mib = memory.extra_mib()
    except Exception as error:
        failure = Measurement(label=label, error=_message(error))
    else:
        iterations = _iterations(seconds, device)
        if before is not None:
            iterations = 1
        elif iterations > 1:
            # that run touched memory for the first time
            iterations = _iterations(timer(step, iterations) / iterations, device)
        return Measurement(label=label, iterations=iterations, peak_mib=peak_mib)
    if device.type == "cuda":
        # here, where no frame of the failed run holds a tensor
        torch.cuda.empty_cache()
    return failure


def _iterations(seconds: float, device: torch.device) -> int:
    """Runs of so many seconds that make a sample."""
    wanted = MIN_SAMPLE_S[device.type] / seconds if seconds > 0 else MAX_ITERATIONS
    return min(math.ceil(wanted), MAX_ITERATIONS)


def _sampled(so_far: Measurement, step: Step, before: Step | None, timer: Timer) -> Measurement:
    try:
        if before is not None:
            before()
        seconds = timer(step, so_far.iterations) / so_far.iterations
    except Exception as error:
        return Measurement(label=so_far.label, error=_message(error))
    so_far.seconds.append(seconds)
    return so_far


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
