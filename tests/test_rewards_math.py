"""`accuracy`: the corpus scored as the tables say; doubtful outcomes declared and counted, in TRL's trainer, too."""

import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset

import grpo_fast
from grpo_fast.rewards import DROP, Accuracy, accuracy
from grpo_fast.rewards.math import comparing
from grpo_fast.rewards.math.grading import describe_gold, gold_text
from grpo_fast.rewards.texts import completion_text
from tests import rewards_corpus_math as corpus
from tests.tiny_lm import make_model, make_tokenizer, save

# far above what an ordinary answer takes on a busy machine
PATIENT = Accuracy(timeout=30.0)


def outcomes(reward, cases):
    found = {}
    columns = {"completions": [case[1] for case in cases], "solution": [case[0] for case in cases]}
    reward(**columns, log_extra=found.__setitem__)
    return found["accuracy_outcome"]


def differences(reward, cases):
    return [
        (gold[:60], completion[:60], outcome, found)
        for (gold, completion, outcome), found in zip(cases, outcomes(reward, cases), strict=True)
        if found != outcome and (outcome != corpus.NOT_RIGHT or found == corpus.R)
    ]


# -- the corpus --------------------------------------------------------------------------------------------------------


def test_final_answers_equal_what_the_table_says():
    assert (
        differences(PATIENT, [(gold, rf"\boxed{{{answer}}}", outcome) for gold, answer, outcome in corpus.TABLE]) == []
    )


def test_the_final_answer_is_looked_for_where_it_may_stand():
    assert differences(PATIENT, corpus.PLACES) == []


def test_hostile_completions_end_and_score_nothing():
    start = time.monotonic()
    assert differences(Accuracy(timeout=2.0), corpus.HOSTILE) == []
    late = sum(outcome in (corpus.LATE, corpus.NOT_RIGHT) for _, _, outcome in corpus.HOSTILE)
    # each costs two seconds, two at a time, and a new worker; the rest is work on a machine that may be busy
    assert time.monotonic() - start < 2 * late + 20


def test_the_corpus_is_as_large_as_it_must_be():
    cases = {(gold, answer) for gold, answer, _ in [*corpus.TABLE, *corpus.PLACES, *corpus.HOSTILE]}
    assert len(cases) >= 240
    assert {(gold, answer) for gold, answer, _ in corpus.TABLE} >= corpus.DIFFERS


def test_ordinary_answers_are_scored_as_math_verify_scores_them():
    from math_verify import parse, verify

    for gold, answer, outcome in corpus.TABLE:
        theirs = verify(parse(f"${gold}$"), parse(rf"$\boxed{{{answer}}}$"))
        assert (theirs == (outcome == corpus.R)) == ((gold, answer) not in corpus.DIFFERS), (gold, answer)


def test_every_example_of_the_documented_table_is_in_the_corpus():
    lines = [line for line in (comparing.__doc__ or "").splitlines() if line.startswith("| ")][1:]
    known = {(gold, answer): outcome for gold, answer, outcome in corpus.TABLE}
    shown = {}
    for line in lines:
        gold, *cells = line.strip("|").split("|")
        for written in _quoted(gold)[:1]:
            for cell, outcome in zip(cells, (corpus.R, corpus.W), strict=True):
                shown |= {(written, answer): outcome for answer in _quoted(cell)}
    assert len(shown) > 80
    assert {pair: outcome for pair, outcome in shown.items() if known.get(pair) != outcome} == {}


def _quoted(cell):
    return cell.split("`")[1::2]


# -- what is declared for doubtful outcomes ----------------------------------------------------------------------------

DOUBTFUL = {
    "completions": [r"\boxed{4}", r"\boxed{5}", r"\boxed{" + corpus.TOWER + "}", r"\boxed{4}", "?"],
    "answer": ["4", "4", "4", r"\frac{", "4"],
}


def test_doubtful_outcomes_have_their_declared_rewards_and_their_shares():
    metrics = {}
    rewards = Accuracy(timeout=1.0)(**DOUBTFUL, log_metric=metrics.__setitem__)
    assert rewards == [1.0, 0.0, 0.0, None, 0.0]
    shares = {"timeout": 0.2, "unparsed_gold": 0.2, "unparsed_answer": 0.2, "error": 0.0}
    assert metrics == {f"rewards/accuracy/{status}": share for status, share in shares.items()}


