"""Calling reward functions: every form TRL takes, and errors that say which function, step and row."""

import functools

import pytest
import torch

from grpo_fast.rewards import RewardFunctions


def score(functions, *, weights=None, completions=("a", "bb", "ccc"), **columns):
    rows = {"prompts": ["p"] * len(completions), "completions": list(completions), **columns}
    return RewardFunctions(functions, weights)(
        step=7, num_rows=len(completions), arguments={**rows, "trainer_state": None}, row_arguments=list(rows)
    )


def by_length(completions, **kwargs):
    return [float(len(text)) for text in completions]


async def by_length_async(completions, **kwargs):
    return [len(text) for text in completions]


class Scorer:
    def __call__(self, completions, answer, **kwargs):
        return [None if a is None else float(a == c) for a, c in zip(answer, completions, strict=True)]


def scaled(completions, factor, **kwargs):
    return torch.tensor([factor * len(text) for text in completions])


def test_every_form_of_function():
    functions = [by_length, by_length_async, Scorer(), functools.partial(scaled, factor=2)]
    rewards = score(functions, answer=["a", "x", None])
    expected = torch.tensor([[1.0, 1, 1, 2], [2, 2, 0, 4], [3, 3, torch.nan, 6]])
    torch.testing.assert_close(rewards, expected, equal_nan=True)
    assert RewardFunctions(functions).names == ["by_length", "by_length_async", "Scorer", "scaled"]


def test_a_lone_function_needs_no_list():
    assert score(by_length).tolist() == [[1.0], [2.0], [3.0]]


def test_async_functions_run_inside_a_running_loop():
    import asyncio

    async def notebook():
        return score([by_length_async])

    assert asyncio.run(notebook()).tolist() == [[1.0], [2.0], [3.0]]


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
        (lambda completions, **_: ["1.0"] * 3, ValueError, "returned the string '1.0' for row 0"),
    ],
)
def test_a_wrong_function_names_itself(function, error, message):
    with pytest.raises(error, match=message):
        score(function)


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        (None, None, "reward_funcs is needed"),
        ([], None, "reward_funcs is needed"),
        (["org/model"], None, r"reward_funcs\[0\] is a reward model"),
        ([by_length, 3], None, r"reward_funcs\[1\] must be callable, it is int"),
        ([by_length], [1.0, 2.0], "1 functions, 2 weights"),
    ],
)
def test_wrong_arguments_are_named(functions, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctions(functions, weights)
