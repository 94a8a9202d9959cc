r"""Where the final answer of a completion stands.

Only the text after the last `</think>` counts; a thought that was begun again and not ended leaves none. In it, the
first of these that there is:

1. `boxed`: the last `\boxed{...}` or `\fbox{...}` that is closed and not empty. Boxes before it do not count. A box in
   a box is its content.
2. `tag`: what is in the last `<answer>...</answer>`.
3. `phrase`: what follows the last "answer is", "answer:", "answer =" or GSM8K's "####", to the end of its sentence.
4. `whole`: the whole text, if it is one short line; it must then be an answer and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from grpo_fast.rewards.texts import after_thought

Place: TypeAlias = Literal["boxed", "tag", "phrase", "whole"]
PLACES: tuple[Place, ...] = ("boxed", "tag", "phrase", "whole")

# no final answer is longer, in characters
LONGEST_ANSWER = 2000
LONGEST_WHOLE = 200
# boxes that are looked at from the end, empty or not closed ones among them
MOST_BOXES = 100

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PHRASE = re.compile(
    r"(?:\banswer\b\**\s*(?:(?:is|are)\b\s*:?|[:=])|####)[\s*]*(?:\$\$?)?\s*(?:\\[(\[])?", re.IGNORECASE
)
# a full stop inside a number is none
_SENTENCE_END = re.compile(r"\.(?=\s|$|\*)|\n|\.(?=\$)")


def final_answer(text: str, *, places: Sequence[Place] = PLACES, needs_think: bool = False) -> str | None:
    """The final answer of a completion as it is written there, or None.

    Args:
        text: The completion.
        places: Where answers may stand; the order is the module's.
        needs_think: A completion without `</think>` has no answer.
    """
    rest = after_thought(text, needs_think=needs_think)
    if rest is None:
        return None
    finders = {"boxed": last_box, "tag": last_tag, "phrase": last_phrase, "whole": whole}
    for place in PLACES:
        found = finders[place](rest) if place in places else None
        if found is not None:
            return found if len(found) <= LONGEST_ANSWER else None
    return None


def last_box(text: str) -> str | None:
    """The content of the last box that is closed and not empty; a box around it is the one that counts."""
    starts = list(_BOX.finditer(text))[-MOST_BOXES:]
    best: tuple[int, str] | None = None
    for match in reversed(starts):
        end = _closing_brace(text, match.end())
        if end is None:
            continue
        content = text[match.end() : end]
        if best is None:
            if unboxed(content).strip():
                best = (match.start(), content)
        elif match.end() <= best[0] < end:
            best = (match.start(), content)
    return None if best is None else unboxed(best[1]).strip()


def unboxed(text: str) -> str:
    r"""Without the boxes in it: their contents stay, in braces unless it is one box alone."""
    for _ in range(MOST_BOXES):
        match = _BOX.search(text)
        if match is None:
            break
        end = _closing_brace(text, match.end())
        if end is None:
            break
        alone = not text[: match.start()].strip() and not text[end + 1 :].strip()
        content = text[match.end() : end]
        text = content if alone else f"{text[: match.start()]}{{{content}}}{text[end + 1 :]}"
    return text


def _closing_brace(text: str, start: int) -> int | None:
    """The place of the brace that closes one opened before `start`; escaped braces do not count."""
    depth, i = 1, start
    # an answer that is too long is none, wherever its brace is
    stop = min(len(text), start + 2 * LONGEST_ANSWER)
    while i < stop:
        if text[i] == "\\":
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
        i += 1
    return None


def last_tag(text: str) -> str | None:
    """What is in the last closed `<answer>...</answer>`, and in it in the last phrase if there is one."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    content = "" if start < 0 else text[start + len("<answer>") :].partition("</answer>")[0].strip()
    return (last_phrase(content) or content) if content else None


def last_phrase(text: str) -> str | None:
    """What follows the last "answer is", to the end of the sentence."""
    matches = list(_PHRASE.finditer(text))
    for match in reversed(matches[-MOST_BOXES:]):
        opening = match.group().rstrip()
        rest = text[match.end() : match.end() + LONGEST_ANSWER + 1]
        for mark, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if opening.endswith(mark) and closing in rest:
                found = _after_math(rest, closing)
                break
        else:
            end = _SENTENCE_END.search(rest)
            found = rest if end is None else rest[: end.start()]
            if opening.endswith("$"):
                found = "$" + found
        if found.strip(" *$"):
            return found.strip(" *")
    return None


def _after_math(rest: str, closing: str) -> str:
    """The formula at the start of `rest`, with a unit or a percent sign that follows it."""
    formula, _, tail = rest.partition(closing)
    unit = re.match(r"\s*(\\?%|percent\b|[A-Za-z]+\b)?", tail)
    word = (unit.group(1) or "") if unit else ""
    sentence_goes_on = word and re.match(r"\s*[^\s.,;!*]", tail[unit.end() :] if unit else "")
    return formula if not word or sentence_goes_on else f"{formula} {word}"


def whole(text: str) -> str | None:
    """The whole text, if it is one short line."""
    line = text.strip()
    return line if line and "\n" not in line and len(line) <= LONGEST_WHOLE else None
