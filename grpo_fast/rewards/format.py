"""Rewards of the output format of DeepSeek-R1: a thought and an answer, each in its tags.

Source: DeepSeek-R1 (arXiv:2501.12948), table 1 and section 2.2. Tags are literal: in lower case and without spaces, and
a tag in a code block or in a formula is a tag like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, TypeAlias

from grpo_fast.rewards.texts import THINK_END, THINK_START, completion_text, is_visible, opens_thought

ANSWER_START, ANSWER_END = "<answer>", "</answer>"

ThinkInPrompt: TypeAlias = bool | Literal["auto"]


class Format:
    r"""1 for `<think>...</think> <answer>...</answer>`, else 0.

    * Before, between and after the two there is whitespace (`str.isspace`) or nothing: a zero-width space or a mark of
      direction is something.
    * Each of the four tags occurs once in the whole completion.
    * Thought and answer have something that can be seen.

    Without answer tags (`needs_answer=False`): `<think>...</think>` and a visible text, which may hold anything but
    `<think>`, `</think>`; Qwen 3 and R1's later checkpoints write so.

    Where the prompt ends with `<think>`, the completion begins within the thought, and a `<think>` in it is a second.
    """

    def __init__(
        self, *, think_in_prompt: ThinkInPrompt = "auto", needs_answer: bool = True, name: str = "format"
    ) -> None:
        """Nothing is read.

        Args:
            think_in_prompt: Whether the prompt has the opening `<think>`; "auto" sees for each prompt whether its text,
                or a message of the assistant that it ends with, does. What a chat template adds to messages cannot be
                seen by a reward function: give `template_opens_thought(tokenizer)`.
            needs_answer: Whether the answer stands in tags.
            name: In the metrics.

        Raises:
            ValueError: If `think_in_prompt` is neither a truth value nor "auto".
        """
        check_think_in_prompt(think_in_prompt, name)
        self.__name__ = name
        self._think_in_prompt, self._needs_answer = think_in_prompt, needs_answer

    def __call__(self, completions: Sequence[Any], prompts: Sequence[Any] | None = None, **columns: Any) -> list[float]:
        begun = thoughts_begun(self._think_in_prompt, prompts, len(completions))
        return [
            float(self._is_well_formed(completion_text(completion), is_begun))
            for completion, is_begun in zip(completions, begun, strict=True)
        ]

    def _is_well_formed(self, text: str, is_begun: bool) -> bool:
        text = f"{THINK_START}{text}" if is_begun else text
        tags = (THINK_START, THINK_END, ANSWER_START, ANSWER_END) if self._needs_answer else (THINK_START, THINK_END)
        if any(text.count(tag) != 1 for tag in tags):
            return False
        before, _, rest = text.partition(THINK_START)
        thought, end, rest = rest.partition(THINK_END)
        if before.strip() or not end or not is_visible(thought):
            return False
        if not self._needs_answer:
            return is_visible(rest)
        between, start, rest = rest.partition(ANSWER_START)
        answer, end, after = rest.partition(ANSWER_END)
        return bool(start and end) and not between.strip() and not after.strip() and is_visible(answer)


class TagCount:
    """A quarter for each of `<think>`, `</think>`, `<answer>` and `</answer>` that occurs once; open-r1's `tag_count`.

    Wherever they stand, and whether or not lines end there, which open-r1 wants. A `<think>` that the prompt has counts
    if the completion has none.
    """

    TAGS: Final = (THINK_START, THINK_END, ANSWER_START, ANSWER_END)

    def __init__(self, *, think_in_prompt: ThinkInPrompt = "auto", name: str = "tag_count") -> None:
        """Arguments and errors are those of `Format`."""
        check_think_in_prompt(think_in_prompt, name)
        self.__name__ = name
        self._think_in_prompt = think_in_prompt

    def __call__(self, completions: Sequence[Any], prompts: Sequence[Any] | None = None, **columns: Any) -> list[float]:
        begun = thoughts_begun(self._think_in_prompt, prompts, len(completions))
        texts = [
            THINK_START * is_begun + completion_text(completion)
            for completion, is_begun in zip(completions, begun, strict=True)
        ]
        return [sum(text.count(tag) == 1 for tag in self.TAGS) / len(self.TAGS) for text in texts]


def check_think_in_prompt(value: object, name: str) -> None:
    """Refuse what `think_in_prompt` cannot be (ValueError)."""
    if value not in (True, False, "auto"):
        raise ValueError(f"{name}: think_in_prompt must be True, False or 'auto', it is {value!r}")


def thoughts_begun(think_in_prompt: ThinkInPrompt, prompts: Sequence[Any] | None, num_rows: int) -> list[bool]:
    """Which rows' prompts have opened the thought."""
    if think_in_prompt == "auto" and prompts is not None:
        return [opens_thought(prompt) for prompt in prompts]
    return [think_in_prompt is True] * num_rows
