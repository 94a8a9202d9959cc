"""The corpus of misleading completions: every reward as its table says, and every one in time."""

import time

import pytest

from grpo_fast.rewards.choice import MultipleChoice
from grpo_fast.rewards.format import Format, TagCount
from grpo_fast.rewards.language import LanguageConsistency
from grpo_fast.rewards.reasoning import ReasoningSteps
from tests.rewards_text_corpus import CASES, LONG

REWARDS = (Format(), TagCount(), MultipleChoice(), LanguageConsistency("en"))
# a pass over so many characters takes less than a tenth of it; what is quadratic takes more
FEW, FEW_LIMIT_S = 60_000, 1.5
MANY, MANY_LIMIT_S = 1_000_000, 15.0


def test_the_corpus_is_large():
    assert len(CASES) >= 70


@pytest.mark.parametrize("name", CASES)
def test_as_the_table_says(name):
    text, *expected = CASES[name]
    rewards = [reward([text], prompts=["Q"], solution=["B"])[0] for reward in REWARDS]
    assert rewards == pytest.approx(expected)


def seconds(text):
    slowest = 0.0
    for reward in (*REWARDS, ReasoningSteps()):
        start = time.process_time()
        (value,) = reward([text], prompts=["Q"], solution=["B"])
        slowest = max(slowest, time.process_time() - start)
        assert 0 <= value <= 1
    return slowest


@pytest.mark.parametrize("name", LONG)
def test_long_texts_take_linear_time(name):
    part = LONG[name]
    assert seconds((part * FEW)[:FEW]) < FEW_LIMIT_S


@pytest.mark.parametrize("name", ["words", "open boxes"])
def test_a_megabyte(name):
    part = LONG[name]
    assert seconds((part * MANY)[:MANY]) < MANY_LIMIT_S


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_of_anything(name):
    part = LONG[name]
    for text in ((part * MANY)[:MANY], f"<think>{part * MANY}"[:MANY] + "</think>" + part):
        assert seconds(text) < MANY_LIMIT_S
