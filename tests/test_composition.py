"""Everything composes: every two settings meet in a run whose losses and gradients are the padded float64 oracle's."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.composition_cases import CASES, FACTORS, UNCLIPPED, WITH_AUX_LOSS, Case
from tests.composition_runs import Run, Weights, run
from tests.composition_truth import Oracle
from tests.pairwise import pairs_of
from tests.processes import launch

# fp32 against float64: of a gradient's norm, and of the loss's terms, which may cancel
CLOSE = 1e-5
# sums over a row's log-probs in exponents, times three
CLOSE_VESPO = 3e-5
# of the norm of all gradients: a parameter's own may be the rest of terms that cancel
CLOSE_ALL = 1e-6
# where all of a case's gradients are the rest of such terms: as far off as plain PyTorch in fp32, padded, with the luck
# of another order of sums
LUCK = 4

IMPOSSIBLE = (
    # the config refuses them
    *({"loss_type": "vespo", "importance_mode": mode} for mode in ("sequence_truncate", "sequence_mask")),
    *({"loss_type": loss_type, "delta": 1.1} for loss_type in UNCLIPPED),
    # nothing to correct with
    *({"importance_mode": mode, "reports_logps": False} for mode in FACTORS["importance_mode"] if mode),
    # transformers loses the auxiliary loss's gradient, in TRL, too
    {"model": WITH_AUX_LOSS, "checkpointing": "reentrant"},
    {"processes": 1, "has_silent_process": True},
    # a window of one micro-batch has no half, and cannot be short
    *({"generation": kind, "accumulation": 1} for kind in ("shorter", "short last window")),
    # windows straddle generations; later passes follow a step
    {"generation": "longer", "is_off_policy": False},
    {"num_iterations": 3, "is_off_policy": False},
)


def assert_true(case: Case, runs: list[Run]) -> None:
    """Every optimizer step of a run against the oracle."""
    oracle, plain = Oracle(case, runs), None
    close = CLOSE_VESPO if case.loss_type == "vespo" else CLOSE
    norms = []
    for i in range(len(runs[0].steps)):
        truth = oracle.step(i)
        norms.append(norm(truth.gradients))
        for step in (process.steps[i] for process in runs):
            assert step.loss is not None
            assert abs(step.loss - truth.loss) <= close * truth.size + 1e-9, f"step {i}: loss"
            far = far_gradients(truth.gradients, step.gradients, close)
            if far:
                plain = plain or Oracle(case, runs, dtype=torch.float32)
                rounded = plain.step(i).gradients
                allowed = {name: LUCK * (rounded[name] - truth.gradients[name]).norm().item() for name in far}
                worse = {name: (error, allowed[name]) for name, error in far.items() if error > allowed[name]}
                assert not worse, f"step {i}: gradients' errors, and what fp32 explains"
    assert max(norms) > 0.01, "nothing to compare"


def far_gradients(truth: Weights, gradients: Weights, close: float) -> dict[str, float]:
    """Norms of the errors that are not small."""
    assert gradients.keys() == truth.keys()
    errors = {name: (gradients[name] - expected).norm().item() for name, expected in truth.items()}
    total = norm(truth)
    return {name: e for name, e in errors.items() if e > close * truth[name].norm().item() + CLOSE_ALL * total}


def norm(gradients: Weights) -> float:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def cases_of(processes: int) -> list:
    cases = [case for case in CASES if case.processes == processes]
    return [pytest.param(case, id=f"{CASES.index(case)}-{case.loss_type}-{case.model}") for case in cases]


@pytest.mark.parametrize("case", cases_of(1))
def test_one_process(tmp_path, case):
    assert_true(case, [run(case, tmp_path)])


@pytest.fixture(scope="module")
def runs_of_two(tmp_path_factory):
    """The runs of both processes, by the case's name."""
    folder = tmp_path_factory.mktemp("processes")
    launch("-m", "tests.composition_of_processes", folder)
    first, second = (torch.load(folder / str(rank), weights_only=False) for rank in range(2))
    return {name: [first[name], second[name]] for name in first}


@pytest.mark.parametrize("case", cases_of(2))
def test_two_processes(runs_of_two, case):
    assert_true(case, runs_of_two[case.name])


def test_every_two_settings_meet():
    met = {pair for case in CASES for pair in pairs_of({name: getattr(case, name) for name in FACTORS})}
    every = {
        frozenset({name: level, other: other_level}.items())
        for (name, levels), (other, other_levels) in itertools.combinations(FACTORS.items(), 2)
        for level, other_level in itertools.product(levels, other_levels)
    }
    assert every - met == {frozenset(pair.items()) for pair in IMPOSSIBLE}
