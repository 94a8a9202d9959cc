"""Calling reward functions: every form TRL takes, and errors that say which function, step and row."""

import asyncio
import functools
import logging
from collections import defaultdict

import pytest
import torch
from datasets import Dataset

import grpo_fast
from grpo_fast import GRPOConfig
from grpo_fast.rewards import RewardCall, callable_name, check_rewards, is_async, make_rewards
from grpo_fast.rewards.calling import call, call_async, gather
from tests.tiny_lm import make_model, make_tokenizer, save


def batch_of(completions=("a", "bb", "ccc"), **columns):
    rows = {"prompts": ["p"] * len(completions), "completions": list(completions), **columns}
    return RewardCall(rows=rows, shared={"trainer_state": None}, step=7)


def score(function, **columns):
    name, batch = callable_name(function), batch_of(**columns)
    if is_async(function):
        return gather([call_async(function, name, batch)])[0].tolist()
    return call(function, name, batch).tolist()


def by_length(completions, **kwargs):
    return [float(len(text)) for text in completions]


async def by_length_async(completions, **kwargs):
    return [len(text) for text in completions]


class Scorer:
    def __call__(self, completions, answer, **kwargs):
        return [None if a is None else float(a == c) for a, c in zip(answer, completions, strict=True)]


class AsyncScorer:
    async def __call__(self, completions, **kwargs):
        return [0.5 * len(text) for text in completions]


def scaled(completions, factor, **kwargs):
    return torch.tensor([factor * len(text) for text in completions])


def lazily(completions, **kwargs):
    return (len(text) for text in completions)


@pytest.mark.parametrize(
    ("function", "name", "expected"),
    [
        (by_length, "by_length", [1.0, 2.0, 3.0]),
        (by_length_async, "by_length_async", [1.0, 2.0, 3.0]),
        (Scorer(), "Scorer", [1.0, 0.0, None]),
        (AsyncScorer(), "AsyncScorer", [0.5, 1.0, 1.5]),
        (functools.partial(scaled, factor=2), "scaled", [2.0, 4.0, 6.0]),
        (functools.partial(functools.partial(by_length_async), other=1), "by_length_async", [1.0, 2.0, 3.0]),
        (functools.partial(AsyncScorer()), "AsyncScorer", [0.5, 1.0, 1.5]),
        (lazily, "lazily", [1.0, 2.0, 3.0]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_of_function(function, name, expected):
    assert callable_name(function) == name
    values = score(function, answer=["a", "x", None])
    assert [None if value != value else value for value in values] == expected


def test_async_functions_run_side_by_side_and_inside_a_running_loop():
    meeting = []

    async def waits_for_the_other(completions, **kwargs):
        meeting.append(1)
        for _ in range(1000):
            if len(meeting) == 2:
                break
            await asyncio.sleep(0.001)
        return [float(len(meeting))] * len(completions)

    async def notebook():
        return gather([call_async(waits_for_the_other, "f", batch_of()) for _ in range(2)])

    first, second = asyncio.run(notebook())
    assert first.tolist() == second.tolist() == [2.0] * 3


def raises_on_bb(completions, **kwargs):
    return [1 / (len(text) - 2) for text in completions]


async def raises_async(completions, **kwargs):
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raises_on_bb, RuntimeError, "'raises_on_bb' raised ZeroDivisionError at step 7 on row 1, completion 'bb'"),
        (raises_async, RuntimeError, "'raises_async' raised KeyError at step 7"),
        (lambda completions, **_: [1.0], ValueError, "3 completions, 1 values"),
        (lambda completions, **_: "abc", ValueError, "it returned str 'abc'"),
        (lambda completions, **_: 1.0, ValueError, "it returned float 1.0"),
        (lambda completions, **_: {"a": 1.0}, ValueError, "it returned dict"),
        (lambda completions, **_: ["1.0"] * 3, ValueError, "returned the string '1.0' for row 0"),
    ],
)
def test_a_wrong_function_names_itself(function, error, message):
    with pytest.raises(error, match=message):
        score(function)


# -- what the user gives -----------------------------------------------------------------------------------------------


def config(tmp_path, **kwargs):
    return GRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", **kwargs)


