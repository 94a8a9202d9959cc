"""Rewards made of rewards, and rewards by name: what a YAML file can write."""

import asyncio

import pytest

from grpo_fast.rewards import DROP, Accuracy, gate, is_async, make_reward, route, weighted
from grpo_fast.rewards.compose import parts_of
from grpo_fast.rewards.registry import REWARDS
from tests import pool_functions


def lengths(completions, **columns):
    return [float(len(text)) for text in completions]


def marks(completions, mark, **columns):
    return list(mark)


async def marks_async(completions, mark, **columns):
    await asyncio.sleep(0)
    return list(mark)


def logs(completions, log_metric, log_extra, **columns):
    log_metric("count", len(completions))
    log_extra("text", completions)
    return [0.0] * len(completions)


def run(function, completions=("a", "bb", "ccc"), **columns):
    values = function(completions=list(completions), **columns)
    return asyncio.run(values) if asyncio.iscoroutine(values) else values


@pytest.mark.parametrize("part", [marks, marks_async])
def test_weighted(part):
    function = weighted([lengths, part], [1.0, 10.0])
    metrics = {}
    assert is_async(function) == (part is marks_async)
    assert run(function, mark=[1.0, None, 0.5], log_metric=metrics.__setitem__) == [11.0, 2.0, 8.0]
    assert metrics == {"rewards/weighted/lengths": 2.0, f"rewards/weighted/{part.__name__}": 0.75}
    assert run(weighted([part]), mark=[None, DROP, 1.0]) == [None, DROP, 1.0]
    assert run(weighted([lengths, part]), mark=[None, DROP, 1.0]) == [1.0, DROP, 4.0]
    with pytest.raises(ValueError, match="2 rewards need as many weights, there are 1"):
        weighted([lengths, part], [1.0])


@pytest.mark.parametrize("part", [marks, marks_async])
def test_gate(part):
    function = gate(lengths, part)
    assert function.__name__ == f"lengths_if_{part.__name__}"
    assert run(function, mark=[1.0, 0.9, None]) == [1.0, 0.0, 0.0]
    assert run(gate(lengths, part, at_least=0.5, otherwise=None), mark=[0.5, 0.4, DROP]) == [1.0, None, DROP]


@pytest.mark.parametrize("part", [marks, marks_async])
def test_route(part):
    function = route({"len": lengths, "mark": part}, "source")
    metrics = {}
    columns = {"source": ["mark", "len", "mark"], "mark": [7.0, 8.0, None], "log_metric": metrics.__setitem__}
    assert run(function, **columns) == [7.0, 2.0, None]
    assert metrics == {f"rewards/routed/{part.__name__}": 7.0, "rewards/routed/lengths": 2.0}
    with pytest.raises(ValueError, match="no reward is for source='other' of row 0; they are for 'len', 'mark'"):
        run(function, source=["other"] * 3, mark=[1.0] * 3)
    with pytest.raises(ValueError, match="the data set has no column 'source'"):
        run(function, mark=[1.0] * 3)
    assert run(route({"mark": part}, "source", default=lengths), **columns) == [7.0, 2.0, None]


def test_what_parts_log_keeps_to_the_rows():
    extra, metrics = {}, {}
    run(
        route({"log": logs}, "source", default=lengths),
        source=["log", "len", "log"],
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
    )
    assert extra == {"text": ["a", None, "ccc"]}
    assert metrics["count"] == 2


def test_a_part_of_the_wrong_length_is_named():
    with pytest.raises(
        ValueError, match="'short' in 'weighted' must return one value a completion: 3 completions, 1 val"
    ):
        run(weighted([lengths, short]))


def short(completions, **columns):
    return [1.0]


def test_combinators_nest():
    inner = route({"a": lengths}, "source", default=marks)
    function = weighted([gate(inner, marks_async), lengths])
    columns = {"source": ["a", "b", "a"], "mark": [1.0, 1.0, 0.0]}
    assert run(function, **columns) == [2.0, 3.0, 3.0]
    found = parts_of(function, columns)
    assert found == [(lengths, [0, 2]), (marks, [1]), (marks_async, [0, 1, 2]), (lengths, [0, 1, 2])]


# -- by name -----------------------------------------------------------------------------------------------------------


def test_rewards_by_name():
    assert isinstance(make_reward("accuracy"), Accuracy)
    reward = make_reward({"accuracy": {"timeout": 3, "name": "maths"}})
    assert (reward.__name__, reward._timeout) == ("maths", 3.0)
    assert make_reward({"accuracy": None}).__name__ == "accuracy"
    own = make_reward({"tests.pool_functions:by_length": {"log_metric": print}})
    assert own.func is pool_functions.by_length
    assert make_reward(lengths) is lengths


def test_combinators_by_name():
    own = "tests.pool_functions:by_length"
    spec = {"weighted": {"rewards": [{"gate": {"reward": own, "condition": "accuracy"}}, own], "weights": [1, 2]}}
    assert [part.__name__ for part in make_reward(spec).parts] == ["by_length_if_accuracy", "by_length"]
    spec = {
        "route": {
            "column": "source",
            "rewards": {"math": "accuracy", 3: own},
            "default": {"in_pool": {"function": own}},
        }
    }
    assert [part.__name__ for part in make_reward(spec).parts] == ["accuracy", "by_length", "by_length"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", r"be one of accuracy, code, .*, weighted; one is 'acuracy'; the nearest is 'accuracy'"),
        (3, "rewards must be written module:function, name or .*; one is 3"),
        ({"accuracy": 5}, "rewards must be written module:function, name or .*; one is {'accuracy': 5}"),
        ({"accuracy": {}, "gate": {}}, "rewards must be written"),
        (
            {"accuracy": {"time": 5}},
            "rewards: accuracy: got an unexpected keyword argument 'time'; its arguments are column, ",
        ),
        ({"accuracy": {"timeout": -1}}, "timeout must be above 0"),
        ({"weighted": {"rewards": ["nothing"]}}, "rewards: weighted: rewards must be written .*; one is 'nothing'"),
        ({"gate": {"reward": "accuracy"}}, "gate: missing a required argument: 'condition'"),
        (":f", "rewards must be written module:function, one is ':f'"),
    ],
)
def test_wrong_names_and_arguments_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        make_reward(spec)


def test_every_registered_name_is_there():
    for name in REWARDS:
        with pytest.raises(ValueError, match="its arguments are"):
            make_reward({name: {"not_an_argument": 1}})
