"""Phase times: nested phases add up, and are charged once."""

import time

from grpo_fast.metrics import PhaseTimer, mean_without_nan


def test_a_phase_inside_another_is_charged_to_the_inner_one():
    timer = PhaseTimer()
    start = time.perf_counter()
    with timer.phase("outer"):
        time.sleep(0.02)
        with timer.phase("inner"):
            time.sleep(0.05)
        with timer.phase("inner"):
            time.sleep(0.05)
    total = time.perf_counter() - start
    seconds = timer.take()
    assert seconds["inner"] >= 0.1
    assert 0.02 <= seconds["outer"] <= total - 0.1
    # the two clock readings around the block
    assert abs(sum(seconds.values()) - total) < 0.01
    assert timer.take() == {}


def test_means_leave_nan_out():
    assert mean_without_nan([1.0, float("nan"), 3.0]) == 2.0
    assert mean_without_nan([float("nan")]) is None
