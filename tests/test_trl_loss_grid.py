"""The loss grid: one padded dict into TRL 1.16's `_compute_loss` and into ours; loss, gradients, metrics."""

import dataclasses
import itertools
import math

import pytest
import torch

from tests.trl_grid import B, C, Case, loss_and_gradients, make_inputs, make_trainer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.trl

# fp32; TRL counts positions from the left padding, we from 0, which rotates otherwise rounded queries and keys
CLOSE = 1e-5
# exp of three times a sum over the row's log-probs
CLOSE_VESPO = 3e-5

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
MODES = (None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# steps_per_generation, accumulation, old log-probs given (generations that feed several steps, or several passes)
SCHEDULES = ((1, 1, False), (2, 2, True), (4, 2, True))


def grid():
    for loss_type, level, beta, mode in itertools.product(LOSS_TYPES, LEVELS, (0.0, 0.1), MODES):
        if loss_type == "vespo" and mode is not None and mode.startswith("sequence"):
            continue  # refused by both
        for masks_truncated, has_tool_mask, schedule in itertools.product((False, True), (False, True), SCHEDULES):
            steps, accumulation, has_old = schedule
            yield Case(
                loss_type=loss_type,
                importance_sampling_level=level,
                beta=beta,
                importance_mode=mode,
                masks_truncated=masks_truncated,
                has_tool_mask=has_tool_mask,
                steps_per_generation=steps,
                accumulation=accumulation,
                has_old=has_old,
            )


EXTRAS = (
    {"delta": 1.1},
    {"beta": 0.2, "use_bias_correction_kl": False},
    {"temperature": 0.7},
    {"off_policy_mask_threshold": 0.02},
    {"off_policy_mask_threshold": 0.02, "importance_mode": "token_mask"},
    {"top_entropy_quantile": 0.4},
    {"entropy_coef": 0.1, "accumulation": 3},
    {"entropy_coef": 0.1, "top_entropy_quantile": 0.4, "has_tool_mask": True},
    {"has_token_advantages": True},
    {"has_token_advantages": True, "has_tool_mask": True, "beta": 0.1},
    {"masks_everything": True},
    {"masks_everything": True, "beta": 0.1, "entropy_coef": 0.1, "importance_mode": "token_truncate"},
    {"is_training": False, "beta": 0.1, "accumulation": 3, "steps_per_generation": 3},
)


def extras():
    for loss_type, level, extra in itertools.product(LOSS_TYPES, LEVELS, EXTRAS):
        if "delta" in extra and loss_type in ("cispo", "sapo", "vespo"):
            continue  # TRL does not read it there, and `GRPOConfig` refuses it
        yield Case(loss_type=loss_type, importance_sampling_level=level, **extra)


CASES = [*grid(), *extras()]
# every option at least once in `make test`; 29 is prime to the lengths of the products
SAMPLE = CASES[::29] + list(extras())[::5]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    import grpo_fast

    # several packs, of which one shares a prompt
    ours = make_trainer(grpo_fast, folder, max_tokens_per_pack=14)
    return make_trainer(trl, folder), ours


@pytest.fixture(scope="module")
def logps(trainers):
    """Log-probs of the grid's completions, at the temperatures it uses."""
    out = {}
    for temperature in (1.0, 0.7):
        case = Case(temperature=temperature)
        inputs = make_inputs(case, torch.zeros(B, C))
        trainers[1].temperature = temperature
        with torch.no_grad():
            out[temperature] = trainers[1]._get_per_token_logps_and_entropies(
                trainers[1].model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                C,
            )[0]
    return out


def compare(trainers, logps, case, *, drops=()):
    inputs = make_inputs(case, logps[case.temperature])
    if case.temperature != getattr(trainers[0], "head_temperature", 1.0):
        # TRL's head takes its temperature when it is built
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(trainers[0].model, temperature=case.temperature, outputs=("log_probs", "entropy"))
        trainers[0].head_temperature = case.temperature
    loss_theirs, gradients_theirs, metrics_theirs = loss_and_gradients(trainers[0], case, inputs)
    ours = {name: value for name, value in inputs.items() if name not in drops}
    loss_ours, gradients_ours, metrics_ours = loss_and_gradients(trainers[1], case, ours)

    close = CLOSE_VESPO if case.loss_type == "vespo" else CLOSE
    assert loss_ours.item() == pytest.approx(loss_theirs.item(), rel=close, abs=1e-6)
    error = (gradients_ours - gradients_theirs).norm()
    assert error <= close * gradients_theirs.norm() + 1e-7, error / gradients_theirs.norm()
    same = {name: value for name, value in metrics_ours.items() if not name.startswith("sampling/")}
    assert same.keys() == metrics_theirs.keys()
    for name, value in metrics_theirs.items():
        if math.isnan(value):
            assert math.isnan(same[name]), name
        else:
            assert same[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_sample_of_the_grid(trainers, logps, case):
    compare(trainers, logps, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_grid(trainers, logps, case):
    compare(trainers, logps, case)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
def test_sampler_weights_of_the_loss_pass_are_those_of_a_scoring_pass(trainers, logps, loss_type, mode):
    """An aligned run gets no old log-probs and no ratio: TRL's, scored apart, must come out."""
    case = Case(loss_type=loss_type, importance_mode=mode, has_old=True, masks_truncated=True)
    trainers[1].vllm_importance_sampling_clip_min, trainers[1].vllm_importance_sampling_clip_max = 0.8, 1.25
    exact = dataclasses.replace(case, has_old=False)
    inputs = make_inputs(exact, logps[1.0])
    inputs_theirs = inputs | {"old_per_token_logps": logps[1.0]}
    loss_theirs, gradients_theirs, _ = loss_and_gradients(trainers[0], exact, inputs_theirs)
    del inputs["importance_sampling_ratio"]
    loss_ours, gradients_ours, _ = loss_and_gradients(trainers[1], exact, inputs)
    assert loss_ours.item() == pytest.approx(loss_theirs.item(), rel=CLOSE, abs=1e-6)
    assert (gradients_ours - gradients_theirs).norm() <= CLOSE * gradients_theirs.norm() + 1e-7
