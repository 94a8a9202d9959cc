import copy

import pytest

from grpo_fast.event_loop import run_coroutine
from grpo_fast.tools import Environments, make_toolbox, observed
from tests.tool_chats import HERMES, clock, make_tokenizer


class Counter:
    """Counts to a target."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.count = None

    @property
    def total(self):
        raise AssertionError("a property was evaluated")

    def reset(self, target=3, **row):
        self.count, self.target, self.row = 0, target, row
        return f" Count to {target}."

    def add(self, number: int) -> int:
        """Add to the count.

        Args:
            number: How much.
        """
        self.count += number
        return self.count

    def _secret(self):
        pass

    def get_reward(self):
        return float(self.count == self.target)


class Judged(Counter):
    """Scored by an async judge."""

    async def get_reward(self):
        return 0.5


class Quiet:
    """Says nothing, scores nothing."""

    def reset(self, **row):
        self.row = row


def make(factory, tools=()):
    tokenizer = make_tokenizer(HERMES.template, HERMES.eos)
    with pytest.warns(UserWarning, match="environment_factory is experimental"):
        return make_toolbox(tokenizer, list(tools), factory)


def test_public_methods_are_tools():
    toolbox = make(Counter, [clock])
    assert [tool.__name__ for tool in toolbox.tools] == ["clock", "add"]
    assert toolbox.standalone == [clock]
    assert toolbox.tools_of() == toolbox.tools


def test_each_name_has_its_own_tools():
    toolbox = make({"counter": Counter, "quiet": Quiet}, [clock])
    assert [tool.__name__ for tool in toolbox.tools_of("counter")] == ["clock", "add"]
    assert toolbox.tools_of("quiet") == [clock]


def test_calls_reach_the_rollouts_own_instance():
    toolbox = make(Counter, [clock])
    first, second = toolbox.environments.draw([None, None])
    for environment in (first, second):
        toolbox.environments.reset(environment, {})
    toolbox.functions(first)["add"](number=2)
    assert (first.count, second.count) == (2, 0)
    assert set(toolbox.functions(first)) == {"clock", "add"}


def test_instances_are_made_when_needed_and_used_again():
    Counter.made = 0
    environments = Environments({"a": Counter, "b": Counter})
    assert Counter.made == 2
    first = environments.draw(["a", "b", "a"])
    assert Counter.made == 3
    assert len({id(instance) for instance in first}) == 3
    again = environments.draw(["a", "a", "b", "b"])
    assert Counter.made == 4
    assert {id(instance) for instance in first} < {id(instance) for instance in again}


def test_reset_gets_the_row_without_the_column_that_routes():
    named = Environments({"quiet": Quiet})
    (instance,) = named.draw(["quiet"])
    named.reset(instance, {"environment": "quiet", "level": 2})
    assert instance.row == {"level": 2}

    alone = Environments(Quiet)
    (instance,) = alone.draw([None])
    alone.reset(instance, {"environment": "quiet", "level": 2})
    assert instance.row == {"environment": "quiet", "level": 2}


def test_an_async_reset_is_awaited():
    class Slow(Quiet):
        async def reset(self, **row):
            return "ready"

    environments = Environments(Slow)
    assert environments.reset(environments.draw([None])[0], {}) == "ready"


BLOCK = {"type": "image", "image": "pixels"}


@pytest.mark.parametrize(
    ("content", "observation", "expected"),
    [
        ("go", " left", "go left"),
        ("go", [BLOCK], [{"type": "text", "text": "go"}, BLOCK]),
        ([BLOCK], "left", [BLOCK, {"type": "text", "text": "left"}]),
        ([BLOCK], [BLOCK], [BLOCK, BLOCK]),
        ("go", None, "go"),
        (None, "left", "left"),
    ],
)
def test_observations_end_the_last_message_of_a_copy(content, observation, expected):
    prompt = [{"role": "system", "content": "play"}, {"role": "user", "content": content}]
    before = copy.deepcopy(prompt)
    assert observed(prompt, observation) == [prompt[0], {"role": "user", "content": expected}]
    assert prompt == before


def test_rewards_of_environments_score_their_own_class_alone():
    toolbox = make({"a": Counter, "b": Counter, "judged": Judged, "quiet": Quiet})
    (count, count_name), (judge, judge_name) = toolbox.environment_rewards
    assert (count_name, judge_name) == ("Counter", "Judged")
    environments = toolbox.environments.draw(["a", "judged", "quiet", "b"])
    for environment in environments:
        toolbox.environments.reset(environment, {"target": 0})
    environments[3].add(1)
    assert count(environments=environments, prompts=[]) == [1.0, None, None, 0.0]
    assert run_coroutine(judge(environments=environments, prompts=[])) == [None, 0.5, None, None]


class Resetless:
    def add(self):
        """Add."""


class Wordy(Quiet):
    def reset(self):
        return 3


class Undocumented(Quiet):
    def look(self, direction):
        pass


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Resetless, "makes Resetless, which has no method `reset`"),
        ({"x": Resetless}, r"environment_factory\['x'\] makes Resetless"),
        ({"x": Counter()}, r"environment_factory\['x'\] must be a class or a function"),
        ({}, "empty dict"),
        (Undocumented, "look needs type hints and a docstring"),
        ({"x": Undocumented}, "environment 'x' with tools: look"),
    ],
)
@pytest.mark.filterwarnings("ignore:environment_factory is experimental")
def test_environments_that_cannot_be_used_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        make_toolbox(make_tokenizer(HERMES.template, HERMES.eos), None, factory)


def test_a_tool_and_a_method_of_one_name_are_refused():
    def add(number: int):
        """Add.

        Args:
            number: How much.
        """

    with pytest.raises(ValueError, match="of one name apart: add"):
        make(Counter, [add])


def test_rows_that_ask_for_what_there_is_not_are_refused():
    environments = Environments({"a": Quiet, "b": Quiet})
    with pytest.raises(ValueError, match=r"environment='c', environment_factory has \['a', 'b'\]"):
        environments.names([{"environment": "a"}, {"environment": "c"}])
    with pytest.raises(ValueError, match="environment=None"):
        environments.names([{}])


def test_observations_of_another_kind_are_refused():
    environments = Environments(Wordy)
    with pytest.raises(ValueError, match=r"Wordy.reset must return text, .* it returned int"):
        environments.reset(environments.draw([None])[0], {})
