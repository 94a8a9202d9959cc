"""The completions table: TRL's columns, and nothing that a run logs may end it."""

import json
import random
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from datasets import Dataset
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from PIL import Image

from grpo_fast import GRPOConfig
from grpo_fast.completions import CompletionLog, commit_completions, without_images
from tests.tiny_lm import CHAT_TEMPLATE, make_tokenizer, save

ASKED = [{"role": "user", "content": "a="}]
CALLS = [
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


def filled(log, rows=3, **extra):
    log["prompt"].extend([f"p{i}" for i in range(rows)])
    log["completion"].extend([f"c{i}" for i in range(rows)])
    log["rewards"]["length"].extend([float(i) for i in range(rows)])
    log["rewards"]["exact"].extend([float("nan")] * rows)
    log["advantages"].extend([0.5] * rows)
    for name, values in extra.items():
        log["extra"][name].extend(values)
    return log


def test_columns_and_their_order():
    table = filled(CompletionLog(8), note=["x", "y", "z"]).table(7)
    assert list(table) == ["step", "prompt", "completion", "length", "exact", "note", "advantage"]
    assert table["step"] == [7, 7, 7]
    assert table["note"] == ["x", "y", "z"]


def test_only_the_latest_batch_is_kept():
    table = filled(filled(CompletionLog(3)), note=["x", "y", "z"]).table(1)
    assert {len(values) for values in table.values()} == {3}


@pytest.mark.parametrize(("values", "expected"), [([1], [None, None, 1]), ([], [None] * 3), ([1, 2, 3, 4], [2, 3, 4])])
def test_the_newest_rows_stand_beside_each_other(tmp_path, values, expected):
    log = filled(CompletionLog(8), note=values)
    assert log.table(1)["note"] == expected
    log.print_table(1, None)
    assert len(pd.read_parquet(log.write(1, tmp_path))) == 3


def test_a_name_that_is_taken_hides_no_column():
    log = filled(CompletionLog(8), prompt=["x"] * 3, length=["y"] * 3)
    log["rewards"]["advantage"].extend([1.0] * 3)
    table = log.table(1)
    assert table["prompt"] == ["p0", "p1", "p2"]
    assert table["advantage"] == [0.5] * 3
    assert table["length"] == [0.0, 1.0, 2.0]
    assert {"prompt (extra)", "length (extra)", "advantage (reward)"} < set(table)


def test_images_leave_the_text_columns():
    content = [{"type": "image", "image": Image.new("RGB", (2, 2))}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "system", "content": "Look."}, {"role": "user", "content": content}]
    stripped = [messages[0], {"role": "user", "content": [{"type": "image"}, content[1]]}]
    assert without_images(messages) == stripped
    assert content[0].keys() == {"type", "image"}
    assert without_images("text") == "text"


def test_values_that_parquet_cannot_hold_become_json(tmp_path):
    """Tool calls whose arguments differ in type, or are empty, end a run of TRL's at its first log."""
    log = CompletionLog(8)
    for arguments in ({"a": 1}, {"a": "one"}, {}):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        filled(log, rows=1, mixed=[arguments.get("a")])
        log["completion"][-1] = [call]
    table = pd.read_parquet(log.write(2, tmp_path))
    calls = [json.loads(text)[0]["tool_calls"][0]["function"]["arguments"] for text in table["completion"]]
    assert calls == [{"a": 1}, {"a": "one"}, {}]
    assert table["mixed"].tolist()[:2] == ["1", '"one"']
    assert table["length"].tolist() == [0.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["completions_00002.parquet"]


def test_the_printed_table_reads_as_a_conversation(capsys):
    log = filled(CompletionLog(8), rows=1, note=[None])
    log["prompt"][0] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " [b]What?"}]}]
    log["completion"][0] = CALLS
    log.print_table(12, None)
    printed = capsys.readouterr().out
    for text in ("Step 12", "USER", "[IMAGE]", "[b]What?", "hm", "add(a=1)", "It is 3."):
        assert any(text in line for line in printed.splitlines()), text


def test_some_rows_are_printed_without_moving_the_runs_random_state(capsys):
    log = filled(CompletionLog(64), rows=50)
    random.seed(0)
    state = random.getstate()
    log.print_table(1, 2)
    assert random.getstate() == state
    assert sum(f"c{i} " in line for line in capsys.readouterr().out.splitlines() for i in range(50)) == 2
    log.print_table(1, 0)
    assert capsys.readouterr().out == ""


# -- loggers: recorders, as none of them is installed where the tests run ----------------------------------------------


@pytest.fixture
def sent(monkeypatch):
    sent = {}
    for name in ("wandb", "trackio"):
        backend = SimpleNamespace(
            run=object(),
            Image=lambda image: ("image", image),
            Table=lambda dataframe: dataframe,
            log=lambda metrics, name=name: sent.update({name: metrics["completions"]}),
        )
        monkeypatch.setitem(sys.modules, name, backend)
    return sent


