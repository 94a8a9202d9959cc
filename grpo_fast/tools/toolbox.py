"""The tools of a run: checked once, and the chat format in which the model calls them."""

from __future__ import annotations

import inspect
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

from grpo_fast.tools.chat import ToolChat, tool_chat
from grpo_fast.tools.environments import Environments, Factory, Reward, methods
from grpo_fast.tools.response_format import infer_response_template

Tool = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Toolbox:
    """What `make_toolbox` found.

    Attributes:
        tools: All tools: the user's own, then the environments' methods.
        standalone: The user's own.
        environments: The environments, if there is a factory.
        chat: The chat template, known to render tool conversations.
        environment_rewards: A reward function and its name for each environment class with `get_reward`.
        has_async: Whether a tool is async.
        chat_template: None. TRL trains tools on patched copies of templates; ours work with the model's own.
    """

    tools: list[Tool]
    standalone: list[Tool]
    environments: Environments | None
    chat: ToolChat
    environment_rewards: list[tuple[Reward, str]]
    has_async: bool
    chat_template: None = None

    def tools_of(self, environment: str | None = None) -> list[Tool]:
        """The tools that a prompt of this environment is rendered with."""
        return self.standalone + (self.environments.tools[environment] if self.environments else [])

    def functions(self, instance: Any = None) -> dict[str, Tool]:
        """What a rollout in environment `instance` may call, by name."""
        return {tool.__name__: tool for tool in self.standalone + ([] if instance is None else methods(instance))}


def make_toolbox(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: Sequence[Tool] | None,
    environment_factory: Factory | dict[str, Factory] | None,
    *,
    chat_template_kwargs: dict[str, Any] | None = None,
    eos_token_ids: Sequence[int] = (),
) -> Toolbox | None:
    """Check tools and environments and how the model is to call them; None if there are neither.

    A tokenizer without a `response_template` is given one, read off its chat template: any template whose calls can
    be read back works, where TRL knows some forty by heart.

    Args:
        processing_class: The tokenizer, or the processor with its tokenizer.
        tools: Functions with type hints and a docstring that describes the arguments; sync or async.
        environment_factory: An environment class, or a dict of them by the name in the `environment` column.
        chat_template_kwargs: As in the config.
        eos_token_ids: Tokens that end a completion, beside the tokenizer's own.

    Raises:
        ValueError: If a tool is no function or has no schema, two have one name, an environment has no `reset`, or
            the chat template cannot render a conversation with tools, or not in a way that can be continued or read.
    """
    standalone = _as_list(tools)
    if environment_factory is not None:
        warn_experimental("environment_factory")
    environments = None if environment_factory is None else Environments(environment_factory)
    if not standalone and environments is None:
        return None
    owned = environments.tools if environments else {}
    for name, of_environment in owned.items() or [(None, [])]:
        _check_tools(standalone + of_environment, "tools" if name is None else f"environment {name!r} with tools")
    every = standalone + [tool for of_environment in owned.values() for tool in of_environment]
    chat = tool_chat(processing_class, chat_template_kwargs)
    # a template that cannot be continued shows before the run
    chat.suffix_ids([{"role": "tool", "name": "probe", "content": "probe"}], eos_token_ids=eos_token_ids)
    _ensure_response_template(chat, eos_token_ids)
    return Toolbox(
        tools=every,
        standalone=standalone,
        environments=environments,
        chat=chat,
        environment_rewards=environments.rewards() if environments else [],
        has_async=any(inspect.iscoroutinefunction(tool) for tool in every),
    )


def warn_experimental(argument: str) -> None:
    """Say that an argument of the trainer may change; TRL_EXPERIMENTAL_SILENCE=1 keeps it quiet, as in TRL."""
    if os.environ.get("TRL_EXPERIMENTAL_SILENCE", "0") != "1":
        warnings.warn(
            f"{argument} is experimental and may change; set TRL_EXPERIMENTAL_SILENCE=1 to silence this",
            UserWarning,
            stacklevel=3,
        )


def _as_list(tools: Sequence[Tool] | None) -> list[Tool]:
    if tools is not None and not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of functions, it is {type(tools).__name__}")
    return list(tools or [])


def _check_tools(tools: list[Tool], where: str) -> None:
    for tool in tools:
        if not inspect.isfunction(tool) and not inspect.ismethod(tool):
            raise ValueError(f"{where}: a tool must be a function or a method, {tool!r} is {type(tool).__name__}")
        try:
            get_json_schema(tool)
        except (DocstringParsingException, TypeHintParsingException) as error:
            raise ValueError(
                f"{where}: {tool.__name__} needs type hints and a docstring that describes its arguments: {error}"
            ) from error
    twice = [name for name, count in Counter(tool.__name__ for tool in tools).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: the model cannot tell tools of one name apart: {', '.join(twice)}")


def _ensure_response_template(chat: ToolChat, eos_token_ids: Sequence[int]) -> None:
    tokenizer = chat.tokenizer
    if getattr(tokenizer, "response_template", None) is not None:
        return
    if getattr(tokenizer, "response_schema", None) is not None:
        warnings.warn(
            "the tokenizer's response_schema is not read: this version of transformers parses by response_template, "
            "which is taken from the chat template here",
            FutureWarning,
            stacklevel=3,
        )
    tokenizer.response_template = infer_response_template(chat, eos_token_ids)
