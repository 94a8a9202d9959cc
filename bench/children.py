"""Benchmarks whose figures are measured in a fresh child process: what pytest-benchmark's clock reads then."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from typing import Any

import torch

LABELS = ("grpo-fast", "trl")


class ChildClock:
    """A clock that advances by what a child process measured, and by nothing else."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


# of every benchmark in this process: `@pytest.mark.benchmark(timer=CHILD_CLOCK)`
CHILD_CLOCK = ChildClock()


def make_room() -> None:
    """Give the children the GPU memory that this process's earlier benches only keep."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def absent_peers() -> dict[str, str]:
    """The peers that cannot run here, with the reason."""
    return {} if find_spec("trl") else {"trl": "not installed"}


def record(benchmark: Any, *, label: str, seconds: float, **extra_info: Any) -> None:
    """Give pytest-benchmark one measurement under a label, with what else is known about it."""
    benchmark.extra_info.update(
        {"label": label, "is_ours": label == "grpo-fast", "absent": absent_peers()} | extra_info
    )
    benchmark.pedantic(CHILD_CLOCK.advance, args=(seconds,))
