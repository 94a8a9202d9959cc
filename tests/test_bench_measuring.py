"""How benches time: whose turn it is, how often, on which inputs, and what memory counts."""

from __future__ import annotations

import math

import pytest
import torch

from bench.measuring import MAX_ITERATIONS, Measurement, Memory, Rotation, Rounds, copies_needed, measure

CPU = torch.device("cpu")


class Clock:
    """Time that passes only inside steps, by what they are said to take."""

    def __init__(self, seconds):
        self.seconds, self.now, self.ran = seconds, 0.0, []

    def steps(self):
        return {label: lambda label=label: self.run(label) for label in self.seconds}

    def run(self, label):
        self.ran.append(label)
        self.now += self.seconds[label]

    def timer(self, step, iterations):
        before = self.now
        for _ in range(iterations):
            step()
        return self.now - before

    def measure(self, **options):
        return measure(self.steps(), device=CPU, timer=self.timer, now=lambda: self.now, **options)


def test_variants_take_turns_and_who_begins_changes():
    clock = Clock({"a": 1.0, "b": 2.0, "c": 3.0})
    clock.measure(rounds=Rounds(least=3, most=3))
    # two runs each to warm up
    assert clock.ran == [*"aabbcc", *"abc", *"bca", *"cab"]


def test_every_copy_of_the_inputs_is_warmed_up():
    clock = Clock({"a": 1.0, "b": 2.0})
    clock.measure(warmups=3, rounds=Rounds(least=1, most=1))
    assert clock.ran == [*"aaaabbbb", *"ab"]


def test_samples_are_of_one_run():
    found = Clock({"slow": 1.0, "fast": 2**-10}).measure(rounds=Rounds(least=2, most=2))
    assert found["slow"].seconds == [1.0, 1.0]
    assert found["slow"].iterations == 1
    # 5 ms make a sample on a CPU
    assert found["fast"].iterations == 6
    assert found["fast"].seconds == [2**-10, 2**-10]


def test_a_step_of_no_time_does_not_run_for_ever():
    found = Clock({"nothing": 0.0}).measure(rounds=Rounds(least=1, most=1))
    assert found["nothing"].iterations == MAX_ITERATIONS


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (7.5, 8), (1000.0, 20)])
def test_rounds_end_with_the_budget(budget, rounds):
    found = Clock({"a": 1.0}).measure(rounds=Rounds(least=3, most=20, budget_s=budget))
    assert len(found["a"].seconds) == rounds


def test_what_comes_before_a_step_is_not_timed_and_comes_before_each():
    clock = Clock({"a": 0.001})
    calls = []

    def before():
        calls.append(len(clock.ran))
        clock.now += 100.0

    found = clock.measure(before={"a": before}, rounds=Rounds(least=2, most=2))
    # it stands before every run, so a sample is one run however short
    assert found["a"].iterations == 1
    assert found["a"].seconds == pytest.approx([0.001, 0.001])
    assert calls == [0, 1, 2, 3]


def test_one_that_fails_does_not_stop_the_others():
    clock = Clock({"good": 1.0, "bad": 1.0})
    steps = clock.steps()
    ran = []

    def dies_in_the_second_round():
        ran.append(1)
        if len(ran) == 4:
            raise RuntimeError("no memory left\nand more")

    steps["bad"] = dies_in_the_second_round
    found = measure(steps, device=CPU, timer=clock.timer, now=lambda: clock.now, before={"bad": lambda: None})
    assert found["bad"].error == "RuntimeError: no memory left"
    assert found["bad"].seconds == []
    assert len(ran) == 4
    assert found["good"].error is None
    assert len(found["good"].seconds) >= 3


def test_median_and_quartiles():
    found = Measurement(label="a", seconds=[5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.spread) == (3.0, (2.0, 4.0))
    assert Measurement(label="a", seconds=[2.0]).spread == (2.0, 2.0)


def test_inputs_rotate():
    made = iter("xyz")
    rotation = Rotation(lambda: next(made), 3)
    assert [rotation() for _ in range(5)] == ["x", "y", "z", "x", "y"]


@pytest.mark.parametrize(("num_bytes", "copies"), [(10, 21), (99, 3), (100, 3), (200, 2), (201, 1), (10**9, 1)])
def test_copies_are_together_more_than_twice_the_cache(num_bytes, copies):
    assert copies_needed(num_bytes, CPU, cache_bytes=100) == copies
    assert copies * num_bytes > 200 >= (copies - 1) * num_bytes


def test_a_cpu_needs_no_copies():
    assert copies_needed(10, CPU) == 1


def test_extra_memory_is_the_peak_above_the_start():
    before = torch.ones(32 << 18)
    memory = Memory(CPU)
    after = torch.ones(64 << 18)
    del after
    # MiB; small allocations come and go beside it
    assert 63 < memory.extra_mib() < 72
    assert Memory(CPU).extra_mib() < 8
    assert before.sum() > 0


def test_a_variants_memory_is_its_own():
    found = measure(
        {"large": lambda: torch.ones(64 << 18), "small": lambda: torch.ones(1 << 18)},
        device=CPU,
        rounds=Rounds(least=1, most=1),
    )
    assert 63 < found["large"].peak_mib < 72
    assert found["small"].peak_mib < 8
    assert math.isnan(Measurement(label="a").peak_mib)
