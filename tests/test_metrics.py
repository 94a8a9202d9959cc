"""Phases: nested ones add up and are charged once, in seconds and in memory."""

import time

import pytest

from grpo_fast.metrics import PhaseTimer, mean_without_nan


class Levels:
    """A meter that says, at each change of phase, the next of the peaks it was given."""

    def __init__(self, *peaks):
        self.peaks = iter(peaks)

    def take(self):
        return {"peak_mib": next(self.peaks)}


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
    assert seconds.keys() == {"time/outer", "time/inner"}
    assert seconds["time/inner"] >= 0.1
    assert 0.02 <= seconds["time/outer"] <= total - 0.1
    # the two clock readings around the block
    assert abs(sum(seconds.values()) - total) < 0.01
    assert timer.take() == {}


def test_the_peak_of_a_phase_is_that_of_its_own_stretches():
    # before, outer, inner, outer, inner, outer; then before, outer
    timer = PhaseTimer(Levels(900.0, 3.0, 70.0, 5.0, 60.0, 4.0, 900.0, 2.0))
    with timer.phase("outer"):
        for _ in range(2):
            with timer.phase("inner"):
                pass
    taken = timer.take()
    assert {name: mib for name, mib in taken.items() if name.startswith("memory/")} == {
        "memory/outer_peak_mib": 5.0,
        "memory/inner_peak_mib": 70.0,
    }
    with timer.phase("outer"):
        pass
    assert timer.take()["memory/outer_peak_mib"] == 2.0, "of a step before"


def test_a_phase_that_fails_is_charged_and_closed():
    timer = PhaseTimer(Levels(1.0, 2.0, 8.0, 4.0))
    with timer.phase("outer"):
        with pytest.raises(KeyError), timer.phase("inner"):
            raise KeyError
        assert timer._open == ["outer"]
    taken = timer.take()
    assert (taken["memory/outer_peak_mib"], taken["memory/inner_peak_mib"]) == (4.0, 8.0)


def test_means_leave_nan_out():
    assert mean_without_nan([1.0, float("nan"), 3.0]) == 2.0
    assert mean_without_nan([float("nan")]) is None
