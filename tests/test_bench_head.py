"""The LM head's bench: its data, its truth, every provider against it, and its parts."""

import json
import sys

import pytest
import torch

from bench import bench_tiles as tiles
from bench import head_providers as providers
from bench.provider import why_not

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
    pytest.param(provider, id=f"{kind}-{provider.label}")
    for kind, table in (("training", providers.TRAINING), ("scoring", providers.SCORING))
    for provider in table.values()
    if not provider.is_floor and why_not(provider, has_cuda=False, asked=table) is None
]


@pytest.fixture
def no_compilation(monkeypatch):
    # Liger compiles its loss, which takes longer than all the rest
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    providers._compiled.cache_clear()
    yield
    providers._compiled.cache_clear()


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("provider", RUNNABLE)
def test_every_provider_does_the_same_work(provider, is_frozen):
    if is_frozen and provider.accumulates:
        pytest.skip("a frozen head has no gradient")
    problem = make_problem(is_frozen=is_frozen)
    providers.clear(problem, provider)
    logps = provider.step(problem)
    assert (problem.hidden.grad is not None) == provider.trains
    assert (problem.weight.grad is not None) == (provider.trains and not is_frozen)
    found = providers.errors(problem, logps)
    expected = {"dhidden": provider.trains, "dweight": provider.trains and not is_frozen}
    assert {name for name in ("dhidden", "dweight") if name in found} == {n for n, is_in in expected.items() if is_in}
    assert max(found.values()) < FP32 * 10


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("provider", RUNNABLE)
def test_autocast_reaches_every_provider(provider):
    results = {}
    for dtype in ("fp32", "autocast"):
        problem = make_problem(dtype=dtype)
        providers.clear(problem, provider)
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


def test_tiles_are_timed_without_a_gpu(capsys, monkeypatch, tmp_path):
    out = tmp_path / "tiles.json"
    sizes = {"rows": 32, "depths": 16, "columns": 48, "vocab": 100, "repeats": 1, "device": "cpu", "out": out}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["bench_tiles.py", "products", "passes", "fused", *options])
    tiles.main()
    lines = json.loads(out.read_text())["lines"]
    names = {line["what"] for line in lines}
    assert {"dW += , fp32", "target_logits", "scoring: product + exp_tile_", "keeping: product + exp_tile_"} <= names
    assert any(name.startswith("keeping: F ") for name in names)
    assert all(line["ms"] > 0 for line in lines)
    assert capsys.readouterr().out.count("TFLOP/s") >= 8


def test_rates_are_amounts_over_time():
    sizes = {"R": 1, "D": 1, "V": 1, "C": 1}
    assert tiles.Line("product", **sizes, ms=2.0, amount=4e12, unit="TFLOP/s").rate == 2000
    assert tiles.Line("pass", **sizes, ms=2.0, amount=4e9, unit="GB/s").rate == 2000