def test_loggers_get_the_table_and_its_images(sent):
    log = filled(CompletionLog(8))
    log["images"].extend([None, ["one", "two"]])
    log.send(4, ["wandb", "trackio"], unique_prompts=False)
    assert set(sent) == {"wandb", "trackio"}
    columns = ["step", "prompt", "completion", "length", "exact", "advantage", "image"]
    assert list(sent["wandb"].columns) == columns
    assert sent["wandb"]["image"].tolist() == [[], [], [("image", "one"), ("image", "two")]]


def test_loggers_get_each_prompt_once(sent):
    log = CompletionLog(8)
    for completion in ("x", "y"):
        filled(log, rows=1)
        log["prompt"][-1], log["completion"][-1] = ASKED, completion
    log.send(4, ["wandb"], unique_prompts=True)
    assert sent["wandb"]["completion"].tolist() == ["x"]
    assert "image" not in sent["wandb"]


def test_loggers_that_the_run_does_not_report_to_get_nothing(sent):
    sys.modules["wandb"].run = None
    filled(CompletionLog(8)).send(4, ["wandb", "tensorboard"], unique_prompts=False)
    assert sent == {}


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), HTTPError("refused")], ids=["offline", "refused"])
def test_a_hub_out_of_reach_is_named(tmp_path, monkeypatch, error):
    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.create_repo", unreachable)
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    args.log_completions_hub_repo = "someone/completions"
    with pytest.raises(ConnectionError, match=r"log_completions_hub_repo='someone/completions' needs the hub .*failed"):
        commit_completions(args, tmp_path)


def test_a_hub_repository_gets_the_card_and_the_parquet_files(tmp_path, monkeypatch):
    """The hub is a recorder: what is asked of it, and in which order."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **kwargs: asked.append(("create", repo, kwargs)))
    monkeypatch.setattr(huggingface_hub, "CommitScheduler", lambda **kwargs: asked.append(("commit", kwargs)))
    push = lambda card, repo, **kwargs: asked.append(("card", repo, card.content))  # noqa: E731 - a method
    monkeypatch.setattr(huggingface_hub.DatasetCard, "push_to_hub", push)
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", hub_model_id="me/m", hub_token="t")
    args.log_completions_hub_repo = "me/c"
    commit_completions(args, tmp_path)
    (_, repo, created), (_, _, card), (_, scheduled) = asked
    assert (repo, created["repo_type"], created["token"], created["exist_ok"]) == ("me/c", "dataset", "t", True)
    assert "tags:\n- grpo-fast" in card
    assert 'load_dataset("me/c")' in card
    assert "https://huggingface.co/me/m" in card
    assert scheduled | {"every": 2, "repo_id": "me/c", "allow_patterns": ["*.parquet"]} == scheduled
    assert scheduled["folder_path"] == tmp_path


# -- against TRL -------------------------------------------------------------------------------------------------------


@pytest.mark.trl
@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "messages"])
def test_the_parquet_file_is_trls(tmp_path, is_chat):
    import trl

    import grpo_fast

    model = save(tmp_path / "model")
    frames, histories = [], []
    for package in (trl, grpo_fast):
        out = tmp_path / package.__name__
        trainer = package.GRPOTrainer(
            model=model,
            reward_funcs=[lambda **_: []],
            args=package.GRPOConfig(
                str(out), use_cpu=True, bf16=False, report_to="none", log_completions=True, num_completions_to_print=1
            ),
            train_dataset=Dataset.from_list([{"prompt": "a="}] * 8),
            processing_class=make_tokenizer(CHAT_TEMPLATE),
        )
        assert (out / "completions").is_dir()
        assert set(trainer._logs) == {"images", "prompt", "completion", "rewards", "advantages", "extra"}
        assert trainer._logs["prompt"].maxlen == trainer._logs["extra"]["x"].maxlen == 8
        trainer._logs["extra"].clear()
        filled(trainer._logs, note=["x", "y", "z"])
        if is_chat:
            trainer._logs["prompt"][0], trainer._logs["completion"][0] = ASKED, CALLS
            trainer._logs["prompt"][1] = trainer._logs["prompt"][2] = ASKED
            trainer._logs["completion"][1] = trainer._logs["completion"][2] = CALLS[-1:]
        trainer._metrics["train"] |= {"reward": [1.0, float("nan"), 2.0], "none": [float("nan")]}
        trainer.model.train()
        trainer.state.global_step = 12
        trainer.log({"loss": 0.5})
        assert not trainer._metrics["train"]
        frames.append(pd.read_parquet(out / "completions" / "completions_00012.parquet"))
        histories.append(trainer.state.log_history)
    pd.testing.assert_frame_equal(frames[1], frames[0])
    assert histories[1] == histories[0]
