"""Language consistency: the share of the words of a thought that are in the wanted language.

Source: DeepSeek-R1 (arXiv:2501.12948, Nature version), eq. 7: words of the target language over all words of the chain
of thought. The paper does not say what a word is; `grpo_fast.rewards.words` does, and what it cannot tell.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from grpo_fast.rewards.prose import prose_of
from grpo_fast.rewards.texts import (
    LogMetric,
    completion_text,
    log_share,
    prompt_text,
    reasoning_of,
    split_thought,
)
from grpo_fast.rewards.words import count_words, language_code, language_of

PARTS = ("thought", "summary", "all")


class LanguageConsistency:
    """Words of the language over all words, from 0 to 1.

    Formulae, code, addresses and tags are left out first (`grpo_fast.rewards.prose`).
    """

    def __init__(
        self,
        language: str | None = None,
        *,
        column: str | None = None,
        part: Literal["thought", "summary", "all"] = "thought",
        no_words: float | None = 0.0,
        ignore: Collection[str] = (),
        name: str = "language_consistency",
    ) -> None:
        """Nothing is read.

        Args:
            language: The wanted language: a code ("en", "zh-CN") or an English name.
            column: Or the column that has it for each row; None in a row is the prompt's.
            part: What of a completion: "thought" is what stands before the last `</think>`, or all where there are no
                tags; "summary" what follows it.
            no_words: The reward where there is no word.
            ignore: Words that do not count, such as names that the data set is full of; case does not matter.
            name: In the metrics, which have `rewards/<name>/unknown_language`: without `language` and `column` the
                wanted language is that of the prompt (of the last message of the user), and where that cannot be told
                the reward is None.

        Raises:
            ValueError: For a language that cannot be told, or if there are both `language` and `column`.
        """
        if language is not None and column is not None:
            raise ValueError(f"{name}: give language={language!r} or column={column!r}, not both")
        if part not in PARTS:
            raise ValueError(f"{name}: part must be one of {', '.join(PARTS)}, it is {part!r}")
        self.__name__ = name
        self._language = None if language is None else language_code(language)
        self._column, self._part, self._no_words = column, part, no_words
        self._ignored = frozenset(word.lower() for word in ignore)

    def __call__(
        self,
        completions: Sequence[Any],
        prompts: Sequence[Any] | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        languages = self._languages(len(completions), prompts, columns)
        log_share(log_metric, f"rewards/{self.__name__}/unknown_language", [code is None for code in languages])
        return [
            None if language is None else self._share(completion_text(completion), language)
            for completion, language in zip(completions, languages, strict=True)
        ]

    def _languages(self, num_rows: int, prompts: Sequence[Any] | None, columns: dict[str, Any]) -> list[str | None]:
        if self._language is not None:
            return [self._language] * num_rows
        wanted = [None] * num_rows
        if self._column is not None:
            if self._column not in columns:
                names = ", ".join(name for name in columns if name != "completion_ids")
                raise ValueError(f"{self.__name__} needs the column {self._column!r}; there is {names or 'none'}")
            wanted = columns[self._column]
        # a group's prompts are one
        known: dict[str, str | None] = {}
        languages: list[str | None] = []
        for row, name in enumerate(wanted):
            if name is not None:
                languages.append(language_code(name))
            elif prompts is None:
                raise ValueError(f"{self.__name__} needs prompts, or an argument `language` or `column`")
            else:
                text = prompt_text(prompts[row])
                if text not in known:
                    known[text] = language_of(prose_of(text))
                languages.append(known[text])
        return languages

    def _share(self, text: str, language: str) -> float | None:
        if self._part == "thought":
            text = reasoning_of(text)
        elif self._part == "summary":
            text = split_thought(text).summary
        of_language, total = count_words(prose_of(text), language, ignored=self._ignored)
        return of_language / total if total else self._no_words
