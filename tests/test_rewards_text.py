"""Rewards of format, length, repetition, steps and choice: what each gives, and that TRL's give the same."""

import math
import pickle
import random

import pytest

from grpo_fast.rewards.choice import MultipleChoice
from grpo_fast.rewards.format import Format, TagCount
from grpo_fast.rewards.language import LanguageConsistency
from grpo_fast.rewards.reasoning import ReasoningSteps
from grpo_fast.rewards.shaping import CosineLength, GroupLength, RepetitionPenalty, SoftOverlong
from grpo_fast.rewards.texts import completion_text, groups_of, split_thought, template_opens_thought
from tests.tiny_lm import CHAT_TEMPLATE, make_tokenizer
from tests.trainer_runs import both

GOOD = "<think>2 + 2 is 4</think><answer>4</answer>"


def is_right(completions, solution, **kwargs):
    return [None if s is None else float(s in c) for c, s in zip(completions, solution, strict=True)]


async def is_right_async(completions, solution, **kwargs):
    return is_right(completions, solution)


REWARDS = [
    Format(),
    TagCount(),
    ReasoningSteps(),
    CosineLength(10, is_right),
    GroupLength(is_right),
    RepetitionPenalty(),
    SoftOverlong(10, 2),
    MultipleChoice(),
    LanguageConsistency("en"),
]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
def test_every_reward_is_called_as_trl_calls_it_and_can_be_pickled(reward):
    logged, extra = {}, {}
    rows = {
        "prompts": ["Which? "] * 2,
        "completions": [GOOD, "<think>so</think> The answer is B"],
        "completion_ids": [[1, 2, 3, 1, 2, 3], [4, 5]],
        "solution": ["4", "B"],
        "trainer_state": None,
        "log_metric": logged.__setitem__,
        "log_extra": extra.__setitem__,
    }
    values = reward(**rows)
    assert len(values) == 2
    assert all(value is None or isinstance(value, float) for value in values)
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == reward.__name__
    assert copy(**rows) == values
    chats = {
        "prompts": [[{"role": "user", "content": "Which? "}]] * 2,
        "completions": [[{"role": "assistant", "content": text}] for text in rows["completions"]],
    }
    if not isinstance(reward, CosineLength | GroupLength):
        assert reward(**rows | chats) == values
    assert all(name.startswith(f"rewards/{reward.__name__}/") for name in logged)


def test_text_of_messages():
    chat = [
        {"role": "assistant", "reasoning_content": "hm", "content": None, "tool_calls": []},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "9"}]},
    ]
    assert completion_text(chat) == "<think>hm</think>\nIt is 9"
    parts = split_thought("<think>a</think>b</think>c")
    assert (parts.thought, parts.summary) == ("a</think>b", "c")
    assert split_thought("<think>a").summary == ""
    assert split_thought("a", is_begun=True).thought == "a"
    assert split_thought("a").summary == "a"


# -- format ------------------------------------------------------------------------------------------------------------

FORMATS = [
    (GOOD, 1),
    (" \n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1),
    ("<think>a < b > c</think><answer>1 < 2</answer>", 1),
    ("", 0),
    ("<think></think><answer>b</answer>", 0),
    ("<think> \n</think><answer>b</answer>", 0),
    ("<think>a</think><answer>\u200b</answer>", 0),
    ("<think>\u3164</think><answer>b</answer>", 0),
    ("x<think>a</think><answer>b</answer>", 0),
    ("<think>a</think>x<answer>b</answer>", 0),
    ("<think>a</think><answer>b</answer>x", 0),
    ("<think>a</think><answer>b</answer>\u200f", 0),
    ("\ufeff<think>a</think><answer>b</answer>", 0),
    ("<think>a</think><think>a</think><answer>b</answer>", 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
    ("<think><think>a</think></think><answer>b</answer>", 0),
    ("<think>`</think>`</think><answer>b</answer>", 0),
    ("<answer>b</answer><think>a</think>", 0),
    ("<think>a<answer>b</answer></think>", 0),
    ("<think>a<answer></think>b</answer>", 0),
    ("<THINK>a</THINK><answer>b</answer>", 0),
    ("< think>a</think><answer>b</answer>", 0),
    ("<think>a</think><answer>b", 0),
    ("a</think><answer>b</answer>", 0),
    ("<think>a<think/></think><answer>b</answer>", 1),
]


@pytest.mark.parametrize(("text", "expected"), FORMATS)
def test_format(text, expected):
    assert Format()([text], prompts=["Q: "]) == [expected]


def test_the_opening_tag_may_stand_in_the_prompt():
    rest = "a</think><answer>b</answer>"
    assert Format()([rest] * 2, prompts=["Q<think>\n", "Q"]) == [1, 0]
    assert Format()([f"<think>{rest}"] * 2, prompts=["Q<think>\n", "Q"]) == [0, 1]
    chat = [{"role": "user", "content": "Q <think>"}]
    begun = [*chat, {"role": "assistant", "content": "<think>"}]
    assert Format()([rest] * 2, prompts=[chat, begun]) == [0, 1]
    assert Format(think_in_prompt=True)([rest], prompts=[chat]) == [1]
    assert Format(think_in_prompt=False)([rest], prompts=["<think>"]) == [0]
    assert Format(think_in_prompt=True)([rest]) == [1]
    assert TagCount()([rest] * 2, prompts=["Q<think>", "Q"]) == [1, 0.75]
    with pytest.raises(ValueError, match="format: think_in_prompt must be True, False or 'auto', it is 'yes'"):
        Format(think_in_prompt="yes")


def test_a_template_says_whether_it_opens_the_thought():
    assert not template_opens_thought(make_tokenizer(CHAT_TEMPLATE))
    assert template_opens_thought(make_tokenizer(CHAT_TEMPLATE.replace("a:", "a:<think>\\n")))


def test_format_without_answer_tags():
    reward = Format(needs_answer=False)
    texts = ["<think>a</think>b", "<think>a</think> ", "<think>a</think><answer>b</answer>", "<think>a</think>b<think>"]
    assert reward(texts) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(GOOD, 1), ("", 0), ("<think><think></think>", 0.25), ("</answer> <answer>", 0.5), (GOOD + GOOD, 0)],
)
def test_tag_count(text, expected):
    assert TagCount()([text]) == [expected]


