"""Environments: objects that own a prompt, tools and perhaps a reward, one instance a rollout."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from grpo_fast.event_loop import run_coroutine

Factory = Callable[[], Any]
Reward = Callable[..., Any]


class Environments:
    """Instances of one environment class or of several, made as a batch needs them and used again.

    Args:
        factories: What makes an instance, or a dict of such by the name in the rows' `environment` column.

    Attributes:
        by_name: Whether rows say which environment they want.
        tools: For each name, the methods of one instance that the model may call: the public ones but `reset` and
            `get_reward`. The name of the only environment is None.

    Raises:
        ValueError: If an instance has no callable `reset`.
    """

    def __init__(self, factories: Factory | dict[str, Factory]) -> None:
        self.by_name = isinstance(factories, dict)
        named: Any = factories if isinstance(factories, dict) else {None: factories}
        self._factories: dict[str | None, Factory] = dict(named)
        if not self._factories:
            raise ValueError("environment_factory is an empty dict: it needs an environment")
        for name, factory in self._factories.items():
            if not callable(factory):
                raise ValueError(
                    f"environment_factory{_where(name)} must be a class or a function that makes an environment, "
                    f"it is {type(factory).__name__}"
                )
        # made to be looked at, and the first to be used
        self._pool = {name: [factory()] for name, factory in self._factories.items()}
        for name, (instance,) in self._pool.items():
            if not callable(getattr(type(instance), "reset", None)):
                raise ValueError(
                    f"environment_factory{_where(name)} makes {type(instance).__name__}, which has no method `reset`"
                )
        self.tools = {name: methods(instances[0]) for name, instances in self._pool.items()}

    def rewards(self) -> list[tuple[Reward, str]]:
        """A reward function and its name for each class with `get_reward`; it scores that class's rollouts alone."""
        kinds = dict.fromkeys(type(instances[0]) for instances in self._pool.values())
        return [(_reward(kind), kind.__name__) for kind in kinds if callable(getattr(kind, "get_reward", None))]

    def names(self, rows: list[dict[str, Any]]) -> list[str | None]:
        """The environment of each row.

        Raises:
            ValueError: If a row names one that there is not.
        """
        names = [row.get("environment") if self.by_name else None for row in rows]
        for name in names:
            if name not in self._factories:
                raise ValueError(
                    f"a row has environment={name!r}, environment_factory has {sorted(map(str, self._factories))}"
                )
        return names

    def draw(self, names: list[str | None]) -> list[Any]:
        """An instance for each name, all different."""
        drawn: Counter[str | None] = Counter()
        instances = []
        for name in names:
            pool = self._pool[name]
            if drawn[name] == len(pool):
                pool.append(self._factories[name]())
            instances.append(pool[drawn[name]])
            drawn[name] += 1
        return instances

    def reset(self, instance: Any, row: dict[str, Any]) -> Any:
        """What `instance.reset` makes of the row: text, content blocks or None."""
        if self.by_name:
            row = {key: value for key, value in row.items() if key != "environment"}
        observation = instance.reset(**row)
        if inspect.iscoroutine(observation):
            observation = run_coroutine(observation)
        if observation is not None and not isinstance(observation, str | list):
            raise ValueError(
                f"{type(instance).__name__}.reset must return text, a list of content blocks or None, "
                f"it returned {type(observation).__name__}"
            )
        return observation


def methods(instance: Any) -> list[Callable[..., Any]]:
    """The methods of an environment that are tools."""
    # listed on the class: on the instance, properties would be evaluated
    names = [name for name, _ in inspect.getmembers(type(instance), predicate=inspect.isfunction)]
    return [
        getattr(instance, name) for name in names if name not in ("reset", "get_reward") and not name.startswith("_")
    ]


def observed(prompt: list[dict[str, Any]], observation: Any) -> list[dict[str, Any]]:
    """The prompt with an observation at the end of its last message; the prompt itself is left as it is."""
    if observation is None:
        return prompt
    *earlier, last = prompt
    content = last["content"] or ""
    if isinstance(observation, list) or isinstance(content, list):
        content, observation = _blocks(content), _blocks(observation)
    return [*earlier, {**last, "content": content + observation}]


def _blocks(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _reward(kind: type) -> Reward:
    """A reward function that asks the environments of class `kind`; others' rollouts get None."""

    def is_scored(environment: Any) -> bool:
        # exactly: a subclass has a column of its own
        return type(environment) is kind

    if inspect.iscoroutinefunction(kind.get_reward):  # type: ignore[attr-defined]

        async def get_reward_async(environments: list[Any], **_: Any) -> list[float | None]:
            return [await e.get_reward() if is_scored(e) else None for e in environments]

        return get_reward_async

    def get_reward(environments: list[Any], **_: Any) -> list[float | None]:
        return [e.get_reward() if is_scored(e) else None for e in environments]

    return get_reward


def _where(name: str | None) -> str:
    return "" if name is None else f"[{name!r}]"
