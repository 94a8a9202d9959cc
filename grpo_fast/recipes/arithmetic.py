"""The demo's task: one-digit sums and differences of reasoning-gym, asked in chat, scored by the last integer."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from grpo_fast.rewards.texts import completion_text

SYSTEM_PROMPT = "You are a calculator."
NUM_HELDOUT = 46
# a minus straight after a digit subtracts, any other one is a sign
INTEGER = re.compile(r"(?<!\d)-?\d+")


def load_arithmetic() -> tuple[Dataset, Dataset]:
    """The task as (train, held-out) data sets with columns `prompt` (messages) and `answer` (int), always the same.

    The problems of the two are disjoint as text: 3 + 5 may be held out while 5 + 3 is trained on.

    Raises:
        ValueError: If reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("the arithmetic task needs reasoning-gym: pip install 'grpo-fast[demo]'")
    import reasoning_gym

    items = reasoning_gym.create_dataset(
        "chain_sum", size=2000, seed=1, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    answers = {item["question"]: int(item["answer"]) for item in items}
    questions = list(answers)
    random.Random(0).shuffle(questions)
    rows = [
        {
            "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}],
            "answer": answers[question],
        }
        for question in questions
    ]
    return Dataset.from_list(rows[NUM_HELDOUT:]), Dataset.from_list(rows[:NUM_HELDOUT])


def last_integer(text: str) -> int | None:
    """The last integer written in `text`, or None: -1 in "3 - 4 = -1", 3 in "8-3"."""
    found = INTEGER.findall(text)
    return int(found[-1]) if found else None


def last_integer_reward(completions: Sequence[Any], answer: Sequence[int], **columns: object) -> list[float]:
    """1.0 where the completion's last integer is the answer, else 0.0."""
    return [
        float(last_integer(completion_text(completion)) == truth)
        for completion, truth in zip(completions, answer, strict=True)
    ]
