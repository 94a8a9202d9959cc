"""One layer's causal attention over rows of unequal length, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.ops import Case


@pytest.mark.op("attention")
def bench_attention(measure: Callable[[Case, str], None], case: Case, label: str) -> None:
    measure(case, label)
