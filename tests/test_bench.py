"""The main-job bench: its arithmetic on canned runs, and its command line."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


table = load("main_job_table")


def make_run(label, *, train, generation=1.0, peak=1000.0, cuda=None):
    """A run whose phases take the given CPU seconds; each wall second is half of it."""
    steps = []
    for index, seconds in enumerate(train):
        cpu_s = {"generation": generation, "rewards": 0.25, "train": seconds, "weight sync": 0.5, "other": 0.25}
        steps.append(
            table.Step(
                cpu_s=cpu_s,
                wall_s={phase: spent / 2 for phase, spent in cpu_s.items()},
                tokens=120,
                prompts=f"prompts {index}",
                reward=index / 10,
                zero_std=0.5,
            )
        )
    return table.Run(
        label=label,
        steps=steps,
        peak_rss_mib=peak,
        loaded_rss_mib=500.0,
        peak_cuda_mib=cuda,
        device="cpu",
        startup_s=1.0,
        threads=1,
        children=0,
    )


def cells(text, row):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_warm_up_steps_are_not_measured():
    run = make_run("trl", train=[90.0, 80.0, 8.0, 10.0, 9.0])
    assert run.seconds("train", clock="cpu") == [8.0, 10.0, 9.0]
    assert run.seconds("train", clock="wall") == [4.0, 5.0, 4.5]


def test_step_is_the_sum_of_its_phases():
    run = make_run("trl", train=[90.0, 80.0, 8.0, 10.0, 9.0])
    assert run.seconds("step", clock="cpu") == [10.0, 12.0, 11.0]
    assert run.tokens_per_s(clock="cpu") == [12.0, 10.0, 120 / 11]


def test_ratios_are_of_medians_and_of_peaks():
    peer = make_run("trl", train=[0.0, 0.0, 8.0, 100.0, 6.0], generation=3.0, peak=6000.0)
    ours = make_run("grpo-fast-vllm", train=[0.0, 0.0, 2.0, 2.0, 50.0], generation=1.0, peak=3000.0)
    assert table.ratios(ours, peer) == {"train phase": 0.25, "whole step": 4.0 / 12.0, "peak memory": 0.5}


def test_on_a_gpu_memory_is_the_devices_and_time_the_wall_clock():
    peer = make_run("trl", train=[0.0, 0.0, 8.0], peak=100.0, cuda=4000.0)
    ours = make_run("grpo-fast-vllm", train=[0.0, 0.0, 4.0], peak=900.0, cuda=1000.0)
    # the wall clock says otherwise than the CPU's
    ours = replace(ours, steps=[replace(step, wall_s=dict.fromkeys(table.PHASES, 1.0)) for step in ours.steps])
    assert table.ratios(ours, peer) == {"train phase": 0.25, "whole step": 1.0, "peak memory": 0.25}


def test_table_shows_medians_ranges_and_whether_targets_are_met():
    peer = make_run("trl", train=[90.0, 80.0, 8.0, 10.0, 9.0], peak=6000.0)
    fast = make_run("grpo-fast-vllm", train=[9.0, 8.0, 2.0, 3.0, 2.5], peak=3000.0)
    slow = make_run("grpo-fast-transformers", train=[9.0, 8.0, 4.0, 6.0, 5.0], peak=6600.0)
    text = table.markdown([peer, fast, slow])
    assert cells(text, "train, cpu s") == ["9 (8 - 10)", "2.5 (2 - 3)", "5 (4 - 6)"]
    assert cells(text, "train, wall s")[0] == "4.5 (4 - 5)"
    assert cells(text, "step, cpu s")[0] == "11 (10 - 12)"
    assert cells(text, "peak RSS") == ["6000", "3000", "6600"]
    assert cells(text, "train phase") == ["1", "0.28 (met)", "0.56 (missed)"]
    assert cells(text, "whole step") == ["1", "0.41 (missed)", "0.64 (missed)"]
    assert cells(text, "peak memory") == ["1", "0.50 (met)", "1.10 (missed)"]
    # every row has a cell for every run
    assert {line.count("|") for line in text.splitlines()} == {5}


def test_reward_covers_the_warm_up_and_both_ends():
    run = make_run("trl", train=[1.0] * 12)
    assert cells(table.markdown([run]), "reward,") == ["0.20 / 0.90"]


def test_one_run_alone_has_no_ratios():
    assert "target" not in table.markdown([make_run("trl", train=[1.0] * 3)])
    ours = [make_run(label, train=[1.0] * 3) for label in ("grpo-fast-vllm", "grpo-fast-transformers")]
    assert "target" not in table.markdown(ours)


def test_prompts_are_compared_in_order():
    run = make_run("trl", train=[1.0] * 3)
    assert table.same_prompts([run, make_run("grpo-fast-vllm", train=[2.0] * 3)])
    assert not table.same_prompts([run, replace(run, steps=run.steps[::-1])])


def test_nested_phases_are_charged_once():
    child = load("main_job_child")
    clock = iter(range(100))
    child._now = lambda: (float(next(clock)), 0.0)
    probe = child.Probe()
    rewards = probe.timed(lambda: None, "rewards")
    generate = probe.timed(lambda: (rewards(), rewards()), "generation")
    probe.begin()
    probe.timed(generate, "train")()
    probe.end_step()
    # the clock advances by one at each of the eight entries and exits and once at the end
    assert probe.steps[0]["cpu_s"] == {"generation": 3, "rewards": 2, "train": 2, "weight sync": 0, "other": 2}


def test_a_method_that_raises_closes_its_phase():
    child = load("main_job_child")
    probe = child.Probe()

    def fail():
        raise RuntimeError("generation failed")

    with pytest.raises(RuntimeError, match="generation failed"):
        probe.timed(fail, "generation")()
    assert probe._stack == ["other"]


def test_the_trainer_has_every_timed_method():
    from grpo_fast import GRPOTrainer

    child = load("main_job_child")
    assert [name for name in child.PHASE_OF_METHOD if not callable(getattr(GRPOTrainer, name, None))] == []


def run_bench(*options):
    command = [sys.executable, str(BENCH / "bench_main_job.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_names_the_options():
    done = run_bench("--help")
    assert done.returncode == 0
    for option in ("--steps", "--seed", "--threads", "--out", "--only", "--gradient-checkpointing"):
        assert option in done.stdout


def test_too_few_steps_are_refused():
    done = run_bench("--steps", "2")
    assert done.returncode == 2
    assert "--steps must be more than the 2 warm-up steps, got 2" in done.stderr