# -- lengths and repetition --------------------------------------------------------------------------------------------


def test_lengths_and_repetition_as_trls():
    from trl import rewards as trl

    draw = random.Random(0)
    ids = [[draw.randrange(5) for _ in range(n)] for n in (0, 1, 2, 3, 7, 20, 79, 80, 81, 99, 100, 101, 200)]
    for cache in (0, 1, 20, 100):
        assert SoftOverlong(100, cache)(ids) == trl.get_soft_overlong_punishment(100, cache)(ids)
    for size in (1, 2, 3, 8):
        ours, theirs = (
            RepetitionPenalty(ngram_size=size, max_penalty=-0.7),
            trl.get_repetition_penalty_reward(size, -0.7),
        )
        assert ours(ids) == pytest.approx(theirs(ids), abs=1e-15)


def test_cosine_length_is_eq_of_its_paper_clamped():
    reward = CosineLength(100, column="is_right")
    lengths = [0, 50, 100, 250] * 2
    rows = {"completions": [""] * 8, "completion_ids": [[1] * n for n in lengths]}
    values = reward(**rows, is_right=[True] * 4 + [0.0] * 4)
    assert values == pytest.approx([1, 0.75, 0.5, 0.5, -1, -0.75, -0.5, -0.5])
    assert reward(**rows, is_right=[None, math.nan] * 4) == [None] * 8
    exceeded = CosineLength(100, is_right, exceeded=-10)(
        completions=["a", "b"], completion_ids=[[1] * 100, [1] * 99], solution=["a", "a"]
    )
    assert exceeded == pytest.approx([-10, -0.5], abs=1e-3)
    given = {"completions": ["a"], "completion_ids": [[]], "solution": ["a"]}
    assert CosineLength(100, is_right_async)(**given) == [1.0]


