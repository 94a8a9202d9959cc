"""How far the sampler is from the trainer: the formulas in float64, however rows are packed, split or spread."""

import json
import math

import numpy as np
import pytest
import torch

from grpo_fast.importance import mismatch_metrics
from tests.mismatch_runs import log_ratios, run, sampler_lines
from tests.processes import launch

DIFFERENCE, RATIO = "sampling/sampling_logp_difference/", "sampling/importance_sampling_ratio/"
# the same float64 sums in another order
RTOL = 1e-12
# log-probs of an fp32 model, packed, against a float64 one row by row
MODEL_RTOL = 2e-5
# of one fp32 model, whose rows are summed in another order
LAYOUT_RTOL = 2e-5
# TRL's means of the processes' means, which depend on who has which rows
PER_PROCESS = (DIFFERENCE + "mean", RATIO + "mean")


def formulas(values):
    """Of reported log-ratios, as the definitions have it. Float64 numpy."""
    ratios = np.exp(values)
    return {
        DIFFERENCE + "mean": np.abs(values).mean(),
        DIFFERENCE + "max": np.abs(values).max(),
        DIFFERENCE + "p99": np.percentile(np.abs(values), 99),
        "sampling/effective_sample_size": ratios.sum() ** 2 / (len(values) * (ratios**2).sum()),
        "sampling/kl_sampler_trainer": (ratios - 1 - values).mean(),
        "sampling/kl_trainer_sampler": (ratios * values - ratios + 1).mean(),
    }


# -- the formulas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 102, 1000, 4321])
def test_formulas(n):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    reported = values.clone()
    # any places: the others are left out, not counted as no difference
    padded = torch.full((1, n + 7), torch.nan)
    padded[0, torch.randperm(n + 7, generator=torch.Generator().manual_seed(1))[:n]] = reported
    assert mismatch_metrics(padded) == pytest.approx(formulas(values.double().numpy()), rel=RTOL)


def test_processes_are_pooled_but_for_the_mean():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    padded = torch.full((3, 20), torch.nan)
    # one process has no tokens
    padded[0, :10], padded[2, :20] = values[:10], values[10:]
    expected = formulas(values.double().numpy())
    expected[DIFFERENCE + "mean"] = (values[:10].abs().double().mean() + values[10:].abs().double().mean()).item() / 3
    assert mismatch_metrics(padded) == pytest.approx(expected, rel=RTOL)


def test_small_and_large_log_ratios_lose_nothing():
    small = torch.tensor([1e-5, -3e-5, 2e-6])
    metrics = mismatch_metrics(small[None])
    # both KLs are x^2 / 2 up to a term of x^3; expm1 in float64 keeps 1e-16 of x = 1e-5, 1e-6 of x^2
    half_square = (small.double() ** 2 / 2).mean().item()
    for name in ("sampling/kl_sampler_trainer", "sampling/kl_trainer_sampler"):
        assert metrics[name] == pytest.approx(half_square, rel=1e-4)
    # exp of either would leave float64
    metrics = mismatch_metrics(torch.tensor([[1000.0, 1000.0, -1000.0, -1000.0]]))
    assert metrics["sampling/effective_sample_size"] == pytest.approx(0.5)


def test_no_log_prob_reported():
    metrics = mismatch_metrics(torch.full((2, 3), torch.nan))
    assert metrics.pop(DIFFERENCE + "mean") == metrics.pop(DIFFERENCE + "max") == 0
    assert len(metrics) == 4
    assert all(map(math.isnan, metrics.values()))


# -- in the trainer ----------------------------------------------------------------------------------------------------

MANY_PACKS = {"max_tokens_per_pack": 12, "share_prompts": "never"}
MICRO_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens_per_pack": 12}
LAYOUTS = {
    "one pack": {},
    "packs": MANY_PACKS,
    "micro-batches": MICRO_BATCHES,
    # the old policy is scored, and the sampler weighed, before the loss pass
    "beforehand": {"num_iterations": 2},
    "beforehand, micro-batches": MICRO_BATCHES | {"num_iterations": 2},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


def with_weights(rows):
    """The formulas of rows, and the mean weight of rows before any bound."""
    values = torch.cat(rows)
    products = [row.nansum().exp().item() for row in rows]
    expected = formulas(values[~values.isnan()].numpy())
    return expected | {RATIO + "unclipped_mean": sum(products) / len(products)}


@pytest.mark.parametrize("settings", LAYOUTS.values(), ids=LAYOUTS)
def test_logged_metrics_are_the_formulas_in_any_layout(tmp_path, plain, settings):
    trainer = run(tmp_path, **settings) if settings else plain
    line, *later = sampler_lines(trainer)
    rows = log_ratios(trainer, num_rows=8)
    for name, value in with_weights(rows).items():
        assert line[name] == pytest.approx(value, rel=MODEL_RTOL), name
    assert any(row.isnan().any() for row in rows)
    # what the bounds hide
    assert line[RATIO + "mean"] < line[RATIO + "unclipped_mean"] / 2
    if "num_iterations" in settings:
        assert later == [{}], "the generation is compared once"
    else:
        assert later == [pytest.approx(sampler_lines(plain)[1], rel=LAYOUT_RTOL)]
        assert later[0] != line


def test_two_processes_pool_their_tokens(tmp_path, plain):
    launch("-m", "tests.mismatch_runs", tmp_path / "out.json")
    of_two, of_one = json.loads((tmp_path / "out.json").read_text()), sampler_lines(plain)
    assert len(of_two) == 2
    for line, expected in zip(of_two, of_one, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - set(PER_PROCESS):
            assert line[name] == pytest.approx(expected[name], rel=LAYOUT_RTOL), name


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=["loss pass", "beforehand"])
def test_without_a_correction_the_sampler_is_compared_and_not_weighed(tmp_path, settings):
    trainer = run(tmp_path, corrects=False, **settings)
    line = sampler_lines(trainer)[0]
    assert len(trainer.checked) == (1 if settings else 2), "a generation is compared once"
    values = torch.cat(log_ratios(trainer, num_rows=8))
    assert line == pytest.approx(formulas(values[~values.isnan()].numpy()), rel=MODEL_RTOL)


def test_the_seam_gets_each_training_steps_metrics_before_the_optimizer(tmp_path, plain):
    assert plain.checked == sampler_lines(plain)
    trainer = run(tmp_path, max_steps=1, **MICRO_BATCHES)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert len(trainer.checked) == 1, "one call for all micro-batches"

    def stop(metrics):
        raise RuntimeError(f"off by {metrics[DIFFERENCE + 'mean']:.2f}")

    trainer._check_sampler_agreement = stop
    with pytest.raises(RuntimeError, match=r"off by \d"):
        trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert torch.equal(before, after), "the optimizer stepped first"
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    evaluated = trainer.state.log_history[-1]
    assert evaluated["eval_" + DIFFERENCE + "p99"] > 0
