r"""A text without what is no prose: code, formulae, addresses and tags.

Removed are, in this order, each replaced by a space or, where it spans lines, a line feed:

1. code blocks between lines of three or more backticks or tildes, an open one to the end, and code spans in a line;
2. formulae: `$$...$$`, `\(...\)`, `\[...\]`, `\begin{...}...\end{...}`, and `$...$` in one paragraph, where as pandoc
   has it no space follows the first `$`, none stands before the second, and no digit comes after it: in "$5 and $10"
   there is none;
3. commands such as `\frac` and `\boxed`, with the braces that follow them and what is within; but `\text{...}` and its
   kin outside of formulae leave their words;
4. web and mail addresses, and tags in angle brackets.

All of it takes time linear in the text, whatever is opened and never closed.
"""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t>]{0,12}(`{3,}|~{3,})", re.MULTILINE)
_ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>\"'（）。，]{1,2000}|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,64}")
_TAG = re.compile(r"</?[a-zA-Z][^<>\n]{0,200}>")
_TEXT_COMMANDS = frozenset({"text", "textbf", "textit", "textrm", "emph", "mbox"})
_COMMAND = re.compile(r"\\([a-zA-Z]{1,40})\*?|\\[^a-zA-Z\s]")
_DOLLARS = re.compile(r"\$\$?")
_ENVIRONMENT = re.compile(r"\\(begin|end)\{([a-zA-Z]{1,40}\*?)\}")
_BREAK = re.compile(r"\n[ \t]*\n")


def prose_of(text: str) -> str:
    """The text without code, formulae, addresses and tags."""
    text = without_latex(without_code(text))
    return _TAG.sub(" ", _ADDRESS.sub(" ", text))


def without_code(text: str) -> str:
    """The text without code blocks and code spans."""
    kept, place = [], 0
    fence = None
    for match in _FENCE.finditer(text):
        mark = match.group(1)
        if fence is None:
            kept.append(text[place : match.start()])
            fence = mark
        elif mark[0] == fence[0] and len(mark) >= len(fence):
            line_end = text.find("\n", match.end())
            place = len(text) if line_end < 0 else line_end
            fence = None
            kept.append("\n")
    if fence is None:
        kept.append(text[place:])
    return "\n".join(_without_spans(line) for line in "".join(kept).split("\n"))


def _without_spans(line: str) -> str:
    if "`" not in line:
        return line
    parts = re.split(r"(`+)", line)
    # a run of backticks closes with the next run of its length
    following: dict[str, int] = {}
    closing = [0] * len(parts)
    for i in range(len(parts) - 2, 0, -2):
        closing[i] = following.get(parts[i], 0)
        following[parts[i]] = i
    kept, i = [parts[0]], 1
    while i < len(parts):
        end = closing[i]
        kept.append(" ")
        i = end or i
        kept.append(parts[i + 1])
        i += 2
    return "".join(kept)


def without_latex(text: str) -> str:
    r"""The text without formulae and commands."""
    text = _without_environments(text)
    for start, end in ((r"\[", r"\]"), (r"\(", r"\)")):
        text = _without_between(text, start, end)
    text = _without_dollars(text)
    return _without_commands(text)


def _without_environments(text: str) -> str:
    r"""Without `\begin{a}...\end{a}`; environments within others go with them."""
    kept: list[str] = []
    place, open_names = 0, list[str]()
    ends: dict[str, int] = {}
    matches = list(_ENVIRONMENT.finditer(text))
    for match in matches:
        if match.group(1) == "end":
            ends[match.group(2)] = match.start()
    for match in matches:
        kind, name = match.groups()
        if kind == "begin" and ends.get(name, -1) > match.start():
            if not open_names:
                kept.append(text[place : match.start()] + "\n")
            open_names.append(name)
        elif kind == "end" and name in open_names[-1:]:
            open_names.pop()
            if not open_names:
                place = match.end()
    # one that is not closed in order ends where the text does
    if not open_names:
        kept.append(text[place:])
    return "".join(kept)


def _without_between(text: str, start: str, end: str) -> str:
    kept, place = [], 0
    while (opening := text.find(start, place)) >= 0:
        closing = text.find(end, opening + len(start))
        if closing < 0:
            break
        kept.append(text[place:opening] + (" " if text.find("\n", opening, closing) < 0 else "\n"))
        place = closing + len(end)
    return "".join([*kept, text[place:]])


def _without_dollars(text: str) -> str:
    kept, place = [], 0
    opening: re.Match[str] | None = None
    marks = [match for match in _DOLLARS.finditer(text) if text[match.start() - 1 : match.start()] != "\\"]
    breaks = iter([*(match.start() for match in _BREAK.finditer(text)), len(text)])
    next_break = next(breaks)
    for mark in marks:
        if opening is not None and opening.group() == mark.group() and _closes(text, mark):
            while next_break < opening.start():
                next_break = next(breaks)
            if mark.group() == "$$" or mark.start() <= next_break:
                kept.append(text[place : opening.start()])
                kept.append(" " if text.find("\n", opening.start(), mark.start()) < 0 else "\n")
                place, opening = mark.end(), None
                continue
        if opening is None or opening.group() != "$$" or mark.group() == "$$":
            opening = mark if _opens(text, mark) else None
    return "".join([*kept, text[place:]])


def _opens(text: str, mark: re.Match[str]) -> bool:
    after = text[mark.end() : mark.end() + 1]
    return mark.group() == "$$" or bool(after and not after.isspace())


def _closes(text: str, mark: re.Match[str]) -> bool:
    before, after = text[mark.start() - 1], text[mark.end() : mark.end() + 1]
    return mark.group() == "$$" or not (before.isspace() or after.isdigit())


def _without_commands(text: str) -> str:
    if "\\" not in text:
        return text
    kept, place = [], 0
    closing: dict[int, int] | None = None
    for match in _COMMAND.finditer(text):
        if match.start() < place:
            continue
        kept.append(text[place : match.start()] + " ")
        place = match.end()
        if match.group(1) is None or match.group(1) in _TEXT_COMMANDS:
            continue
        closing = _braces(text) if closing is None else closing
        while place in closing:
            place = closing[place] + 1
    return "".join([*kept, text[place:]])


def _braces(text: str) -> dict[int, int]:
    """Where each brace that is opened and closed is closed."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"[{}]", text):
        if match.group() == "{":
            opened.append(match.start())
        elif opened:
            pairs[opened.pop()] = match.start()
    return pairs
