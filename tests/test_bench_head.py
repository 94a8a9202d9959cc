"""The LM head's bench: its data, its truth, every provider against it, and its table."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench import bench_tiles as tiles
from bench import head_child as child
from bench import head_providers as providers
from bench import head_table as table

SIZES = {"N": 48, "D": 32, "V": 700}

# fp32 sums of 700 terms
FP32 = 2e-6


def make_problem(*, dtype="fp32", data="peaked", **options):
    return providers.make_problem(**SIZES, dtype=dtype, data=data, device="cpu", **options)


@pytest.mark.parametrize("V", [49152, 8192])
def test_peaked_hidden_states_predict_their_targets(V):
    problem = providers.make_problem(256, 256, V, dtype="fp32", data="peaked", device="cpu")
    nll = -providers.Exact.of(problem).logps.mean()
    # what a policy that samples its own tokens has
    assert 0.1 < nll < 0.6


def test_random_hidden_states_do_not():
    nll = -providers.Exact.of(make_problem(data="random")).logps.mean()
    # log 700 plus half the logits' variance
    assert 6.0 < nll < 8.0


def test_lengths_that_are_no_eight_sequences_are_refused():
    with pytest.raises(ValueError, match="N must be a multiple of 8, got 20"):
        providers.make_problem(20, 32, 700, dtype="fp32", data="peaked", device="cpu")


@pytest.mark.parametrize("dtype", ["fp32", "autocast"])
def test_the_truth_is_autograds(dtype):
    problem = make_problem(dtype=dtype)
    operand = torch.bfloat16 if dtype == "autocast" else torch.float32
    hidden = problem.hidden.detach().to(operand).double().requires_grad_()
    weight = problem.weight.detach().to(operand).double().requires_grad_()
    rows = torch.arange(SIZES["N"])
    logps = torch.log_softmax(hidden @ weight.t(), -1)[rows, problem.targets]
    providers.clipped_loss(logps, problem.token_advantages.double()).backward()
    exact = providers.Exact.of(problem)
    for found, truth in ((exact.logps, logps), (exact.dhidden, hidden.grad), (exact.dweight, weight.grad)):
        torch.testing.assert_close(found, truth.detach(), rtol=1e-9, atol=1e-12)


RUNNABLE = [
    provider
    for provider in providers.PROVIDERS.values()
    if not provider.is_floor and providers.why_not(provider, has_cuda=False, is_frozen=False) is None
]


@pytest.fixture
def no_compilation(monkeypatch):
    # Liger compiles its loss, which takes longer than all the rest
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("provider", RUNNABLE, ids=lambda provider: provider.label)
def test_every_provider_does_the_same_work(provider, is_frozen):
    if is_frozen and provider.accumulates:
        pytest.skip("a frozen head has no gradient")
    problem = make_problem(is_frozen=is_frozen)
    child._clear(problem, provider)
    logps = provider.step(problem)
    assert (problem.hidden.grad is not None) == provider.trains
    assert (problem.weight.grad is not None) == (provider.trains and not is_frozen)
    found = providers.errors(problem, logps)
    expected = {"dhidden": provider.trains, "dweight": provider.trains and not is_frozen}
    assert {name for name in ("dhidden", "dweight") if name in found} == {n for n, is_in in expected.items() if is_in}
    assert max(found.values()) < FP32 * 10


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("provider", RUNNABLE, ids=lambda provider: provider.label)
def test_autocast_reaches_every_provider(provider):
    results = {}
    for dtype in ("fp32", "autocast"):
        problem = make_problem(dtype=dtype)
        child._clear(problem, provider)
        logps = provider.step(problem)
        results[dtype] = problem.hidden.grad if provider.trains else logps
    # bf16 logits up to 10 have steps of 1/16
    assert max(providers.errors(problem, logps).values()) < 0.05
    moved = (results["autocast"] - results["fp32"]).norm() / results["fp32"].norm()
    assert moved > 1e-4


def test_an_error_is_found():
    problem = make_problem()
    exact = providers.Exact.of(problem)
    problem.hidden.grad = (exact.dhidden * 1.01).float()
    problem.weight.grad = exact.dweight.float()
    logps = exact.logps.float()
    logps[3] += 0.5
    found = providers.errors(problem, logps)
    assert found["dhidden"] == pytest.approx(0.01, rel=1e-3)
    assert found["dweight"] < FP32
    assert found["logps_max"] == pytest.approx(0.5, rel=1e-4)


def test_extra_memory_is_the_peak_above_the_start():
    before = torch.ones(32 << 18)
    memory = child.Memory(on_cuda=False)
    after = torch.ones(64 << 18)
    del after
    # MiB; small allocations come and go beside it
    assert 63 < memory.extra_mib() < 72
    assert child.Memory(on_cuda=False).extra_mib() < 8
    assert before.sum() > 0


def make_run(label, *seconds, extra=100.0, errors=None):
    return child.Run(
        label=label,
        cpu_s=list(seconds),
        wall_s=[10 * each for each in seconds],
        extra_mib=extra,
        device="cpu",
        threads=1,
        errors=errors or {},
    )


def make_result(*runs, **options):
    fields = {"shape": (1000, 1000, 1000), "dtype": "bf16", "data": "peaked", "device": "cpu", "is_frozen": False}
    return table.Result(**{**fields, **options}, runs=list(runs), failures={})


def cells(text, row):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_medians_are_of_all_iterations_of_all_processes():
    result = make_result(make_run("ours", 1.0, 9.0), make_run("trl", 10.0), make_run("ours", 2.0), make_run("trl", 6.0))
    assert result.seconds("ours") == [1.0, 9.0, 2.0]
    assert result.ratio("ours", "trl") == 2.0 / 8.0
    # 6e9 operations in 2 s
    assert result.tera_per_s("ours", 6) == pytest.approx(0.003)


def test_on_cuda_the_wall_clock_counts():
    result = make_result(make_run("ours", 1.0), device="cuda")
    assert result.seconds("ours") == [10.0]


def test_table_shows_ratios_floor_and_errors():
    errors = {"logps_max": 1e-6, "logps_mean": 1e-7, "dhidden": 2e-3, "dweight": 3e-3}
    text = table.markdown(
        make_result(
            make_run("ours", 2.0, errors=errors),
            make_run("trl", 8.0, extra=1000.0),
            make_run("floor", 1.0),
            make_run("ours-scoring", 0.5),
        )
    )
    assert cells(text, "ours") == [
        "2 (2 - 2)", "0.25", "0.003", "0.004", "50 %", "100", "1.0e-06 (1.0e-07)", "2.0e-03", "3.0e-03"
    ]  # fmt: skip
    assert cells(text, "trl")[1:5] == ["1.00", "0.00075", "0.001", "12 %"]
    assert cells(text, "ours-scoring")[1:3] == ["0.004", ""]
    assert "share of the 6NDV floor" in text
    assert "TFLOP/s of 8NDV" in text


def test_targets_are_judged():
    ours, liger = make_run("ours", 2.0, extra=100.0), make_run("liger", 1.9)
    result = make_result(ours, make_run("trl", 8.0, extra=1000.0), liger)
    assert table.targets(result) == [
        "ours / trl: time 0.25 (target <= 0.35: met), memory 0.10 (target <= 0.12: met)",
        "ours / liger: time 1.05 (target <= 1.0: missed)",
    ]
    lines = table.targets(replace(result, device="cuda"))
    assert lines[0] == "ours / trl: time 0.25 (target <= 0.8: met), memory 0.10 (target <= 1.0: met)"
    assert lines[1].startswith("ours / liger: time 1.05 (target <= 0.8: missed)")


def test_a_frozen_head_needs_fewer_products():
    text = table.markdown(make_result(make_run("ours", 2.0), is_frozen=True))
    assert "TFLOP/s of 4NDV" in text
    assert "share of the 4NDV floor" in text


def test_failures_are_told():
    result = replace(make_result(make_run("trl", 1.0)), failures={"liger": "OutOfMemoryError: 9 GiB"})
    assert "liger failed: OutOfMemoryError: 9 GiB" in table.markdown(result)


def run_bench(script, *options):
    command = [sys.executable, "-m", f"bench.{script}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_command_measures_and_writes(tmp_path):
    out = tmp_path / "head.json"
    options = ("--shape", "64,32,700", "--dtype", "fp32", "--repeats", "1", "--device", "cpu", "--out", str(out))
    done = run_bench("bench_head", *options, "--only", "logits", "--only", "floor", "--only", "cce")
    assert done.returncode == 0, done.stderr
    assert len(cells(done.stdout, "logits")) == 9
    assert "Not run: cce (needs CUDA)." in done.stdout
    record = load_json(out)
    assert record["absent"] == {"logits": None, "floor": None, "cce": "needs CUDA"}
    (result,) = record["results"]
    assert [run["label"] for run in result["runs"]] == ["logits", "floor"]
    assert result["runs"][0]["errors"]["dweight"] < FP32 * 10
    assert {"commit", "cpu", "versions", "date"} <= record.keys()


def load_json(path):
    import json

    return json.loads(path.read_text())


def test_a_provider_that_fails_does_not_stop_the_others():
    # 20 rows are no 8 sequences
    options = ("--shape", "20,32,700", "--dtype", "fp32", "--repeats", "2", "--device", "cpu", "--only", "floor")
    done = run_bench("bench_head", *options)
    assert done.returncode == 0
    assert "floor failed: ValueError: N must be a multiple of 8, got 20" in done.stdout


def test_tiles_are_timed_without_a_gpu(capsys, monkeypatch, tmp_path):
    out = tmp_path / "tiles.json"
    sizes = {"rows": 32, "depths": 16, "columns": 48, "vocab": 100, "repeats": 1, "device": "cpu", "out": out}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["bench_tiles.py", "products", "passes", "fused", *options])
    tiles.main()
    lines = load_json(out)["lines"]
    names = {line["what"] for line in lines}
    assert {"dW += , fp32", "target_logits", "scoring: product + exp_tile_", "keeping: product + exp_tile_"} <= names
    assert any(name.startswith("keeping: F ") for name in names)
    assert all(line["ms"] > 0 for line in lines)
    assert capsys.readouterr().out.count("TFLOP/s") >= 8


def test_rates_are_amounts_over_time():
    sizes = {"R": 1, "D": 1, "V": 1, "C": 1}
    assert tiles.Line("product", **sizes, ms=2.0, amount=4e12, unit="TFLOP/s").rate == 2000
    assert tiles.Line("pass", **sizes, ms=2.0, amount=4e9, unit="GB/s").rate == 2000
