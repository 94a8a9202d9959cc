"""Reward functions by name, as a YAML file writes them: `accuracy`, `{accuracy: {timeout: 5}}`, `module:function`."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

# name: where the function, or what makes it of arguments, is found; nothing is imported before it is used.
# Of the functions that take rewards, the arguments that name rewards
REWARDS: dict[str, str] = {
    "accuracy": "grpo_fast.rewards.math.accuracy:Accuracy",
    "code": "grpo_fast.rewards.code:Code",
    "cosine_length": "grpo_fast.rewards.shaping:CosineLength",
    "format": "grpo_fast.rewards.format:Format",
    "gate": "grpo_fast.rewards.compose:gate",
    "group_length": "grpo_fast.rewards.shaping:GroupLength",
    "in_pool": "grpo_fast.rewards.pooled:in_pool",
    "judge": "grpo_fast.rewards.judge:Judge",
    "language_consistency": "grpo_fast.rewards.language:LanguageConsistency",
    "model": "grpo_fast.rewards.classifier:ModelReward",
    "multiple_choice": "grpo_fast.rewards.choice:MultipleChoice",
    "reasoning_steps": "grpo_fast.rewards.reasoning:ReasoningSteps",
    "repetition_penalty": "grpo_fast.rewards.shaping:RepetitionPenalty",
    "route": "grpo_fast.rewards.compose:route",
    "soft_overlong_punishment": "grpo_fast.rewards.shaping:SoftOverlong",
    "tag_count": "grpo_fast.rewards.format:TagCount",
    "weighted": "grpo_fast.rewards.compose:weighted",
}
INNER: dict[str, tuple[str, ...]] = {
    "cosine_length": ("correct",),
    "gate": ("reward", "condition"),
    "group_length": ("correct",),
    "in_pool": ("function",),
    "route": ("rewards", "default"),
    "weighted": ("rewards",),
}


def make_reward(spec: object, *, where: str = "rewards") -> Callable[..., Any]:
    """The reward function that a name, or a mapping of one name to arguments, stands for.

    Args:
        spec: A name of `REWARDS`; `module:function`; or `{name: {argument: value}}` of either. Arguments of a user's
            function are given to it at every call. A callable is itself.
        where: What errors call the setting.

    Raises:
        ValueError: For a name that is not known, a module or function that is not there, something not callable, or
            arguments that the function does not take.
    """
    if callable(spec):
        return spec
    name, arguments = _name_and_arguments(spec, where)
    if ":" in name:
        function = _imported(name, where)
        return functools.partial(function, **arguments) if arguments else function
    if name not in REWARDS:
        raise ValueError(
            f"{where} must be written module:function or be one of {', '.join(sorted(REWARDS))}; one is {spec!r}"
            f"{_nearest(name)}"
        )
    for argument in INNER.get(name, ()):
        if arguments.get(argument) is not None:
            arguments[argument] = _inner(arguments[argument], f"{where}: {name}: {argument}")
    maker = _imported(REWARDS[name], where)
    try:
        inspect.signature(maker).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(parameter for parameter in inspect.signature(maker).parameters if parameter != "self")
        raise ValueError(f"{where}: {name}: {error}; its arguments are {takes}") from error
    return maker(**arguments)


def _inner(value: object, where: str) -> Any:
    """Rewards in the arguments of another: one, a list of them, or a mapping of values of a column to them."""
    if isinstance(value, list):
        return [make_reward(item, where=where) for item in value]
    if isinstance(value, Mapping) and where.endswith("route: rewards"):
        return {key: make_reward(item, where=where) for key, item in value.items()}
    return make_reward(value, where=where)


def _name_and_arguments(spec: object, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        name, arguments = next(iter(spec.items()))
        if isinstance(name, str) and (arguments is None or isinstance(arguments, Mapping)):
            return name, dict(arguments or {})
    raise ValueError(f"{where} must be written module:function, name or {{name: {{argument: value}}}}; one is {spec!r}")


def _imported(name: str, where: str) -> Any:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"{where} must be written module:function, one is {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{where}: {name!r} cannot be imported: {error}") from error
    if not hasattr(module, function_name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{where}: module {module_name!r} has no {function_name!r}; it has {', '.join(functions)}")
    function = getattr(module, function_name)
    if not callable(function):
        raise ValueError(f"{where}: {name!r} is not a function, it is {type(function).__name__}")
    return function


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, REWARDS, n=1)
    return f"; the nearest is {close[0]!r}" if close else ""
