"""`grpo-fast lint-data`: which gold answers can score, by kind and by row, with an exit code."""

import json

import pytest

from grpo_fast import cli
from grpo_fast.recipes import tiny, train
from grpo_fast.recipes.lint_data import GoldReport, lint

ROWS = [
    {"answer": "4", "source": "math"},
    {"answer": r"\frac12", "source": "math"},
    {"answer": r"\frac{", "source": "math"},
    {"answer": "x + 1", "source": "math"},
    {"answer": "B", "source": "math"},
    {"answer": "", "source": "math"},
    {"answer": "anything{", "source": "judge"},
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(rows=ROWS, **settings):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": "?", **row}) + "\n" for row in rows))
        (tmp_path / "run.yaml").write_text(json.dumps({"dataset": "data.jsonl", "rewards": ["accuracy"], **settings}))
        return "run.yaml"

    return write


def test_rows_that_cannot_score_are_shown_and_exit_with_1(project, capsys):
    assert cli.main(["lint-data", project(rows=ROWS[:6])]) == 1
    shown = capsys.readouterr().out
    assert "dataset, reward accuracy: 4 of 6 gold answers can score (66.67%)" in shown
    assert "kinds: number 2, expression 1, choice 1" in shown
    assert "row 2: '\\\\frac{': it cannot be read: " in shown
    assert "row 5: '': it is empty" in shown


def test_good_data_exits_with_0(project, capsys):
    path = project(rows=ROWS[:2], eval_dataset="data.jsonl")
    assert cli.main(["lint-data", path]) == 0
    assert capsys.readouterr().out.count("2 of 2 gold answers can score (100.00%)") == 2


def test_rows_of_other_rewards_are_not_judged(project):
    own = "tests.pool_functions:by_length"
    rewards = [own, {"route": {"column": "source", "rewards": {"math": "accuracy"}, "default": own}}]
    (report,) = lint(project(rewards=rewards), {})
    assert report.num_rows == 6
    assert [row for row, _, _ in report.hopeless] == [2, 5]


def test_flags_win_over_the_file(project):
    (report,) = lint(project(rewards="nothing"), {"rewards": "accuracy"})
    assert report.num_rows == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": "tests.pool_functions:by_length"}, "none of the rewards reads gold answers; they are by_length"),
        ({"rewards": {"accuracy": {"column": "gold"}}}, "needs the column 'gold' of gold answers"),
        ({"rewards": "acuracy"}, "the nearest is 'accuracy'"),
        ({"dataset": None}, "needs a setting `dataset`"),
        ({"datset": "x"}, "unknown setting 'datset'"),
    ],
)
def test_mistakes_exit_with_2(project, capsys, settings, message):
    assert cli.main(["lint-data", project(**settings)]) == 2
    assert message in capsys.readouterr().err


def test_a_long_report_is_short():
    hopeless = [(row, "x" * 1000, "why") for row in range(1000)]
    lines = GoldReport(dataset="dataset", reward="r", num_rows=1000, kinds={}, hopeless=hopeless).lines()
    assert len(lines) == 12
    assert max(map(len, lines)) < 1000
    assert lines[-1].startswith("  and 990 more: rows 10, 11, ")
    assert lines[-1].endswith(" ...")


def test_a_run_with_rewards_by_name_logs_their_doubtful_outcomes(project, capsys):
    own = "tests.pool_functions:by_length"
    run = {"use_cpu": True, "bf16": False, "max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2}
    run |= {"max_completion_length": 8, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    rewards = [{"accuracy": {"timeout": 30}}, {"gate": {"reward": {"in_pool": {"function": own}}, "condition": own}}]
    path = project(rows=ROWS[:4], model=str(tiny.CHECKPOINT), rewards=rewards, **run)
    trainer = train.make_trainer(path, {})
    trainer.train()
    logged = trainer.state.log_history[0]
    names = ["timeout", "unparsed_gold", "unparsed_answer", "error"]
    assert all(0 <= logged[f"rewards/accuracy/{name}"] <= 1 for name in names)
    assert logged["rewards/by_length_if_by_length/mean"] >= 0
