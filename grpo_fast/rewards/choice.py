r"""Multiple choice: the option that the summary states last against the right one.

Looked at is what follows the last `</think>`. Statements are, in two ranks:

* clear: `\boxed{B}` (also `\boxed{\text{(B)}}`), `<answer>B</answer>`, and "answer is B", "answer: B", "option B is
  correct", with brackets, emphasis or "option" about the letter;
* plain: a letter in brackets or in bold, and a line that is nothing but a letter.

The last clear statement counts, or else the last plain one. After "not" or "n't" neither is one. An option may be
followed by its text: `\boxed{B. Paris}`. If the data set has the options' texts (`choices`), a statement that is one of
them, letter for letter but for case and spaces, is that option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from grpo_fast.rewards.prose import without_code
from grpo_fast.rewards.texts import LogMetric, completion_text, log_share, split_thought

# the longest content of a box or a tag that is looked at, in characters
_LONGEST = 300
# boxes that are looked at, from the end
_MOST_BOXES = 100
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
_TAG = re.compile(r"<answer>([^<]{0,300})</answer>")
_NOT = re.compile(r"(?:\bnot|n['’]t|\bneither|\bnor)\W{0,4}$", re.IGNORECASE)
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s{0,3}\{")


class MultipleChoice:
    """1 if the stated option is the right one, 0 if it is another or none is stated."""

    def __init__(
        self,
        *,
        column: str = "solution",
        choices: str | None = None,
        letters: str = "ABCDEFGHIJ",
        name: str = "multiple_choice",
    ) -> None:
        """Nothing is read.

        Args:
            column: The right options: a letter, as "B", "(B)", "B. Paris" or in a box, or the number of the option from
                0, or its text if there are `choices`.
            choices: The column with a row's texts of options, in the order of the letters.
            letters: The options' letters, upper case.
            name: In the metrics, which have the shares `rewards/<name>/unparsed_answer`, where no option is stated (0),
                and `rewards/<name>/unparsed_gold`, where the column has none (None).

        Raises:
            ValueError: If the letters are not different capitals.
        """
        if not (letters.isalpha() and letters.isupper() and len(set(letters)) == len(letters)):
            raise ValueError(f"{name}: letters must be different capital letters, they are {letters!r}")
        self.__name__ = name
        self._column, self._choices, self._letters = column, choices, letters
        self._clear, self._plain = _patterns(letters)

    def __call__(
        self, completions: Sequence[Any], log_metric: LogMetric | None = None, **columns: Any
    ) -> list[float | None]:
        for column in filter(None, (self._column, self._choices)):
            if column not in columns:
                names = ", ".join(name for name in columns if name not in ("prompts", "completion_ids"))
                raise ValueError(f"{self.__name__} needs the column {column!r}; there is {names or 'none'}")
        options = columns[self._choices] if self._choices else [()] * len(completions)
        golds = [self._gold(value, texts) for value, texts in zip(columns[self._column], options, strict=True)]
        stated = [
            self._stated(completion_text(completion), texts)
            for completion, texts in zip(completions, options, strict=True)
        ]
        log_share(log_metric, f"rewards/{self.__name__}/unparsed_gold", [gold is None for gold in golds])
        log_share(log_metric, f"rewards/{self.__name__}/unparsed_answer", [letter is None for letter in stated])
        return [None if gold is None else float(gold == letter) for gold, letter in zip(golds, stated, strict=True)]

    def _gold(self, value: Any, texts: Sequence[str]) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool):
            return self._letters[value] if 0 <= value < len(self._letters) else None
        return self._option(value, texts) if isinstance(value, str) else None

    def _option(self, text: str, texts: Sequence[str]) -> str | None:
        """The option that a short text is, as the content of a box or of a column."""
        text = _unwrapped(text)
        letter = re.fullmatch(rf"\(?\[?([{self._letters}])[\])]?[.:]?", text, re.IGNORECASE)
        letter = letter or re.match(rf"[(\[]?([{self._letters}])[\])]?[.):]\s", text)
        letter = letter or re.fullmatch(rf"(?:option|choice)\s?\(?([{self._letters}])\)?\.?", text, re.IGNORECASE)
        if letter:
            return letter.group(1).upper()
        same = [i for i, other in enumerate(texts) if _folded(str(other)) == _folded(text)]
        return self._letters[same[0]] if len(same) == 1 and same[0] < len(self._letters) else None

    def _stated(self, text: str, texts: Sequence[str]) -> str | None:
        summary = without_code(split_thought(text).summary)
        clear = _matches(self._clear, summary)
        for start, content in _contents(summary):
            option = self._option(content, texts)
            if option is not None:
                clear.append((start, option))
        for rank in (clear, _matches(self._plain, summary)):
            kept = [found for found in rank if not _NOT.search(summary[max(0, found[0] - 12) : found[0]])]
            if kept:
                return max(kept)[1].upper()
        return self._option(summary, texts) if len(summary) <= _LONGEST else None


def _patterns(letters: str) -> tuple[tuple[re.Pattern[str], ...], tuple[re.Pattern[str], ...]]:
    """Clear and plain statements other than boxes and tags; each has the option as its group."""
    signs = r"[\s*_(\[\"'“$]{0,6}"
    option = r"(?:(?:option|choice)\s{1,2})?"
    says = r"\banswer\b[\s*_]{0,4}(?:(?:is|would be|must be|should be)\b[\s*_]{0,4}:?|[:=])"
    clear = (
        rf"(?i:{says}{signs}{option}){signs}([{letters}])(?![\w'’])",
        rf"(?i:{says}{signs}{option}\(([{letters}])\))",
        rf"(?i:\b(?:option|choice)\s{{1,2}})[*_(\[]{{0,4}}([{letters}])[*_)\]]{{0,4}}"
        r"(?i:\s{1,2}is\s{1,2}(?:the\s)?(?:correct|right))",
    )
    plain = (
        rf"^[\s*_(\[\"'#>]{{0,8}}([{letters}])[\s*_)\].:\"']{{0,8}}$",
        rf"[(\[]([{letters}])[)\]]",
        rf"\*\*([{letters}])[.:)]?\*\*",
    )
    return tuple(map(re.compile, clear)), tuple(re.compile(pattern, re.MULTILINE) for pattern in plain)


def _matches(patterns: Sequence[re.Pattern[str]], text: str) -> list[tuple[int, str]]:
    return [(match.start(), match.group(1)) for pattern in patterns for match in pattern.finditer(text)]


def _contents(text: str) -> list[tuple[int, str]]:
    """What stands in boxes and answer tags, and where."""
    found = [(match.start(), match.group(1)) for match in _TAG.finditer(text)]
    for match in list(_BOX.finditer(text))[-_MOST_BOXES:]:
        content = _braced(text, match.end())
        if content is not None:
            found.append((match.start(), content))
    return found


def _braced(text: str, start: int) -> str | None:
    """What stands from `start` to the brace that closes the one before it, if that is near."""
    depth = 1
    for place in range(start, min(start + _LONGEST, len(text))):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _unwrapped(text: str) -> str:
    """Without formula signs, boxes, text commands and emphasis about it."""
    text = text.strip().strip("$*_ \n\t").strip()
    for pattern in (_BOX, _COMMAND):
        match = pattern.match(text)
        if match and text.endswith("}"):
            text = text[match.end() : -1].strip()
    return text.strip("$*_ \n\t")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
