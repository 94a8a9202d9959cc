"""The `tool_calls` field of a response template, from a rendered turn whose calls are known."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_fast.tools.chat import Call, CallStyle
from grpo_fast.tools.markers import NAME, TAG, Wrapping, common_end, common_start, either, optional, pattern, wrapping

Field = dict[str, Any]
FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
# brackets nest to any depth: the parser's engine knows recursion
PYTHON_VALUE = (
    r"(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
    r"|(?P<nested>[\[{(](?:[^\[\]{}()'\"]|'[^']*'|\"[^\"]*\"|(?&nested))*[\]})])|[^,()\[\]{}]*)"
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where a call stands in the rendered turn.

    Attributes:
        start: Where its JSON begins if that has the name in it, otherwise where the name does.
        end: Where its arguments end.
        value: Its JSON, or its arguments' JSON, decoded; None if it has none.
        value_start: Where that begins.
    """

    start: int
    end: int
    value: Any = None
    value_start: int = 0


def call_field(turn: str, calls: Sequence[Call], style: CallStyle, ends: Sequence[str]) -> Field:
    """The field that reads calls written as they are in `turn`.

    Args:
        turn: A rendered assistant turn without its header, which has the calls and nothing else.
        calls: One call or two, in order.
        style: How the calls were given to the template.
        ends: What ends a turn.
    """
    spans = [_span(turn, call) for call in calls]
    first, is_list = spans[0], isinstance(spans[0].value, list)
    tail = turn[spans[-1].end :]
    tail = tail[: min((tail.index(end) for end in ends if end in tail), default=len(tail))]
    between = turn[first.end : spans[1].start] if len(spans) == 2 and not is_list else None
    around = wrapping(turn[: first.start], between, tail)
    if first.value is not None and first.value_start == first.start:
        return _object_field(first.value, calls[0], around, ends)
    name_end = first.start + len(calls[0][0])
    if first.value is not None:
        middle = pattern(turn[name_end : first.value_start], style.id_of(calls[0][0], 0))
        return _field(around, rf"{NAME}\s*{middle}", ends, content="json")
    body = turn[name_end : first.end]
    return _python_field(around) if body.startswith("(") else _tagged_field(body, calls[0], around, ends)


def _span(turn: str, call: Call) -> Span:
    """Where `call` stands: as JSON around its name, as a name with JSON behind it, or up to its last value."""
    name, arguments = call
    named = turn.index(name)
    for start in (match.start() for match in re.finditer(r"[\[{]", turn[:named])):
        value, end = _json_at(turn, start)
        if end > named:
            return Span(start=start, end=end, value=value, value_start=start)
    brace = turn.find("{", named)
    value, end = _json_at(turn, brace) if brace >= 0 else (None, 0)
    if value == arguments:
        return Span(start=named, end=end, value=value, value_start=brace)
    *_, last = (str(value) for value in arguments.values())
    end = turn.index(last, named) + len(last)
    # the bracket that closes Gemma's or Python's arguments is part of them
    if turn[end : end + 1] in ("}", ")"):
        end += 1
    return Span(start=named, end=end)


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` and its end, or (None, 0)."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return None, 0


def _field(around: Wrapping, inner: str, ends: Sequence[str], **content: Any) -> Field:
    opening = optional(around.before) + pattern(around.open) + inner
    # without a mark of its own a call ends where the turn does, or where the next one begins
    close = pattern(around.close) or rf"(?={either(ends)}|{opening}|\Z)"
    return {
        "open_pattern": opening,
        "close_pattern": rf"{close}\s*{optional(around.after)}",
        "repeats": True,
        "transform": FUNCTION,
        **content,
    }


def _object_field(value: Any, call: Call, around: Wrapping, ends: Sequence[str]) -> Field:
    """Name and arguments in one JSON object, or in a list of them."""
    item = value[0] if isinstance(value, list) else value
    name, arguments = _path(item, call[0]), _path(item, call[1])
    if not around.open.strip():
        # nothing but its keys tells a bare object from text
        keys = rf"\{{\s*\"{name}\"\s*:\s*\"(?P<name>[^\"]+)\"\s*,\s*\"{arguments}\"\s*:\s*"
        bare = Wrapping(before="", open="", close="", after="")
        field = _field(bare, keys, ends, content="json")
        return field | {"close_pattern": rf"\}}\s*(?:{either(ends)}|\Z)\s*"}
    field = _field(around, "", ends, content="json")
    if isinstance(value, list):
        del field["repeats"]
        function = {"name": f"{{{name}}}", "arguments": f"{{{arguments}}}"}
        return field | {"transform_each": True, "transform": {"type": "function", "function": function}}
    whole = {("name", "arguments"): "{content}", ("function.name", "function.arguments"): "{content.function}"}
    parts = {"name": f"{{content.{name}}}", "arguments": f"{{content.{arguments}}}"}
    # whole where the keys allow it, so that a call without arguments is one
    return field | {"transform": {"type": "function", "function": whole.get((name, arguments), parts)}}


def _path(item: dict[str, Any], wanted: Any) -> str:
    """The dotted path to `wanted`, which may be there as JSON text."""
    for key, value in item.items():
        if value == wanted or value == json.dumps(wanted):
            return key
        if isinstance(value, dict) and (below := _path(value, wanted)):
            return f"{key}.{below}"
    return ""


def _tagged_field(body: str, call: Call, around: Wrapping, ends: Sequence[str]) -> Field:
    """Arguments as marked keys and values; `body` runs from the name to the last value."""
    (key, value), (last_key, _) = call[1].items()
    before, _, rest = body.partition(key)
    assign, _, rest = rest.partition(str(value))
    separator = rest.partition(last_key)[0]
    if quote := re.fullmatch(r"\s*[:=]\s*(\S+)", assign):
        return _dialect_field(body, quote.group(1), around, ends)
    opened = common_end(before, separator)
    closed = common_start(separator, around.close)
    # the last tag alone ends a call: models forget inner ones
    outer = TAG.findall(around.close.removeprefix(closed))[-1:]
    tag = rf"{pattern(opened)}(?P<key>[^\s<>]+?){pattern(assign)}\s*(?P<value>.*?)\s*{pattern(closed)}"
    return _field(
        Wrapping(
            before=around.before,
            open=around.open,
            close="".join(outer),
            after=around.after,
        ),
        NAME + pattern(before.removesuffix(opened)),
        ends,
        content="xml-inline",
        # text: the tool's own schema says which values are numbers
        content_args={"tag_pattern": tag, "value_parser": {"name": "text"}},
    )


def _dialect_field(body: str, quote: str, around: Wrapping, ends: Sequence[str]) -> Field:
    """JSON with bare keys and quotes of its own."""
    arguments = {"string_delims": [[quote, quote]], "unquoted_keys": True}
    return _field(around, NAME + pattern(body[: body.index("{")]), ends, content="json", content_args=arguments)


def _python_field(around: Wrapping) -> Field:
    """Calls in Python's syntax, in one list."""
    opening, closing = pattern(around.before), pattern(around.after)
    # a comma opens a call only within the list: text has commas, too
    follows = rf"(?<={opening}(?:(?!{closing}).)*\)),\s*"
    return {
        "open_pattern": rf"(?:{opening}|{follows}){NAME}\(",
        "close_pattern": rf"\)(?=,|\s*{closing})(?:\s*{closing}\s*)?",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": rf"(?P<key>\w+)\s*=\s*{PYTHON_VALUE}",
            "value_parser": {"name": "json", "args": {"string_delims": [["'", "'"]], "allow_non_json": True}},
        },
        "transform": FUNCTION,
    }
