"""Log-probs and entropies of a language-model head, without gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.ops import Case


@pytest.mark.op("scoring")
def bench_scoring(measure: Callable[[Case, str], None], case: Case, label: str) -> None:
    measure(case, label)