def test_group_length_is_of_each_group():
    reward = GroupLength(column="right")
    lengths, prompts = [10, 20, 30, 5, 5, 40, 80], ["a", "a", "a", "b", "b", "a", "a"]
    values = reward(
        prompts=prompts,
        completions=[""] * 7,
        completion_ids=[[1] * n for n in lengths],
        right=[1, 0, 0, 1, 0, None, 1],
    )
    assert values == [0.5, 0.0, -0.5, 0.0, 0.0, None, -0.5]
    wrong = reward(prompts=["a"] * 2, completions=[""] * 2, completion_ids=[[1], [1, 1]], right=[0, 1])
    assert wrong == [0.0, -0.5]
    assert groups_of(["a"] * 5, 2) == [range(2), range(2, 4), range(4, 5)]
    assert groups_of([]) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineLength(0, is_right), "max_len must be at least 1 token, it is 0"),
        (lambda: CosineLength(9), "cosine_length needs to know which completions are right"),
        (lambda: GroupLength(is_right, column="a"), "group_length needs to know"),
        (lambda: GroupLength("a"), "correct must be a reward function, it is str"),
        (lambda: GroupLength(is_right, num_generations=0), "num_generations must be at least 1"),
        (lambda: CosineLength(9, is_right, min_value_wrong=0.0), r"min_value_wrong \(0.0\) must not be above"),
        (lambda: RepetitionPenalty(ngram_size=0), "ngram_size must be at least 1"),
        (lambda: RepetitionPenalty(max_penalty=0.5), "max_penalty must not be above 0"),
        (lambda: SoftOverlong(10, 11), "soft_punish_cache must be from 0 to max_completion_len"),
        (lambda: SoftOverlong(0), "max_completion_len must be at least 1 token"),
        (lambda: ReasoningSteps(target=0), "target must be at least 1 step"),
        (lambda: MultipleChoice(letters="abc"), "letters must be different capital letters"),
        (lambda: MultipleChoice()(["a"], answer=["B"]), "needs the column 'solution'; there is answer"),
        (
            lambda: GroupLength(column="right")(prompts=["a"], completions=["a"], completion_ids=[[]], target=[1]),
            "group_length needs the column 'right'; there is target",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- steps and choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Step 1: add.\nStep 2: divide.\n### Step 3: done", 3),
        ("1. add\n2) divide\n- check", 3),
        ("First, add.\nThen, divide.\nFinally, check.", 3),
        ("<think>**Step 1**: add</think>\nStep 2: divide", 1),
        ("<think></think>\nStep 2: divide", 0),
        ("Step 1: add\nStep 2: add\nStep 3: ADD!", 1),
        ("Step 1:\nStep 2: \nStep 3:\u200b", 0),
        ("```\n1. a\n2. b\n```\n3. c", 1),
        ("I add. First, I divide.", 0),
        ("1.5 is a number\n-3 is one", 0),
        ("", 0),
    ],
)
def test_reasoning_steps(text, steps):
    assert ReasoningSteps(target=4)([text]) == [steps / 4]


PLACES = ["Paris", "Rome", "New York", "Oslo"]
CHOICES = [
    (r"\boxed{B}", "B"),
    (r"So \boxed{A}. Wait. \boxed{\text{(B)}}", "B"),
    (r"<think>\boxed{B}</think>\boxed{C}", "C"),
    (r"<think>\boxed{B}</think>", None),
    ("<think>(B)", None),
    ("The answer is **B**.", "B"),
    ("The correct answer is option (b).", "B"),
    ("answer: $B$", "B"),
    ("Option B is the correct one", "B"),
    ("<answer>B. Rome</answer>", "B"),
    ("<answer> rome </answer>", "B"),
    (r"\boxed{New  York.}", "C"),
    ("(A) is wrong, so it is (B).", "B"),
    ("It is B and not (A).", None),
    ("The answer is not B", None),
    ("The answer is (B), not (A)", "B"),
    ("Thus\n\nB.", "B"),
    ("b", "B"),
    ("A triangle has three sides.", None),
    ("The answer is Bob", None),
    ("`The answer is B`", None),
    (r"\boxed{Z}", None),
    (r"\boxed{B", None),
    ("Α", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "option"), CHOICES)
def test_multiple_choice(text, option):
    logged = {}
    reward = MultipleChoice(choices="choices")
    values = reward([text] * 2, solution=["B", "C"], choices=[PLACES] * 2, log_metric=logged.__setitem__)
    assert values == [float(option == "B"), float(option == "C")]
    assert logged == {
        "rewards/multiple_choice/unparsed_gold": 0.0,
        "rewards/multiple_choice/unparsed_answer": float(option is None),
    }


@pytest.mark.parametrize(
    ("gold", "expected"),
    [("B", 1), ("(B)", 1), ("B. Rome", 1), (r"$\boxed{B}$", 1), (1, 1), ("Rome", 1), (None, None), ("Bern", None)],
)
def test_gold_of_multiple_choice(gold, expected):
    assert MultipleChoice(choices="choices")(["(B)"], solution=[gold], choices=[PLACES]) == [expected]


@pytest.mark.trl
def test_they_run_in_both_trainers_and_say_the_same(tmp_path):
    rewards = (
        Format(),
        TagCount(),
        ReasoningSteps(),
        CosineLength(9, column="target"),
        GroupLength(column="target", num_generations=4),
        RepetitionPenalty(ngram_size=1),
        SoftOverlong(9, 6),
        LanguageConsistency("en"),
    )
    ours, _ = both(tmp_path, rewards=rewards, max_steps=1)
    line = ours.state.log_history[0]
    assert {f"rewards/{reward.__name__}/mean" for reward in rewards} <= set(line)
    assert line["rewards/language_consistency/unknown_language"] == 0
    assert line["reward_std"] > 0
