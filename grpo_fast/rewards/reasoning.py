"""Reward of visible reasoning steps, after open-r1's `reasoning_steps_reward`, and harder to feign."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from grpo_fast.rewards.prose import without_code
from grpo_fast.rewards.texts import completion_text, is_visible, reasoning_of

# what a line may begin with before its marker
_INDENT = r"[ \t>#*_]{0,20}"
_MARKER = re.compile(
    rf"^{_INDENT}(?:step\s{{1,3}}\d{{1,4}}\b\W{{0,6}}|\d{{1,4}}[.)](?=\s)|[-*+•](?=\s)"
    r"|(?:first|second|third|next|then|finally)(?:ly)?\s?,)",
    re.IGNORECASE,
)
_SPACES = re.compile(r"[\W\d_]+")


class ReasoningSteps:
    """min(1, steps / `target`): the share of a wanted number of steps that the reasoning shows.

    A step is a line that begins with `Step 1` (any number), `1.` or `1)`, a bullet (`-`, `*`, `+`, `•`), or a word with
    a comma: First, Second, Third, Next, Then, Finally (also with -ly); and has something to be seen after that, letters
    that no step before it had: repeated lines count once. Lines in code blocks do not count. Indents, `>`, `#` and
    emphasis may stand before.

    Looked at is the thought; in a completion without tags, all of it.
    """

    def __init__(self, *, target: int = 3, name: str = "reasoning_steps") -> None:
        """Nothing is read.

        Args:
            target: So many steps give 1; open-r1's is 3.
            name: In the metrics.

        Raises:
            ValueError: If the target is below 1.
        """
        if target < 1:
            raise ValueError(f"{name}: target must be at least 1 step, it is {target}")
        self.__name__ = name
        self._target = target

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        return [min(1.0, self._count(completion_text(completion)) / self._target) for completion in completions]

    def _count(self, text: str) -> int:
        seen: set[str] = set()
        for line in without_code(reasoning_of(text)).splitlines():
            marker = _MARKER.match(line)
            if marker:
                step = line[marker.end() :]
                # what differs in numbers, signs or case only is the same step
                words = _SPACES.sub(" ", step).strip().lower()
                if words or is_visible(step):
                    seen.add(words)
                if len(seen) >= self._target:
                    break
        return len(seen)
