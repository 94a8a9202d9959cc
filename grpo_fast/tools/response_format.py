"""How a model writes its turns, read off its chat template: a `response_template` for transformers' parser.

Two tool calls with known words are rendered; where the words come to stand says how calls are written: as one JSON
object with name and arguments (Hermes, Qwen 2.5 and 3, Llama 3, Granite, Mistral), as a name followed by JSON arguments
(DeepSeek, Kimi, Mistral, Gemma 4), as a name with tagged arguments (Qwen3-Coder and 3.5, GLM-4, Nemotron 3), or as
Python calls (LFM2, Llama 4). gpt-oss's harmony format has a response template of its own. The result is tried on the
rendered text before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from grpo_fast.tools.call_format import call_field
from grpo_fast.tools.chat import FIRST, SECOND, USER, Call, Message, ToolChat
from grpo_fast.tools.markers import TAG, either

TEXT = "probetext"
# how templates mark reasoning; the first pair is read where a template shows none
REASONING = (("<think>", "</think>"), ("<|channel>thought\n", "<channel|>"), ("[THINK]", "[/THINK]"))

HARMONY: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|start|>assistant",
    "fields": {
        "thinking": {"open": "<|channel|>analysis<|message|>", "close_pattern": r"(?:<\|end\|>|<\|return\|>)\s*"},
        "content": {
            # a preamble to a call is commentary to the user
            "open": ["<|channel|>final<|message|>", "<|channel|>commentary<|message|>"],
            "close_pattern": r"(?:<\|return\|>|<\|end\|>)\s*",
        },
        "tool_calls": {
            # the recipient stands before the channel or after it
            "open_pattern": r"(?:<\|channel\|>commentary )?to=functions\.(?P<name>[^\s<]+)\s*"
            r"(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>)?(?:json)?<\|message\|>",
            "close_pattern": r"<\|call\|>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}


def infer_response_template(chat: ToolChat, eos_token_ids: Sequence[int] = ()) -> dict[str, Any]:
    """A `response_template` for what a model writes that was trained on this chat template.

    Args:
        chat: A chat template that can render tool conversations.
        eos_token_ids: Tokens that end a completion, beside the tokenizer's own.

    Raises:
        ValueError: If the calls cannot be read back from the template's own rendering.
    """
    calls = _most_calls(chat)
    text = _after_user(chat, [chat.style.assistant(calls)])
    if "<|channel|>" in text and "<|message|>" in text:
        return HARMONY
    think, end_think = _reasoning_tags(chat.template)
    header = _header(chat, [], USER).partition(think)[0]
    reply = {"role": "tool", "name": FIRST[0], "content": TEXT}
    anchors = [header, _header(chat, [chat.style.assistant([FIRST]), chat.style.reply(reply, 0)], TEXT)]
    turn_end = _after_user(chat, [{"role": "assistant", "content": TEXT}]).rpartition(TEXT)[2].strip()
    ends = list(dict.fromkeys(end for end in (turn_end, *chat.end_tokens(eos_token_ids)) if end))
    turn = re.sub(rf"^\s*{re.escape(think)}.*?{re.escape(end_think)}", "", text.partition(header)[2], flags=re.DOTALL)
    try:
        field = call_field(turn, calls, chat.style, ends)
        template = {
            "defaults": {"role": "assistant"},
            "start_anchor": list(dict.fromkeys(anchor.partition(think)[0] for anchor in anchors)),
            "fields": {
                _reasoning_field(chat.template): {"open": think, "close_pattern": rf"{re.escape(end_think)}\s*"},
                "tool_calls": field,
                "content": {"close_pattern": rf"(?:{either(ends)})\s*" if ends else r"\Z"},
            },
        }
        read = _read_back(chat, template, turn, calls)
    # names and values do not stand where calls have them, or the parser stumbles over what was made of them
    except (ValueError, KeyError, TypeError) as error:
        read = str(error)
    if read != calls:
        raise ValueError(
            "cannot tell how the chat template writes tool calls: set response_template on the tokenizer, see response "
            f"parsing in transformers' documentation. {len(calls)} calls are written as {turn!r}, read as {read!r}"
        )
    return template


def _most_calls(chat: ToolChat) -> list[Call]:
    """Two calls, or the one that the template allows or writes."""
    try:
        text = _after_user(chat, [chat.style.assistant([FIRST, SECOND])])
    except TemplateError:
        return [FIRST]
    return [FIRST, SECOND] if SECOND[0] in text else [FIRST]


def _after_user(chat: ToolChat, messages: list[Message], *, generation_prompt: bool = False) -> str:
    """What is rendered after a user's text."""
    asked = [{"role": "user", "content": USER}, *messages]
    return chat.render(asked, generation_prompt=generation_prompt).rpartition(USER)[2]


def _header(chat: ToolChat, messages: list[Message], last: str) -> str:
    """What stands before a generated turn that follows `messages`, whose text ends with the word `last`."""
    opened = _after_user(chat, messages, generation_prompt=True)
    prompt = opened.removeprefix(_after_user(chat, messages)).lstrip()
    # some templates have no generation prompt, at least after a tool's reply
    tags: list[str] = TAG.findall(opened.rpartition(last)[2])
    return prompt or (tags[-1] if tags else opened)


def _reasoning_tags(template: str) -> tuple[str, str]:
    return next((pair for pair in REASONING if pair[0].strip() in template), REASONING[0])


def _reasoning_field(template: str) -> str:
    """The name under which the template itself reads a message's reasoning."""
    is_thinking = "reasoning_content" not in template and re.search(r"\bthinking\b", template)
    return "thinking" if is_thinking else "reasoning_content"


def _read_back(chat: ToolChat, template: dict[str, Any], turn: str, calls: list[Call]) -> Any:
    """The calls of `turn` as the parser reads them, or the message if it has text beside them."""
    types = {"probe_city": {"type": "string"}, "probe_days": {"type": "integer"}}
    parameters = {"type": "object", "properties": types}
    schemas = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name, _ in calls]
    message = chat.tokenizer.parse_response(turn, template, prefix="", tools=schemas)
    if message.get("content"):
        return message
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
