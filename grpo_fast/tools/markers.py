"""The text around a rendered tool call, as patterns: what opens it, what closes it, and what stands around them all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# a tag is never cut: `<tool_call>` and `<tool_calls>` begin alike
ATOM = re.compile(r"<[^<>]*>|\[/?[A-Z_]+\]|\w+|\s+|.", re.DOTALL)
TAG = re.compile(r"<[^<>]*>|\[/?[A-Z_]+\]")
NAME = r"(?P<name>[^\s<>{}()\[\]\"'|]+)"


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """The text around the calls of a turn.

    Attributes:
        before: Written once, before the first call.
        open: Written before every call.
        close: Written after every call.
        after: Written once, after the last call.
    """

    before: str
    open: str
    close: str
    after: str


def wrapping(head: str, between: str | None, tail: str) -> Wrapping:
    """What belongs to each call and what to the turn.

    Args:
        head: Text before the first call.
        between: Text between the first and the second, None if a turn has one call at most.
        tail: Text after the last call.
    """
    if between is None:
        return Wrapping(before="", open=head, close=tail, after="")
    opened, closed = common_end(head, between), common_start(between, tail)
    # a separator such as a comma is neither
    return Wrapping(
        before=head.removesuffix(opened),
        open=opened,
        close=closed,
        after=tail.removeprefix(closed),
    )


def common_start(left: str, right: str) -> str:
    """The longest common start in whole atoms."""
    shared = []
    for a, b in zip(ATOM.findall(left), ATOM.findall(right), strict=False):
        if a != b:
            break
        shared.append(a)
    return "".join(shared)


def common_end(left: str, right: str) -> str:
    """The longest common end in whole atoms."""
    shared = []
    for a, b in zip(reversed(ATOM.findall(left)), reversed(ATOM.findall(right)), strict=False):
        if a != b:
            break
        shared.append(a)
    return "".join(reversed(shared))


def pattern(marker: str, call_id: str | None = None) -> str:
    """A regular expression for `marker` without the space around it: any space, any number, any id of a call."""
    marker = marker.strip()
    if call_id and call_id in marker:
        before, _, after = marker.partition(call_id)
        return pattern(before) + r"[^\s<>\[\]{}]+?" + pattern(after)
    return "".join(
        r"\s*" if atom.isspace() else r"\d+" if atom.isdigit() else re.escape(atom) for atom in ATOM.findall(marker)
    )


def optional(marker: str) -> str:
    """A regular expression for a marker that may be missing, with the space around it."""
    return rf"(?:{pattern(marker)}\s*)?" if marker.strip() else ""


def either(markers: Sequence[str]) -> str:
    """A regular expression for any of `markers`, longest first."""
    return "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True))