@pytest.mark.parametrize(
    ("functions", "settings", "processing_classes", "message"),
    [
        (None, {}, None, "reward_funcs is needed"),
        ([], {}, None, "reward_funcs is needed"),
        (["/nowhere/model"], {}, None, r"reward_funcs\[0\]='/nowhere/model' is neither a folder nor"),
        ([by_length, 3], {}, None, r"reward_funcs\[1\] must be a callable, a model id or a module, it is int"),
        ([by_length], {"reward_weights": [1.0, 2.0]}, None, "reward_weights must .* 1 functions, 2 entries"),
        (by_length, {}, [None, None], "reward_processing_classes must .* 1 functions, 2 entries"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, functions, settings, processing_classes, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(functions, processing_classes, config(tmp_path, **settings))


def test_environments_are_reward_sources_of_weight_one(tmp_path):
    args = config(tmp_path, reward_weights=[0.5])
    rewards = make_rewards(by_length, None, args, environment_rewards=[(Scorer(), "Game")])
    assert rewards.names == ["by_length", "Game"]
    assert rewards.weights.tolist() == [0.5, 1.0]
    assert rewards.processing_classes == [None, None]
    assert make_rewards(None, None, config(tmp_path), environment_rewards=[(Scorer(), "Game")]).names == ["Game"]


def test_the_users_lists_are_left_alone(tmp_path):
    functions = [by_length]
    rewards = make_rewards(functions, None, config(tmp_path), environment_rewards=[(Scorer(), "Game")])
    assert len(functions) == 1
    assert len(rewards.functions) == 2


def test_functions_of_one_name_are_announced(tmp_path, caplog):
    make_rewards([by_length, by_length], None, config(tmp_path))
    assert "2 reward functions are named 'by_length'" in caplog.text


# -- the trainer's seam ------------------------------------------------------------------------------------------------


def build(package, tmp_path, functions, model=None, **kwargs):
    return package.GRPOTrainer(
        model=make_model() if model is None else model,
        reward_funcs=functions,
        args=package.GRPOConfig(
            str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            **kwargs,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a=", "answer": 1}]),
        processing_class=make_tokenizer(),
    )


def of_environment(completions, environments, **kwargs):
    return [environment.score for environment in environments]


def seldom(completions, answer, **kwargs):
    return [None if a is None else a + len(text) for text, a in zip(completions, answer, strict=True)]


class Environment:
    score = 3.0


@pytest.mark.trl
def test_the_seam_gives_trls_tensor(tmp_path):
    import trl

    model = save(tmp_path / "model")
    inputs = [{"prompt": "a=", "answer": answer} for answer in (1, None, 0.5, 2)]
    arguments = (inputs, ["a="] * 4, ["x", "yy", "zzz", ""], [[1], [1, 2], [1, 2, 3], []])
    results = []
    for package in (trl, grpo_fast):
        trainer = build(package, tmp_path, [by_length, by_length_async, seldom, of_environment], model)
        trainer.environments = [Environment() for _ in range(4)]
        results.append(trainer._calculate_rewards(*arguments))
    theirs, ours = results
    assert ours.dtype == theirs.dtype
    assert ours.device == theirs.device
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_functions_replaced_in_a_run_are_called(tmp_path):
    trainer = build(grpo_fast, tmp_path, [by_length])
    arguments = ([{"prompt": "a="}] * 2, ["a="] * 2, ["x", "yy"], [[1], [1, 2]])
    trainer.reward_funcs[0] = lambda completions, **kwargs: [7.0] * len(completions)
    assert trainer._calculate_rewards(*arguments).tolist() == [[7.0], [7.0]]
    trainer.reward_funcs.append(by_length)
    with pytest.raises(ValueError, match="one entry a function: they have 2, 1, 1"):
        trainer._calculate_rewards(*arguments)


def test_unscored_rows_are_announced_with_what_they_were(tmp_path, caplog):
    trainer = build(grpo_fast, tmp_path, [seldom])
    inputs = [{"prompt": "a=", "answer": answer} for answer in (1, None)]
    with caplog.at_level(logging.WARNING):
        rewards = trainer._calculate_rewards(inputs, ["a="] * 2, ["x", "yy"], [[1], [1, 2]])
    assert rewards.isnan().tolist() == [[False], [True]]
    assert "None for 1 of 2 completions" in caplog.text
    assert "'completions': 'yy'" in caplog.text
    assert "'answer': None" in caplog.text


def test_what_functions_log_keeps_to_the_rows(tmp_path, caplog):
    trainer = build(grpo_fast, tmp_path, [by_length])
    trainer._log_completion_extra("length", [1, 2])
    trainer._log_completion_extra("short", [1])
    trainer._log_metric("speed", torch.tensor(1.0))
    trainer._log_metric("speed", 4)
    trainer._flush_user_logs(2)
    trainer._log_completion_extra("late", ["x", "y"])
    trainer._flush_user_logs(2)
    extra = {name: list(values) for name, values in trainer._logs["extra"].items()}
    assert extra == {"length": [1, 2, None, None], "short": [1, None, None, None], "late": ["x", "y"]}
    assert "log_extra('short') got 1 values for 2 completions" in caplog.text
    assert trainer._metrics["train"]["speed"] == [2.5]
    assert trainer._pending_extra_logs == trainer._pending_metrics == defaultdict(list)


def test_shared_arguments_reach_the_functions(tmp_path):
    seen = {}

    def curious(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(kwargs, step=trainer_state.global_step, ids=completion_ids)
        log_extra("e", answer)
        log_metric("m", 1.0)
        return [0.0] * len(prompts)

    trainer = build(grpo_fast, tmp_path, [curious])
    trainer._calculate_rewards([{"prompt": "a=", "answer": 1, "completion": "gold"}], ["a="], ["x"], [[5]])
    assert seen == {"step": 0, "ids": [[5]]}
    assert trainer._pending_extra_logs == {"e": [1]}
    assert trainer._pending_metrics == {"m": [1.0]}
