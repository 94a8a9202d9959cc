"""One completion against its gold answers, as the worker processes do it: no torch here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from grpo_fast.rewards.math.answers import Answer, UnreadableError, read_gold
from grpo_fast.rewards.math.comparing import is_right
from grpo_fast.rewards.math.extraction import LONGEST_ANSWER, Place, final_answer

# it says once a process that its own time limit is off
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def grade(
    golds: Sequence[str], completion: str, places: tuple[Place, ...], needs_think: bool, tolerance: float
) -> tuple[str, str]:
    """Grade a completion.

    Args:
        golds: One gold answer or several, each of which is right.
        completion: The text.
        places: Where the final answer may stand, of `extraction.PLACES`.
        needs_think: As in `final_answer`.
        tolerance: As in `is_right`.

    Returns:
        'right', 'wrong', 'unparsed_gold' or 'unparsed_answer', and the final answer as it was found ('' if none was).
    """
    readable = [gold for gold in map(_gold, golds) if gold is not None]
    if not readable:
        return "unparsed_gold", ""
    found = final_answer(completion, places=places, needs_think=needs_think)
    if found is None:
        return "unparsed_answer", ""
    status = "unparsed_answer"
    for gold in readable:
        verdict = _verdict(gold, found, tolerance)
        if verdict == "right":
            return verdict, found
        # an answer that one gold answer makes sense of is wrong, not unread
        status = "wrong" if verdict == "wrong" else status
    return status, found


# completions of one prompt often agree
@functools.lru_cache(maxsize=4096)
def _verdict(gold: Answer, found: str, tolerance: float) -> str:
    try:
        return "right" if is_right(gold, found, tolerance=tolerance) else "wrong"
    except UnreadableError:
        return "unparsed_answer"


def describe_gold(golds: Sequence[str], tolerance: float) -> tuple[str, str]:
    """For the linter: the kind of the first readable gold answer, and why no answer could score ('' if one can)."""
    readable = [(text, gold) for text in golds if (gold := _gold(text)) is not None]
    if not readable:
        return "unreadable", _reason(golds[0]) if golds else "there is none"
    for text, gold in readable:
        written = gold_text(text)
        try:
            if is_right(gold, final_answer(rf"\boxed{{{written}}}") or "", tolerance=tolerance):
                return gold.kind, ""
        except UnreadableError:
            continue
    return readable[0][1].kind, "it does not equal itself"


def gold_text(text: str) -> str:
    """The answer in a gold solution: its last box, what follows `####` or "answer is", or all of it."""
    return final_answer(text, places=("boxed", "tag", "phrase")) or text


def _reason(text: str) -> str:
    try:
        if not text.strip():
            return "it is empty"
        if len(gold_text(text)) > LONGEST_ANSWER:
            return f"it is longer than {LONGEST_ANSWER} characters"
        read_gold(gold_text(text))
    except UnreadableError as error:
        return f"it cannot be read: {error}"
    return ""


# completions of one prompt share their gold answer, and a data set has few kinds of short ones
@functools.lru_cache(maxsize=4096)
def _gold(text: str) -> Answer | None:
    written = gold_text(text)
    if len(written) > LONGEST_ANSWER:
        return None
    try:
        return read_gold(written)
    except UnreadableError:
        return None
