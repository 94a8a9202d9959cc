"""Completions as reward functions see them: text for standard prompts, messages for conversational ones."""

from __future__ import annotations

Completion = str | list[dict[str, str]]


def completion_text(completion: Completion) -> str:
    """The text of a completion; of a conversational one, the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
