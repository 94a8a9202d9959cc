"""A micro-step whose rollout exists gives the device all its work without waiting for it once."""

import json

import pytest

from tests.processes import launch
from tests.waits_of_a_step import CASES, OPERATIONS

WAITING = {
    *("a number", "a list", "a truth", "a copy to the host", "a copy to the device", "numbers on the device"),
    *("numbers like others", "what a mask picks", "what a list picks", "where", "runs", "repeats"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each micro-step of each case waited for."""
    out = tmp_path_factory.mktemp("waits") / "waits.json"
    launch("-m", "tests.waits_of_a_step", out, num_processes=1)
    return json.loads(out.read_text())


def test_waits_are_seen(found):
    counts = {name: len(waits) for name, waits in found["operations"].items()}
    assert counts == {name: int(name in WAITING) for name in OPERATIONS}


def told(waits):
    """Each once, with what led to it."""
    lines = ["\n    ".join([wait["operation"], *wait["frames"]]) for wait in waits]
    return "\n".join(f"{lines.count(line)} x {line}" for line in dict.fromkeys(lines))


@pytest.mark.parametrize("case", CASES)
def test_a_micro_step_does_not_wait(found, case):
    within = [step for step in found[case] if not step["generates"] and not step["ends_window"]]
    assert within
    waits = [wait for step in within for wait in step["waits"]]
    if waits:
        pytest.fail(f"{len(waits)} waits:\n{told(waits)}")


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_read_once_a_window(found, case):
    last = [step["waits"] for step in found[case] if not step["generates"] and step["ends_window"]]
    assert last
    for waits in last:
        if len(waits) > 1:
            pytest.fail(f"{len(waits)} waits:\n{told(waits)}")
