"""From results to what is printed: tables, speed-ups that only green tests let through, profiles, pytest's command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gate
from bench.comparing import absent_lines, by_case, entries_of, speed_ups, table
from bench.ops import OPS
from bench.profile import main as profile
from bench.profile import ncu_command

ROOT = Path(__file__).resolve().parents[1]


def benchmark(label, seconds, *, peak=100.0, op="training", clock="CPU seconds, 1 thread(s)", **info):
    """As pytest-benchmark writes it, of a floor of one second."""
    return {
        "stats": {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds},
        "extra_info": {
            "op": op,
            "shape": "SmolLM2-135M/512",
            "dtype": "bf16",
            "data": "peaked",
            "label": label,
            "is_ours": label.startswith("ours"),
            "flop_convention": "6NDV: all",
            "floor_seconds": 1.0,
            "share_of_floor": 1.0 / seconds,
            "tflops": 2.0 / seconds,
            "gbps": 3.0 / seconds,
            "peak_mib": peak,
            "memory_lower_bound_mib": 50.0,
            "errors": {"dhidden": 1e-3, "dweight": 2e-3},
            "clock": clock,
            "peak_source": "published: X",
            "absent": {"cce": "needs CUDA"},
            "failed": {},
            **info,
        },
    }


RESULTS = [
    benchmark("ours", 2.0),
    benchmark("ours-fused", 1.5),
    benchmark("trl", 8.0, peak=1000.0, failed={"liger": "RuntimeError: x"}),
    benchmark("floor", 1.25),
    benchmark("ours", 3.0, op="scoring"),
    {"stats": {}, "extra_info": {"kind": "a step's"}},
]


def cells(lines, label):
    (line,) = [line for line in lines if line.startswith(f"  {label} ")]
    return line.split()


def test_entries_are_compared_within_their_case():
    cases = by_case(entries_of(RESULTS))
    assert [[entry.label for entry in case] for case in cases] == [["ours", "ours-fused", "trl", "floor"], ["ours"]]


def test_table_shows_time_floor_memory_and_errors():
    lines = table(by_case(entries_of(RESULTS[2:3] + RESULTS[:2]))[0])
    assert "floor 1000 ms (6NDV: all; published: X); at least 50.0 MiB" in lines[0]
    assert cells(lines, "trl") == ["trl", "8000", "7200", "-", "8800", "4.00", "12", "%", "0.25", "0.375", "1000.0",
                                   "dweight", "2.0e-03"]  # fmt: skip
    assert cells(lines, "ours")[5:7] == ["1.00", "50"]
    assert lines[-1] == "  liger failed: RuntimeError: x"


def test_what_did_not_run_is_grouped_by_its_reason():
    absent = {"cce": "needs CUDA", "liger": "liger_kernel is not installed", "cce-exact": "needs CUDA"}
    assert absent_lines(absent) == ["cce, cce-exact (needs CUDA)", "liger (liger_kernel is not installed)"]


def test_speed_ups_are_of_peers_and_judged_by_the_targets():
    assert speed_ups(entries_of(RESULTS[:4])) == [
        "training SmolLM2-135M/512 bf16 peaked: trl / ours = 4.00 x the time (target: ours at most 0.35 of it, met), "
        "10.00 x the memory (target: ours at most 0.12 of it, met)"
    ]
    (line,) = speed_ups(entries_of([benchmark("ours", 2.0), benchmark("trl", 4.0, peak=500.0)]))
    assert "2.00 x the time (target: ours at most 0.35 of it, missed with 0.50)" in line
    assert "missed with 0.20" in line
    device = {"clock": "seconds on the device"}
    (line,) = speed_ups(entries_of([benchmark("ours", 2.0, **device), benchmark("trl", 4.0, **device)]))
    assert "(target: ours at most 0.8 of it, met)" in line


GREEN = "def test_it():\n    pass\n"
RED = "def test_it():\n    assert 1 == 2\n"


def judged(tmp_path, test, results=RESULTS, op="training"):
    file = tmp_path / "test_op.py"
    file.write_text(test)
    return gate.run({op: [str(file)]}, results=entries_of(results), options=[])


def test_a_green_op_has_its_speed_ups(tmp_path, capsys):
    assert judged(tmp_path, GREEN) == 0
    printed = capsys.readouterr().out
    assert "training: green: 1 passed" in printed
    assert "trl / ours = 4.00 x the time" in printed


def test_a_red_test_suppresses_every_figure(tmp_path, capsys):
    assert judged(tmp_path, RED) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("training: red, no figures: 1 failed")
    assert " x the " not in printed


def test_no_tests_are_not_green(tmp_path, capsys):
    assert judged(tmp_path, "") == 1
    assert " x the " not in capsys.readouterr().out


def test_a_case_without_ours_is_not_green(tmp_path, capsys):
    assert judged(tmp_path, GREEN, RESULTS[2:4]) == 1
    assert judged(tmp_path, GREEN, RESULTS[:4], op="attention") == 1
    assert capsys.readouterr().out.count("ours has no figure") == 2


def test_a_bench_that_cannot_run_has_no_figures(tmp_path, capsys, monkeypatch):
    file = tmp_path / "test_op.py"
    file.write_text(GREEN)
    # pytest's code for wrong options
    monkeypatch.setattr(gate, "bench_command", lambda *args: [sys.executable, "-c", "raise SystemExit(4)"])
    assert gate.run({"training": [str(file)]}, results=None, options=[]) == 1
    assert "its bench failed: no figures" in capsys.readouterr().out


@pytest.mark.parametrize(("measured", "here"), [("abc", "def"), ("abc", None), ("abc-dirty", "abc-dirty"), (None, "a")])
def test_figures_of_other_code_are_refused(measured, here):
    with pytest.raises(ValueError, match="results must be of this commit without changes"):
        gate.check_commit({"machine": {"commit": measured}}, here)
    gate.check_commit({"machine": {"commit": "abc"}}, "abc")


def test_the_gates_commands(capsys):
    assert gate.main(["training-frozen", "--dry", "--", "--variant", "ours"]) == 0
    tests, bench = capsys.readouterr().out.splitlines()
    assert all(file in tests for file in OPS["training-frozen"].tests)
    assert "bench_training.py::bench_training_frozen --benchmark-json=RESULTS.json --variant ours" in bench
    with pytest.raises(SystemExit):
        gate.main(["training", "sorting"])
    assert "op must be one of" in capsys.readouterr().err


def test_a_profile_is_a_trace_with_named_steps_and_the_counters_command(tmp_path, capsys):
    profile(["policy-loss", "--shape", "tokens/64", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "aten::exp" in printed
    assert "Counters: ncu --clock-control none --nvtx --nvtx-include policy_loss_ours --metrics" in printed
    assert "Not run: " in printed
    events = json.loads((tmp_path / "policy-loss-tokens-64-fp32-spread-ours.json").read_text())["traceEvents"]
    spans = {"policy_loss_ours": [], "aten::exp": []}
    for event in events:
        if event.get("ph") == "X" and event["name"] in spans and event.get("cat") != "user_annotation_gpu":
            spans[event["name"]].append((event["ts"], event["ts"] + event["dur"]))
    steps = spans["policy_loss_ours"]
    assert len(steps) == 3
    # the warm-up is not in it; the profiler's clocks agree to some us
    assert all(any(a - 100 <= start and end <= b + 100 for a, b in steps) for start, end in spans["aten::exp"])


def test_what_ncu_watches_runs_bare(capsys):
    op = OPS["policy-loss"]
    command = ncu_command(op, op.case("tokens/64"), "ours")
    assert command[command.index("-m") + 1 : command.index("-m") + 3] == ["bench.profile", "policy-loss"]
    profile(command[command.index("-m") + 2 :])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training", "--shape", "GPT-5/8"], "--shape must be MODEL/TOKENS"),
        (["training", "--variant", "theirs"], "--variant must be one of ours"),
        (["training", "--variant", "cce"], "--variant cce cannot run here: "),
    ],
)
def test_a_profile_of_what_does_not_exist_is_refused(options, message, capsys):
    if "cce" in options and torch.cuda.is_available():
        pytest.skip("runs there if it is installed")
    with pytest.raises(SystemExit):
        profile(options)
    assert message in capsys.readouterr().err


def test_one_command_checks_times_and_writes(tmp_path):
    out = tmp_path / "results.json"
    files = [f"bench/bench_{name}.py" for name in ("training", "policy_loss", "attention")]
    shapes = ["--shape", "SmolLM2-135M/8", "--shape", "tokens/64", "--dtype", "fp32", "--rounds", "2"]
    variants = ["--variant", "ours", "--variant", "logits", "--variant", "cce", "--variant", "padded-sdpa"]
    options = ["-q", "-p", "no:cacheprovider", "--device", "cpu", f"--benchmark-json={out}"]
    command = [sys.executable, "-m", "pytest", *files, *shapes, *variants, *options]
    # pytest-benchmark measures nothing where it sees that tests run side by side
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "cce-exact (needs CUDA)" in done.stdout
    record = json.loads(out.read_text())
    assert {"commit", "cpu", "versions", "date"} <= record["machine"].keys()
    found = {(each["extra_info"]["op"], each["extra_info"]["label"]): each for each in record["benchmarks"]}
    heads = [(op, label) for op in ("training", "training-frozen") for label in ("ours", "logits")]
    assert found.keys() == {*heads, ("policy-loss", "ours"), ("attention", "ours"), ("attention", "padded-sdpa")}
    ours = found["training", "ours"]
    assert ours["group"] == "training SmolLM2-135M/8-fp32-peaked"
    assert ours["fullname"] == "bench/bench_training.py::bench_training[SmolLM2-135M/8-fp32-peaked-ours]"
    assert len(ours["stats"]["data"]) == 2
    info = ours["extra_info"]
    assert info["flops"] == 6 * 8 * 576 * 49152
    assert info["share_of_floor"] == pytest.approx(info["floor_seconds"] / ours["stats"]["median"])
    assert info["tflops"] == pytest.approx(info["flops"] / ours["stats"]["median"] / 1e12)
    assert info["gbps"] == pytest.approx(info["bytes"] / ours["stats"]["median"] / 1e9)
    # the gradients are in it
    assert info["peak_mib"] > info["memory_lower_bound_mib"] > 100
    assert info["absent"]["cce"] == "needs CUDA"
    assert max(info["errors"].values()) < 1e-4
