"""Running the tool calls of assistant messages."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fast.event_loop import run_coroutine

Message = dict[str, Any]
Toolset = dict[str, Callable[..., Any]]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a call came to.

    Attributes:
        message: The `tool` message for the model; `content` is text, or the blocks that the tool returned as a list.
        failed: Whether the tool raised, is unknown, or was called in a way it cannot be.
    """

    message: Message
    failed: bool

    @property
    def images(self) -> list[Any]:
        """The images among the blocks."""
        content = self.message["content"]
        blocks = content if isinstance(content, list) else []
        return [block["image"] for block in blocks if isinstance(block, dict) and block.get("type") == "image"]


def run_calls(calls: Sequence[Sequence[Message]], toolsets: Sequence[Toolset]) -> list[list[Reply]]:
    """Run the calls of several conversations.

    Sync tools run one after the other as they were called; then all async ones run together, those of different
    conversations too. Replies stand in the order of the calls; TRL puts those of async tools last.

    Args:
        calls: A list of tool calls for each conversation.
        toolsets: The functions that each conversation may call, by name.
    """
    results = [[_call(call, tools) for call in row] for row, tools in zip(calls, toolsets, strict=True)]
    pending = [result for row in results for _, result in row if inspect.isawaitable(result)]
    awaited = iter(run_coroutine(_gather(pending)) if pending else [])
    return [
        [_reply(name, next(awaited) if inspect.isawaitable(result) else result) for name, result in row]
        for row in results
    ]


def _call(call: Message, tools: Toolset) -> tuple[str, Any]:
    """The tool's name with what it returned, or the exception."""
    function = call.get("function", call)
    name = function.get("name", "unknown") if isinstance(function, dict) else "unknown"
    try:
        kind = call.get("type", "function")
        if kind != "function":
            raise ValueError(f"Unsupported tool call type: {kind}")
        if name not in tools:
            raise ValueError(f"Tool {name} not found.")
        arguments = function["arguments"]
        return name, tools[name](**(json.loads(arguments) if isinstance(arguments, str) else arguments))
    # the model is told of any mistake: learning to avoid it is what it trains for
    except Exception as error:
        return name, error


async def _gather(awaitables: list[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*awaitables, return_exceptions=True))


def _reply(name: str, result: Any) -> Reply:
    failed = isinstance(result, BaseException)
    if failed:
        result = {"error": str(result)}
    content = result if isinstance(result, list) else str(result)
    return Reply(message={"role": "tool", "name": name, "content": content}, failed=failed)
