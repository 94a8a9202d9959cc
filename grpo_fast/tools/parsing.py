"""A completion's tokens as an assistant message."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def parse_response(
    tokenizer: Any,
    ids: Sequence[int],
    *,
    prefix: Sequence[int],
    tools: Sequence[Callable[..., Any] | dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Read a completion with the tokenizer's `response_template`, if it has one.

    A completion that the template cannot read, a malformed tool call for example, is plain content.

    Args:
        tokenizer: A tokenizer, not a processor.
        ids: The completion.
        prefix: The tokens before it: templates write the beginning of a turn, `<think>` for example.
        tools: What the prompt was rendered with; their schemas give arguments written as text their types.

    Returns:
        `role` and `content`, and where the completion has them `tool_calls` and its reasoning.
    """
    if ids and getattr(tokenizer, "response_template", None) is not None:
        try:
            message = tokenizer.parse_response(list(ids), prefix=list(prefix), tools=list(tools) if tools else None)
            return _checked(message, tokenizer.eos_token)
        # what JSON, types, missing keys and a thousand brackets raise in transformers' parser
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
    return {"role": "assistant", "content": tokenizer.decode(list(ids), skip_special_tokens=True)}


def _checked(message: dict[str, Any], eos_token: str | None) -> dict[str, Any]:
    """The message with content, and with a name and arguments in every call.

    Raises:
        ValueError: If a call has no name.
    """
    content = message.get("content") or ""
    message["content"] = content.removesuffix(eos_token) if eos_token and isinstance(content, str) else content
    for call in message.get("tool_calls", []):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call has no name: {call!r}")
        if function.get("arguments") is None:
            function["arguments"] = {}
    return message
