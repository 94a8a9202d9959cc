"""The peak of a stretch: what was in use at most, and nothing of the stretches before."""

import gc
import mmap
import resource
import sys
import time

import pytest
import torch

from grpo_fast import memory
from grpo_fast.memory import MIB, CudaMeter, ResidentMeter, make_meter, peak_rss_mib
from tests.test_reporting import build

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
# what the interpreter, other threads and pages counted per core may add or give back meanwhile
SLACK_MIB = 8
HELD_MIB = 64


def hold(mib):
    """Touched pages of their own, which go back to the system when they are closed."""
    pages = mmap.mmap(-1, mib * MIB)
    for place in range(0, mib * MIB, mmap.PAGESIZE):
        pages[place] = 1
    return pages


def max_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@linux
def test_a_stretch_begins_at_what_is_in_use():
    gc.collect()
    meter = ResidentMeter()
    meter.take()
    empty = meter.take()["peak_mib"]
    hold(HELD_MIB).close()
    held = meter.take()["peak_mib"]
    assert held - empty == pytest.approx(HELD_MIB, abs=SLACK_MIB)
    after = meter.take()["peak_mib"]
    assert after == pytest.approx(empty, abs=SLACK_MIB)
    pages = hold(HELD_MIB)
    meter.take()
    # still there, so of this stretch too
    assert meter.take()["peak_mib"] - after == pytest.approx(HELD_MIB, abs=SLACK_MIB)
    pages.close()


@linux
def test_the_whole_runs_peak_survives():
    pages = hold(4 * HELD_MIB)
    # ended before the meter began
    pages.close()
    peak = max_rss_mib()
    meter = ResidentMeter()
    assert max_rss_mib() == peak, "a meter that is not used resets nothing"
    assert peak_rss_mib(None) == peak
    meter.take()
    assert max_rss_mib() < peak - 3 * HELD_MIB
    assert peak_rss_mib(meter) == meter.highest_mib == pytest.approx(peak, abs=SLACK_MIB)
    # in the stretch that runs, and in one that has ended
    pages = hold(12 * HELD_MIB)
    pages.close()
    highest = peak_rss_mib(meter)
    assert highest > peak + 4 * HELD_MIB
    meter.take()
    assert peak_rss_mib(meter) == pytest.approx(highest, abs=SLACK_MIB)


@linux
def test_a_reading_costs_little():
    """Two a phase, some 10 a step; about 60 us each where this was written."""
    meter = ResidentMeter()
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        meter.take()
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[len(seconds) // 2] < 2e-3


def test_what_cannot_be_read_is_left_out_and_said(monkeypatch, caplog):
    for name in ("CLEAR_REFS", "STATUS"):
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, "/proc/self/no such file")
            assert make_meter(CPU) is None
    assert make_meter(torch.device("mps")) is None
    assert [record.message.partition(":")[0] for record in caplog.records] == ["log_memory=True has no effect"] * 3
    assert isinstance(make_meter(torch.device("cuda")), CudaMeter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peaks_of_the_cuda_allocator():
    device = torch.device("cuda")
    meter = CudaMeter(device)
    meter.take()
    empty = meter.take()
    # another library's or an unmapped pool's memory is seen by the device alone
    torch.empty(HELD_MIB * MIB, dtype=torch.uint8, device=device)
    held = meter.take()
    assert held["peak_mib"] - empty["peak_mib"] == pytest.approx(HELD_MIB)
    # the allocator keeps the block for itself
    assert held["device_mib"] - empty["device_mib"] >= HELD_MIB - SLACK_MIB
    assert meter.take()["peak_mib"] == pytest.approx(empty["peak_mib"])
    torch.cuda.empty_cache()
    # at the beginning of the stretch it was there
    assert meter.take()["device_mib"] == pytest.approx(held["device_mib"])
    assert meter.take()["device_mib"] < held["device_mib"]


# -- in the trainer ----------------------------------------------------------------------------------------------------


@linux
def test_each_step_logs_the_peak_of_each_phase(tmp_path):
    def greedy_reward(completions, **kwargs):
        hold(4 * HELD_MIB).close()
        return [float(len(text)) for text in completions]

    trainer = build(tmp_path, max_steps=2, gradient_accumulation_steps=2, log_memory=True)
    trainer.reward_funcs[0] = greedy_reward
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        phases = {name.removeprefix("time/") for name in line if name.startswith("time/")}
        assert {"generation", "train", "rewards", "optimizer"} <= phases
        peaks = {name: line[name] for name in line if name.startswith("memory/")}
        assert peaks.keys() == {f"memory/{phase}_peak_mib" for phase in phases}
        rewards = peaks.pop("memory/rewards_peak_mib")
        # neither the phase around it nor those after it
        assert rewards - max(peaks.values()) > 3 * HELD_MIB


@linux
def test_nobody_s_counters_start_again_unless_asked(tmp_path):
    pages = hold(8 * HELD_MIB)
    pages.close()
    peak = max_rss_mib()
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    assert max_rss_mib() >= peak
    assert not any(name.startswith("memory/") for line in trainer.state.log_history for name in line)
