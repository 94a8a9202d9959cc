"""Rollouts at the edge of what occurs: TRL 1.16's numbers where it has any, the formula's where it fails."""

import math

import pytest
import torch

import grpo_fast
from tests.tiny_lm import make_tokenizer
from tests.trl_grid import Case, loss_and_gradients, make_trainer
from tests.trl_runs import Script, assert_same, digits_reward, run

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.trl

# fp32, as in the loss grid
CLOSE = 1e-5
EOS = 1
STEPS = {"max_steps": 2}


def same(tmp_path, script):
    """Both runs, compared; returns TRL's."""
    theirs = run(trl, script, tmp_path)
    assert_same(run(grpo_fast, script, tmp_path), theirs)
    return theirs


def written(texts, *, ends=True):
    """A sampler that writes `texts` in turn; `ends` says whether they have an end token."""
    ids = [row + [EOS] * ends for row in make_tokenizer()(list(texts))["input_ids"]]
    return lambda prompt_ids: ([ids[i % len(ids)] for i in range(len(prompt_ids))], None)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    return make_trainer(trl, folder), make_trainer(grpo_fast, folder)


def play(trainer, completions):
    """Let the trainer draw `completions`, of which later ones are better."""
    trainer._generate_single_turn = lambda *args, **kwargs: (completions, None)
    trainer.reward_funcs[0] = lambda completions, **kwargs: [float(i) for i in range(len(completions))]


# -- rewards -----------------------------------------------------------------------------------------------------------

# seven, so that the groups of a batch of 8 get different ones
TEXTS = ("", "3", "12a", "abcd", "45", "x0x0x", "7")


def nothing_reward(completions, **kwargs):
    return [None] * len(completions)


def picky_reward(completions, target, **kwargs):
    """Nothing for short completions, nor for any of one prompt in three."""
    return [None if t % 3 == 0 or len(text) < 2 else len(text) / 4 for text, t in zip(completions, target, strict=True)]


@pytest.mark.parametrize(
    ("rewards", "settings"),
    [
        ([picky_reward], {}),
        ([picky_reward, digits_reward], {"multi_objective_aggregation": "normalize_then_sum"}),
        ([nothing_reward], {}),
    ],
    ids=["some rows", "some rows, GDPO", "all rows"],
)
def test_rows_without_a_usable_reward(tmp_path, rewards, settings):
    theirs = same(tmp_path, Script(rewards=rewards, settings=STEPS | settings, draw=written(TEXTS)))
    assert (theirs.changes().norm() > 0) == (rewards != [nothing_reward])


@pytest.mark.parametrize("weights", [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], ids=["one", "all"])
def test_rewards_of_weight_zero(tmp_path, weights):
    theirs = same(tmp_path, Script(settings=STEPS | {"reward_weights": weights}, draw=written(TEXTS)))
    assert (theirs.changes().norm() > 0) == any(weights)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_all_rows_masked(tmp_path, loss_type):
    script = Script(
        settings=STEPS | {"mask_truncated_completions": True, "loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.1},
        draw=written(TEXTS[1:], ends=False),
    )
    assert same(tmp_path, script).changes().norm() == 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_empty_completions(trainers, loss_type, level):
    """TRL looks for the last token of an empty completion: its loss is given our rollout."""
    theirs, ours = trainers
    completions = [[5, 6, EOS], [], [7], [], [EOS], [8, 9, 10, 11]]
    rows = [{"prompt": "ab"}] * 2 + [{"prompt": "cdef"}] * 4
    for trainer in trainers:
        play(trainer, completions)
    with pytest.raises(IndexError):
        theirs._generate_and_score_completions(rows)
    inputs = ours._generate_and_score_completions(rows)
    assert inputs["completion_mask"].sum(1).tolist() == [3, 0, 1, 0, 1, 4]

    case = Case(loss_type=loss_type, importance_sampling_level=level)
    loss_theirs, gradients_theirs, metrics_theirs = loss_and_gradients(theirs, case, inputs)
    loss_ours, gradients_ours, metrics_ours = loss_and_gradients(ours, case, inputs)
    assert loss_ours.item() == pytest.approx(loss_theirs.item(), rel=CLOSE, abs=1e-6)
    assert gradients_theirs.norm() > 0.01
    assert (gradients_ours - gradients_theirs).norm() <= CLOSE * gradients_theirs.norm()
    assert metrics_ours == pytest.approx(metrics_theirs, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "luspo"])
