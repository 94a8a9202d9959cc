"""The text of a completion, its chain of thought and its summary, and which completions are of one group.

The thought ends at the last `</think>`; what follows is the summary. All functions take time linear in the text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

THINK_START, THINK_END = "<think>", "</think>"

Row: TypeAlias = float | None
LogMetric: TypeAlias = Callable[[str, float], None]

# characters looked at from the end of a prompt for the tag that opens the thought
_PROMPT_TAIL = 200
# control and format characters (zero-width ones, direction marks), surrogates, private use and unassigned
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
# letters by their category, but nothing to be seen
_BLANK_LETTERS = frozenset("\u115f\u1160\u3164\uffa0")


@dataclass(frozen=True)
class Parts:
    """A completion cut at its last `</think>`.

    Attributes:
        thought: Without its tags; '' where there is none.
        summary: What follows; '' where a thought was begun and never ended.
        is_ended: Whether there is a `</think>`.
    """

    thought: str
    summary: str
    is_ended: bool


def completion_text(completion: Any) -> str:
    """A completion as text: itself, or its messages of the assistant, one after another.

    Reasoning that a parser has put into a message's field of its own comes first, in `<think>` and `</think>`.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(_message_text(message) for message in completion if message.get("role") in (None, "assistant"))


def prompt_text(prompt: Any) -> str:
    """The text of a prompt, or of the last message of its user."""
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") for message in prompt if message.get("role") == "user"]
    return content_text(contents[-1]) if contents else ""


def content_text(content: Any) -> str:
    """A message's content as text: itself, or its parts of text."""
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    return content or ""


def opens_thought(prompt: Any) -> bool:
    """Whether a prompt ends with `<think>`; of messages, whether the last one is the assistant's and does.

    What a chat template adds to messages is not seen here: `template_opens_thought`.
    """
    if not isinstance(prompt, str):
        is_begun = bool(prompt) and prompt[-1].get("role") == "assistant"
        prompt = content_text(prompt[-1].get("content")) if is_begun else ""
    return prompt[-_PROMPT_TAIL:].rstrip().endswith(THINK_START)


def template_opens_thought(processing_class: Any, **chat_template_kwargs: Any) -> bool:
    """Whether a chat template ends the prompt with `<think>`, for the argument `think_in_prompt` of rewards.

    Args:
        processing_class: The policy's tokenizer or processor.
        chat_template_kwargs: As the run's, such as `enable_thinking`.
    """
    chat = [{"role": "user", "content": "a"}]
    text = processing_class.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **chat_template_kwargs
    )
    return opens_thought(text)


def split_thought(text: str, *, is_begun: bool = False) -> Parts:
    """Thought and summary of a completion.

    Args:
        text: The completion.
        is_begun: The prompt has opened the thought.
    """
    before, end, after = text.rpartition(THINK_END)
    if end:
        return Parts(thought=_without_opening(before), summary=after, is_ended=True)
    if is_begun or THINK_START in text:
        return Parts(thought=_without_opening(text), summary="", is_ended=False)
    return Parts(thought="", summary=text, is_ended=False)


def after_thought(text: str, *, needs_think: bool = False) -> str | None:
    """What follows the last `</think>`; None in a thought that is not ended.

    Args:
        text: The completion.
        needs_think: Without `</think>` there is nothing after it, else all of the text.
    """
    parts = split_thought(text)
    is_open = THINK_START in (parts.summary if parts.is_ended else text)
    return None if is_open or (needs_think and not parts.is_ended) else parts.summary


def reasoning_of(text: str) -> str:
    """The thought of a completion; all of it where there are no tags."""
    parts = split_thought(text)
    return parts.thought if parts.is_ended or parts.thought else parts.summary


def summary_of(completion: Any, *, is_begun: bool = False) -> str | None:
    """What a completion says after its last `</think>`, without spaces at its ends.

    Args:
        completion: Text or messages; of messages the last one of the assistant.
        is_begun: The prompt has opened the thought.

    Returns:
        All of it where there are no tags; None where the thought is not ended.
    """
    if not isinstance(completion, str):
        own = [message for message in completion if message.get("role") in (None, "assistant")]
        completion = _message_text(own[-1]) if own else ""
        # a parser has taken the thought out
        is_begun = is_begun and not (own and (own[-1].get("reasoning_content") or own[-1].get("thinking")))
    parts = split_thought(completion, is_begun=is_begun)
    is_open = not parts.is_ended and (is_begun or THINK_START in completion)
    return None if is_open or THINK_START in parts.summary else parts.summary.strip()


def is_visible(text: str) -> bool:
    """Whether there is anything in a text that can be seen: not only spaces, zero-width and control characters."""
    # most texts begin with one that can
    return any(not character.isspace() and _can_be_seen(character) for character in text)


def groups_of(prompts: Sequence[Any], num_generations: int | None = None) -> list[range]:
    """The rows of each group: completions of one prompt that follow each other.

    Args:
        prompts: One a completion. Two groups beside each other may have equal prompts.
        num_generations: Most completions of a group, which tells such groups apart; None where none are.
    """
    starts = [row for row in range(len(prompts)) if row == 0 or prompts[row] != prompts[row - 1]]
    runs = [range(start, stop) for start, stop in pairwise([*starts, len(prompts)])]
    if num_generations is None:
        return runs
    return [run[i : i + num_generations] for run in runs for i in range(0, len(run), num_generations)]


def log_share(log_metric: LogMetric | None, name: str, flags: Sequence[bool]) -> None:
    """Log the share of a call's completions for which something holds."""
    if log_metric is not None and flags:
        log_metric(name, sum(flags) / len(flags))


def _message_text(message: dict[str, Any]) -> str:
    content = content_text(message.get("content"))
    reasoning = message.get("reasoning_content") or message.get("thinking")
    if not reasoning or THINK_END in content:
        return content
    return f"{THINK_START}{reasoning}{THINK_END}{content}"


def _without_opening(text: str) -> str:
    before, opening, after = text.partition(THINK_START)
    return after if opening and not before.strip() else text


def _can_be_seen(character: str) -> bool:
    return unicodedata.category(character) not in _INVISIBLE and character not in _BLANK_LETTERS
