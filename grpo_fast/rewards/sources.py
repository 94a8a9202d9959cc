"""What scores completions: the user's functions and models, and the environments that carry their own reward."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_fast.config import GRPOConfig
from grpo_fast.rewards.marks import callable_name
from grpo_fast.rewards.models import (
    check_reward_model,
    load_reward_model,
    load_reward_tokenizer,
    mirror_pad_token,
)
from grpo_fast.rewards.steps import check_process_rewards

logger = logging.getLogger(__name__)

RewardFunc: TypeAlias = str | PreTrainedModel | Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """A run's K reward sources; the lists are TRL's `reward_funcs`, `reward_func_names` and so on.

    Attributes:
        functions: Callables and reward models.
        names: Each one's name in the metrics.
        processing_classes: A reward model's tokenizer; None for a callable.
        weights: [K] fp32.
    """

    functions: list[Any]
    names: list[str]
    processing_classes: list[Any]
    weights: Tensor


def check_rewards(
    reward_funcs: RewardFunc | list[RewardFunc] | None,
    reward_processing_classes: Any,
    args: GRPOConfig,
    *,
    environment_rewards: Sequence[tuple[Callable[..., Any], str]] = (),
) -> None:
    """Refuse reward sources that cannot work, before any weights are read.

    Args:
        reward_funcs: One source or several: callables (plain, async, `functools.partial`, objects with `__call__`),
            model ids or folders, modules.
        reward_processing_classes: None, or one tokenizer (or None) a source.
        args: The run's settings.
        environment_rewards: The environments' `get_reward` functions and their names.

    Raises:
        ValueError: If there is no source, one is none of these things, a model cannot be found, or the numbers of
            weights or processing classes differ from that of the sources.
    """
    functions = _as_list(reward_funcs)
    if not functions and not environment_rewards:
        raise ValueError(
            "reward_funcs is needed: a function, a reward model or a list of them; or an environment_factory whose "
            "environments have a get_reward method"
        )
    for i, function in enumerate(functions):
        if isinstance(function, str):
            check_reward_model(function, f"reward_funcs[{i}]", args)
        elif not callable(function):
            raise ValueError(
                f"reward_funcs[{i}] must be a callable, a model id or a module, it is {type(function).__name__}"
            )
    check_process_rewards(functions, [_name(function) for function in functions], args)
    given = {"reward_weights": args.reward_weights, "reward_processing_classes": reward_processing_classes}
    for name, values in given.items():
        if values is not None and len(_as_list(values)) != len(functions):
            raise ValueError(
                f"{name} must have one entry a reward function: {len(functions)} functions, "
                f"{len(_as_list(values))} entries"
            )


def make_rewards(
    reward_funcs: RewardFunc | list[RewardFunc] | None,
    reward_processing_classes: Any,
    args: GRPOConfig,
    *,
    environment_rewards: Sequence[tuple[Callable[..., Any], str]] = (),
) -> Rewards:
    """The reward sources ready to call, models loaded; arguments and errors as in `check_rewards`.

    The lists that come back are new ones: the user's are left as they are. The weights of environments are 1.
    """
    check_rewards(reward_funcs, reward_processing_classes, args, environment_rewards=environment_rewards)
    functions = _as_list(reward_funcs)
    processing_classes = _as_list(reward_processing_classes) or [None] * len(functions)
    weights = [1.0] * len(functions) if args.reward_weights is None else list(args.reward_weights)
    for i, function in enumerate(functions):
        if isinstance(function, str):
            functions[i] = load_reward_model(function, args)
        if isinstance(functions[i], nn.Module):
            processing_classes[i] = _processing_class(i, functions[i], processing_classes[i], function, args)
        elif processing_classes[i] is not None:
            logger.warning("reward_processing_classes[%d] is not used: reward_funcs[%d] is a function", i, i)
    names = [_name(function) for function in functions] + [name for _, name in environment_rewards]
    for name, count in Counter(names).items():
        if count > 1:
            logger.warning("%d reward functions are named %r: their metrics are averaged together", count, name)
    return Rewards(
        functions=[*functions, *(function for function, _ in environment_rewards)],
        names=names,
        processing_classes=[*processing_classes, *[None] * len(environment_rewards)],
        weights=torch.tensor([*weights, *[1.0] * len(environment_rewards)], dtype=torch.float32),
    )


def _processing_class(i: int, model: nn.Module, given: Any, source: object, args: GRPOConfig) -> Any:
    """The tokenizer of a reward model, its padding token known to the model."""
    if given is None:
        if not getattr(getattr(model, "config", None), "_name_or_path", ""):
            raise ValueError(
                f"reward_processing_classes[{i}] is needed: reward_funcs[{i}] ({type(model).__name__}) does not say "
                "where its tokenizer is"
            )
        given = load_reward_tokenizer(model, args, was_loaded=isinstance(source, str))
    if hasattr(model, "config"):
        mirror_pad_token(model, given)
    return given


def _name(function: Any) -> str:
    """The last part of a model's id, or a callable's name."""
    path = getattr(getattr(function, "config", None), "_name_or_path", "") if isinstance(function, nn.Module) else ""
    return path.rstrip("/").split("/")[-1] or callable_name(function)


def _as_list(value: Any) -> list[Any]:
    """One or several as a new list; None is none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