def test_nothing_but_empty_completions(trainers, loss_type):
    _, ours = trainers
    play(ours, [[] for _ in range(6)])
    inputs = ours._generate_and_score_completions([{"prompt": "ab"}] * 6)
    loss, gradients, metrics = loss_and_gradients(ours, Case(loss_type=loss_type), inputs)
    assert loss == 0
    assert gradients.abs().max() == 0
    assert metrics["entropy"] == 0


def test_completions_of_one_token(tmp_path):
    theirs = same(tmp_path, Script(settings=STEPS | {"max_completion_length": 1, "beta": 0.1}))
    assert {len(row) for rows in theirs.completions for row in rows} == {1}


def test_prompts_much_longer_than_completions_and_than_each_other(tmp_path):
    """The shortest prompt is one token, the longest nearly the model's context."""
    prompts = ["a", "bcdefgh0" * 7, "12", "9876543210" * 5]
    settings = STEPS | {"max_completion_length": 5, "beta": 0.1, "num_generations": 2}
    same(tmp_path, Script(settings=settings, prompts=prompts))


def test_rows_padded_to_a_multiple(tmp_path, trainers):
    same(tmp_path, Script(settings=STEPS | {"pad_to_multiple_of": 8, "loss_type": "grpo"}))
    rollouts = []
    for trainer in trainers:
        trainer.pad_to_multiple_of = 8
        play(trainer, [[5, EOS], [6, 7, EOS]] * 3)
        rollouts.append(trainer._generate_and_score_completions([{"prompt": "abc"}] * 6))
        trainer.pad_to_multiple_of = None
    theirs, ours = rollouts
    assert theirs["prompt_ids"].shape[1] == theirs["completion_ids"].shape[1] == 8
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 1, "max_steps": 4},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 2, "loss_type": "bnpo"},
    ],
    ids=["accumulated", "over steps", "over steps of two"],
)
def test_a_group_larger_than_a_micro_batch(tmp_path, settings):
    same(tmp_path, Script(settings=STEPS | {"num_generations": 8, "per_device_train_batch_size": 2} | settings))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        # 7 prompts, one a micro-batch: windows of 3, 3 and 1
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 1}, 3),
        # 3 generations of 2 prompts, a micro-batch each: windows of 4 and 2
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 2),
        # the same, each generation passed 3 times: 4 windows of 4 and one of 2
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 3}, 5),
    ],
    ids=["one generation a micro-batch", "two micro-batches a generation", "several passes"],
)
def test_a_short_last_window(tmp_path, loss_type, settings, steps):
    settings = settings | {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 1}
    theirs = same(tmp_path, Script(settings=settings | {"loss_type": loss_type, "entropy_coef": 0.01}))
    assert len(theirs.advantages) == steps


def test_one_completion_a_prompt_in_evaluation(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1, "per_device_eval_batch_size": 3}
    theirs = same(tmp_path, Script(settings=STEPS | settings))
    lines = [line for line in theirs.history if "eval_frac_reward_zero_std" in line]
    assert lines
    assert {line["eval_frac_reward_zero_std"] for line in lines} == {1.0}


# -- the sampler's log-probs -------------------------------------------------------------------------------------------


def sampled(prompt_ids):
    """Completions with made-up log-probs of a sampler that did not report all of them."""
    g = torch.Generator().manual_seed(len(prompt_ids))
    rows, logps = [], []
    for i in range(len(prompt_ids)):
        length = 1 + i % 5
        rows.append(torch.randint(3, 40, (length,), generator=g).tolist())
        logps.append((-4 * torch.rand(length, generator=g)).tolist())
    logps[1][0], logps[2] = None, [None] * len(logps[2])
    logps[3][1] = math.nan
    return rows, logps


@pytest.mark.parametrize(
    "settings",
    [
        {"vllm_importance_sampling_mode": "sequence_mask"},
        {"vllm_importance_sampling_mode": "token_truncate", "loss_type": "grpo", "gradient_accumulation_steps": 2},
        {"vllm_importance_sampling_mode": "token_mask", "num_iterations": 2, "vllm_importance_sampling_clip_min": 0.5},
        {"vllm_importance_sampling_mode": "sequence_truncate", "off_policy_mask_threshold": 0.1, "beta": 0.1},
    ],
    ids=lambda settings: settings["vllm_importance_sampling_mode"],
)
def test_log_probs_that_the_sampler_did_not_report(tmp_path, settings):
    """vLLM's sampler is played: the correction is in force, the completions are given."""
    theirs = same(tmp_path, Script(settings=STEPS | settings, draw=sampled, attributes={"use_vllm": True}))
    assert all(math.isfinite(line["loss"]) for line in theirs.history if "loss" in line)
    assert any("sampling/importance_sampling_ratio/mean" in line for line in theirs.history)
