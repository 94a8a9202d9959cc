"""The clipped policy loss with a KL penalty from log-probs, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.ops import Case


@pytest.mark.op("policy-loss")
def bench_policy_loss(measure: Callable[[Case, str], None], case: Case, label: str) -> None:
    measure(case, label)
