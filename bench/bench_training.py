"""One training step of a language-model head with the GRPO loss: loss and gradients, of the weight too or frozen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.ops import Case


@pytest.mark.op("training")
def bench_training(measure: Callable[[Case, str], None], case: Case, label: str) -> None:
    measure(case, label)


@pytest.mark.op("training-frozen")
def bench_training_frozen(measure: Callable[[Case, str], None], case: Case, label: str) -> None:
    measure(case, label)
