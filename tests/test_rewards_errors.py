"""Numbers that are not finite are errors; `reward_errors="none"` turns errors into None, and counts them."""

import math

import pytest
import torch
from datasets import Dataset

import grpo_fast
from grpo_fast.rewards import DROP, RewardCall, is_async
from grpo_fast.rewards.calling import DROPPED, call, call_async, checked, gather
from grpo_fast.rewards.early import EarlyRewards
from tests.tiny_lm import make_model, make_tokenizer


def batch_of(completions=("a", "bb", "ccc"), *, errors, log=None, first_row=None):
    log = {} if log is None else log
    shared = {"log_metric": lambda name, value: log.setdefault(name, []).append(value)}
    shared["log_extra"] = lambda name, values: log.setdefault(name, []).append(values)
    rows = {"completions": list(completions)}
    return RewardCall(rows=rows, shared=shared, step=7, errors=errors, first_row=first_row)


def score(function, **kwargs):
    batch = batch_of(**kwargs)
    rewards = gather([call_async(function, "f", batch)])[0] if is_async(function) else call(function, "f", batch)
    return [None if value != value else value for value in rewards.tolist()]


def returns(*values):
    def function(completions, **columns):
        return list(values)

    return function


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)])
def test_numbers_that_are_not_finite_are_refused_with_their_row(bad):
    message = (
        r"'f' returned (nan|inf|-inf) at step 7 for row 1, completion 'bb'; a reward must be a finite number, or None"
    )
    with pytest.raises(ValueError, match=message):
        score(returns(1.0, bad, None), errors="raise")
    with pytest.raises(ValueError, match="for row 9, completion 'bb'"):
        score(returns(1.0, bad, None), errors="raise", first_row=8)
    log = {}
    assert score(returns(1.0, bad, None), errors="none", log=log) == [1.0, None, None]
    assert log == {"rewards/f/error": [1 / 3]}


def test_tensors_are_refused_alike():
    with pytest.raises(ValueError, match="'f' returned nan at step 7 for row 2"):
        score(lambda completions, **columns: torch.tensor([1.0, 2.0, math.nan]), errors="raise")


def test_none_and_drop_are_no_errors():
    assert score(returns(1.0, None, DROP), errors="raise") == [1.0, None, DROPPED]
    log = {}
    assert score(returns(1.0, None, DROP), errors="none", log=log) == [1.0, None, DROPPED]
    assert log == {"rewards/f/error": [0.0]}


def raises_on_bb(completions, log_metric, log_extra, **columns):
    log_metric("calls", 1.0)
    values = [1.0 / (len(text) - 2) for text in completions]
    log_extra("length", [len(text) for text in completions])
    return values


async def raises_on_bb_async(completions, log_metric, log_extra, **columns):
    return raises_on_bb(completions, log_metric, log_extra)


@pytest.mark.parametrize("function", [raises_on_bb, raises_on_bb_async])
def test_the_row_that_raises_has_none_and_the_others_their_rewards(function, caplog):
    log = {}
    assert score(function, errors="none", log=log) == [-1.0, None, 1.0]
    # what the calls that look for the row log is not kept
    assert log == {"calls": [1.0, 1.0], "length": [[1, None, 3]], "rewards/f/error": [1 / 3]}
    assert "reward function 'f' raised ZeroDivisionError at step 7" in caplog.text


def raises_on_many(completions, **columns):
    if len(completions) > 1:
        raise OSError("too many")
    return [1.0]


def raises_always(completions, **columns):
    raise OSError("never")


@pytest.mark.parametrize("function", [raises_on_many, raises_always])
def test_a_call_that_fails_as_a_whole_has_none_everywhere(function):
    log = {}
    assert score(function, errors="none", log=log) == [None] * 3
    assert log["rewards/f/error"] == [1.0]


def logs_its_own_errors(completions, log_metric, **columns):
    log_metric("rewards/f/error", 0.5)
    return [1.0] * len(completions)


def test_a_function_that_counts_its_own_errors_is_not_counted_twice():
    log = {}
    score(logs_its_own_errors, errors="none", log=log)
    assert log == {"rewards/f/error": [0.5]}


def test_a_list_of_the_wrong_form_stops_the_run_always():
    with pytest.raises(ValueError, match="3 completions, 1 values"):
        score(returns(1.0), errors="none")
    with pytest.raises(ValueError, match="the string 'x' for row 0"):
        score(returns("x", 1.0, 1.0), errors="none")


def test_scores_of_models_are_checked():
    scores = torch.tensor([1.0, math.nan, math.inf])
    with pytest.raises(ValueError, match="'f' returned nan at step 7 for row 1, completion 'bb'"):
        checked(scores, "f", batch_of(errors="raise"))
    log = {}
    assert checked(scores, "f", batch_of(errors="none", log=log)).isnan().tolist() == [False, True, True]
    assert log == {"rewards/f/error": [2 / 3]}


def test_rewards_beside_generation_follow_the_same_rules():
    batch = batch_of(errors="none", first_row=0)
    with EarlyRewards({0: (raises_on_bb, "f")}, torch.device("cpu")) as early:
        early.submit(batch)
        ((_, _, (result,)),) = list(early.results())
    assert result.rewards.isnan().tolist() == [False, True, False]
    assert ("rewards/f/error", 1 / 3) in result.metrics


def trainer_with(function, tmp_path, **settings):
    return grpo_fast.GRPOTrainer(
        model=make_model(),
        reward_funcs=[function],
        args=grpo_fast.GRPOConfig(
            str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            max_steps=1,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a="}] * 4),
        processing_class=make_tokenizer(),
    )


def infinite_once(completions, **columns):
    return [math.inf, *[float(i) for i in range(1, len(completions))]]


def test_an_infinite_reward_does_not_reach_the_weights(tmp_path):
    with pytest.raises(ValueError, match="'infinite_once' returned inf at step 0 for row 0"):
        trainer_with(infinite_once, tmp_path).train()
    trainer = trainer_with(infinite_once, tmp_path, reward_errors="none")
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert trainer.state.log_history[0]["rewards/infinite_once/error"] == 0.25


def test_the_policy_is_one_of_two(tmp_path):
    with pytest.raises(ValueError, match="reward_errors must be one of raise, none; it is 'ignore'"):
        trainer_with(infinite_once, tmp_path, reward_errors="ignore")