def test_other_rewards_can_be_declared():
    reward = Accuracy(timeout=1.0, on_timeout=None, on_unparsed_gold="drop", on_unparsed_answer=-1, name="maths")
    metrics = {}
    rewards = reward(**DOUBTFUL, log_metric=metrics.__setitem__)
    assert rewards[:3] == [1.0, 0.0, None]
    assert rewards[3] is DROP
    assert rewards[4] == -1.0
    assert metrics["rewards/maths/timeout"] == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_timeout": "zero"}, "on_timeout must be a number, None or 'drop', it is 'zero'"),
        ({"places": ["box"]}, "places must be a list of some of boxed, tag, phrase, whole"),
        ({"places": "boxed"}, "places must be a list"),
        ({"timeout": 0}, "timeout must be above 0 seconds, it is 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Accuracy(**arguments)


def test_places_and_thoughts_can_be_demanded():
    completions = ["the answer is 4", r"<think>a</think>\boxed{4}", r"\boxed{4}"]
    columns = {"completions": completions, "answer": ["4"] * 3}
    assert Accuracy(places=["boxed"])(**columns) == [0.0, 1.0, 1.0]
    assert Accuracy(needs_think=True)(**columns) == [0.0, 1.0, 0.0]


def test_gold_answers_of_every_form():
    golds = [4, 4.0, "4", ["5", "4"], [], None]
    assert accuracy(completions=["4"] * 6, gold=golds) == [1.0, 1.0, 1.0, 1.0, None, None]
    with pytest.raises(ValueError, match=r"'accuracy' needs one of the columns solution, .*the data set has question"):
        accuracy(completions=["4"], question=["2+2"], prompts=[""])
    with pytest.raises(ValueError, match="needs the column 'truth'"):
        Accuracy(column="truth")(completions=["4"], answer=["4"])


def test_completions_of_every_form():
    assert completion_text("4") == "4"
    chat = [
        {"role": "assistant", "content": "see"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": None},
    ]
    assert completion_text([*chat, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]) == "see\n\n4"


@pytest.mark.parametrize(
    ("gold", "written"),
    [("6/2=3\n#### 1,234", "1,234"), (r"so $\boxed{\frac12}$, done", r"\frac12"), ("Answer: 3", "3"), ("3 cm", "3 cm")],
)
def test_the_answer_in_a_gold_solution(gold, written):
    assert gold_text(gold) == written


@pytest.mark.parametrize(
    ("golds", "kind", "reason"),
    [
        (["4"], "number", ""),
        (["x+1"], "expression", ""),
        (["(1,2)"], "tuple", ""),
        (["B"], "choice", ""),
        (["no solution"], "text", ""),
        ([r"\frac{", "4"], "number", ""),
        (["1, 2"], "list", ""),
        (["  "], "unreadable", "it is empty"),
        ([], "unreadable", "there is none"),
        (["9" * 3000], "unreadable", "it is longer than 2000 characters"),
        ([r"\frac{1}{"], "unreadable", "it cannot be read: "),
    ],
)
def test_gold_answers_are_described(golds, kind, reason):
    found = describe_gold(golds, 1e-6)
    assert found[0] == kind
    assert found[1].startswith(reason)
    assert bool(reason) == bool(found[1])


# -- in trainers -------------------------------------------------------------------------------------------------------


@pytest.mark.trl
def test_trls_trainer_gives_the_same_rewards(tmp_path):
    import trl

    model = save(tmp_path / "model")
    inputs = [{"prompt": "a=", "answer": answer} for answer in DOUBTFUL["answer"]]
    arguments = (inputs, ["a="] * 5, DOUBTFUL["completions"], [[1]] * 5)
    results, logged = [], []
    for package in (trl, grpo_fast):
        reward = Accuracy(timeout=1.0, on_unparsed_gold="drop")
        trainer = package.GRPOTrainer(
            model=model,
            reward_funcs=[reward],
            args=package.GRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_list([{"prompt": "a=", "answer": 1}]),
            processing_class=make_tokenizer(),
        )
        results.append(trainer._calculate_rewards(*arguments))
        logged.append(dict(trainer._pending_metrics))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert logged[0] == logged[1]
    assert logged[0]["rewards/accuracy/timeout"] == [0.2]


def constant(completions, **columns):
    return [1.0] * len(completions)


def test_a_dropped_completion_is_scored_by_no_function(tmp_path):
    trainer = grpo_fast.GRPOTrainer(
        model=make_model(),
        reward_funcs=[constant, Accuracy(on_unparsed_answer="drop", timeout=30.0)],
        args=grpo_fast.GRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": "a=", "answer": 1}]),
        processing_class=make_tokenizer(),
    )
    inputs = [{"prompt": "a=", "answer": 4}] * 3
    rewards = trainer._calculate_rewards(inputs, ["a="] * 3, ["4", "5", "who knows the answer to it?\n"], [[1]] * 3)
    assert rewards.nan_to_num(nan=-1.0).tolist() == [[1.0, 1.0], [1.0, 0.0], [-1.0, -1.0]]


def test_the_trainers_process_needs_neither_sympy_nor_a_module_of_its_own():
    code = (
        "import sys; from grpo_fast.rewards import Accuracy\n"
        "assert Accuracy(timeout=30.0)(completions=['4'], answer=[4]) == [1.0]\n"
        "assert not {'torch', 'sympy', 'math_verify'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_three_hundred_verifications_a_second_and_core():
    from grpo_fast.rewards.math.extraction import PLACES
    from grpo_fast.rewards.math.grading import grade

    cases = [(gold, answer) for gold, answer, _ in corpus.TABLE if not any(sign in gold for sign in "<>=")]
    for gold, answer in cases:
        grade((gold,), rf"\boxed{{{answer}}}", PLACES, False, 1e-6)
    start = time.process_time()
    for i in range(10):
        for gold, answer in cases:
            # another text each time: nothing comes from the cache of verdicts
            grade((gold,), rf"\boxed{{{answer}{' ' * i}}}", PLACES, False, 1e-6)
    assert 10 * len(cases) / (time.process_time() - start) >= 300
