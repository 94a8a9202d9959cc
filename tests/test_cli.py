"""The command line: what it answers at once, how settings are read, what it refuses."""

import json
import os
import re
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from grpo_fast import cli
from grpo_fast.recipes import settings, tiny, train

REWARDS = """
LIMIT = 3

def shortness(completions, **columns):
    return [-float(len(completion)) for completion in completions]

def exact(completions, answer, **columns):
    return [float(str(truth) in completion) for completion, truth in zip(completions, answer)]
"""
BASE = {
    "model": str(tiny.CHECKPOINT),
    "dataset": "problems.jsonl",
    "rewards": ["own_rewards:exact"],
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a data set and reward functions; `write(**settings)` adds a YAML file and gives its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{n}+1=", "answer": n + 1} for n in range(8)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(*dropped, **changed):
        path = tmp_path / "run.yaml"
        found = {key: value for key, value in (BASE | changed).items() if key not in dropped}
        # JSON is YAML
        path.write_text(json.dumps(found))
        return path

    yield write
    sys.modules.pop("own_rewards", None)


def in_subprocess(code, **env):
    clean = {name: value for name, value in os.environ.items() if name not in cli.ENVIRONMENT}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=120, check=True
    )


# -- start-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["demo", "--help"], ["train", "--help"], ["lint-data", "--help"]]
)
def test_help_and_version_import_nothing_heavy(words):
    code = (
        "import sys; from grpo_fast.cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    assert "grpo-fast" in in_subprocess(code).stdout


def test_openmp_is_told_to_wait_passively_before_torch_is_loaded(tmp_path):
    # torch's OpenMP runtime prints what it read from the environment when it is loaded
    code = (
        f"import os; from grpo_fast.cli import main; assert main(['train', {str(tmp_path / 'no.yaml')!r}]) == 2\n"
        "assert os.environ['GOMP_SPINCOUNT'] == '0'"
    )
    shown = in_subprocess(code, OMP_DISPLAY_ENV="verbose").stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown
    assert "GOMP_SPINCOUNT = '0'" in shown


def test_the_users_environment_wins():
    code = (
        "import os; from grpo_fast.cli import main; main([])\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'ACTIVE' and os.environ['TOKENIZERS_PARALLELISM'] == 'false'"
    )
    in_subprocess(code, OMP_WAIT_POLICY="ACTIVE")


# -- flags -------------------------------------------------------------------------------------------------------------


def test_flags_are_read():
    numbers = ["--learning-rate", "2e-5", "--beta=-1", "--reward_weights", "1", "-0.5"]
    words = [*numbers, "--log_completions", "--run_name=", "--seed", "3"]
    assert cli.parse_flags(words) == {
        "learning_rate": "2e-5",
        "beta": "-1",
        "reward_weights": ["1", "-0.5"],
        "log_completions": True,
        "run_name": "",
        "seed": "3",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--beta", "1", "--beta", "2"], "--beta is given twice"),
        (["--learning-rate", "1", "--learning_rate", "2"], "--learning_rate is given twice"),
    ],
)
def test_malformed_flags_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        cli.parse_flags(words)


def test_settings_become_the_types_of_the_fields():
    converted = settings.convert_settings(
        {
            # PyYAML reads 2e-5 as text and a bare `no` as false
            "learning_rate": "2e-5",
            "save_strategy": False,
            "max_steps": "7",
            "logging_steps": 1,
            "bf16": "false",
            "log_completions": True,
            "reward_weights": ["1", 2],
            "report_to": ["tensorboard", "wandb"],
            "generation_kwargs": {"stop": ["x"]},
            "epsilon_high": None,
            "lr_scheduler_type": "constant",
        }
    )
    assert converted == {
        "learning_rate": 2e-5,
        "save_strategy": "no",
        "max_steps": 7,
        "logging_steps": 1.0,
        "bf16": False,
        "log_completions": True,
        "reward_weights": [1.0, 2.0],
        "report_to": ["tensorboard", "wandb"],
        "generation_kwargs": {"stop": ["x"]},
        "epsilon_high": None,
        "lr_scheduler_type": "constant",
    }
    assert settings.convert_settings({"reward_weights": 1}) == {"reward_weights": [1.0]}
    assert type(converted["max_steps"]) is int


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": "many"}, "max_steps must be a whole number, it is 'many'"),
        ({"max_steps": 1.5}, "max_steps must be a whole number, it is 1.5"),
        ({"learning_rate": True}, "learning_rate must be a number, it is True"),
        ({"log_completions": "perhaps"}, "log_completions must be true or false, it is 'perhaps'"),
        ({"save_strategy": "often"}, "save_strategy must be one of no, steps, epoch, best; it is 'often'"),
        ({"max_steps": [1, 2]}, r"max_steps takes one value, it is \[1, 2\]"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        settings.convert_settings(given)


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "no.yaml"], "grpo-fast: there is no file no.yaml\n"),
        (
            ["demo", "--learning_rat", "1"],
            "grpo-fast: unknown setting 'learning_rat' in the flags of `grpo-fast demo`; "
            "the nearest is 'learning_rate'\n",
        ),
        (
            ["demo", "--presett", "smoke"],
            "grpo-fast: unknown setting 'presett' in the flags of `grpo-fast demo`; the nearest is 'preset'\n",
        ),
        (
            ["demo", "--preset", "smoke", "--num_generations", "1"],
            "grpo-fast: num_generations must be at least 2, to compare completions of one prompt; it is 1\n",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, line, project, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err == line
    with pytest.raises(ValueError, match=re.escape(line.removeprefix("grpo-fast: ").strip())):
        cli.main([*words[:1], "--traceback", *words[1:]])


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


def test_an_unknown_choice_exits_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["demo", "--preset", "huge"])
    assert end.value.code == 2


def test_ctrl_c_exits_with_130(project, capsys):
    path = project(rewards=["interrupting:reward"])
    (path.parent / "interrupting.py").write_text("raise KeyboardInterrupt")
    assert cli.main(["train", str(path)]) == 130
    assert capsys.readouterr().err == "grpo-fast: interrupted\n"


# -- train -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rte": 1}, "unknown setting 'learning_rte' in .*run.yaml; the nearest is 'learning_rate'"),
        ({"datset": "x"}, "unknown setting 'datset' in .*run.yaml; the nearest is 'dataset'"),
        ({"dataset": "gone.jsonl"}, "dataset: there is no file 'gone.jsonl', neither in "),
        ({"eval_dataset": "gone.parquet"}, "eval_dataset: there is no file 'gone.parquet'"),
        ({"dataset": "columns.jsonl"}, r"dataset needs a `prompt` column, its columns are \['question'\]"),
        ({"model": "/nowhere/model"}, "model='/nowhere/model': the folder does not exist"),
        ({"model": "/nowhere/model", "dataset": "large/download"}, "model='/nowhere/model'"),
        (
            {"rewards": "exact"},
            r"rewards must be written module:function or be one of accuracy, .*weighted; one is 'exact'",
        ),
        ({"rewards": [{"own_rewards": "exact"}]}, "rewards must be written module:function, name or .*; one is {"),
        ({"rewards": ["missing_module:exact"]}, "rewards: 'missing_module:exact' cannot be imported: No module"),
        ({"rewards": ["own_rewards:gone"]}, "module 'own_rewards' has no 'gone'; it has shortness, exact"),
        ({"rewards": ["own_rewards:LIMIT"]}, "rewards: 'own_rewards:LIMIT' is not a function, it is int"),
        ({"rewards": []}, "run.yaml needs a setting `rewards`"),
        ({"peft": {"rank": 8}}, "unknown setting 'rank' in `peft`"),
        ({"peft": 8}, "peft must be a mapping of LoraConfig's fields, it is 8"),
        ({"num_generations": 3}, r"must be divisible by num_generations \(3\)"),
        ({"loss_type": "ppo"}, "loss_type must be one of"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(project, monkeypatch, changed, message):
    path = project(**changed)
    (path.parent / "columns.jsonl").write_text('{"question": "1+1="}\n')
    monkeypatch.setattr("grpo_fast.loading.load_model", None)
    with pytest.raises(ValueError, match=message):
        train.make_trainer(path, {})


@pytest.mark.parametrize("key", ["model", "dataset", "rewards"])
def test_what_a_run_needs_is_named(project, key):
    with pytest.raises(ValueError, match=f"run.yaml needs a setting `{key}`"):
        train.make_trainer(project(key), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not valid YAML"),
        ("- model", "it holds list"),
        ("", "it holds NoneType"),
        ("1: 2", "holds dict"),
    ],
)
def test_broken_yaml_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        train.read_settings(tmp_path / "run.yaml")


def test_flags_win_over_the_file_which_wins_over_defaults(project):
    path = project(**{"learning-rate": "3e-4", "beta": 0.5})
    trainer = train.make_trainer(path, {"beta": "0", "rewards": ["own_rewards:exact", "own_rewards:shortness"]})
    assert trainer.args.learning_rate == 3e-4
    assert trainer.args.beta == 0.0
    assert trainer.reward_func_names == ["exact", "shortness"]
    assert trainer.args.output_dir == "runs/run"


def test_training_from_a_file_saves_a_model_that_loads(project):
    path = project(eval_dataset="problems.jsonl", rewards="own_rewards:shortness")
    assert cli.main(["train", str(path), "--output-dir", "out", "--reward_weights", "0.5"]) == 0
    AutoModelForCausalLM.from_pretrained("out")


def test_an_adapter_is_trained_when_the_file_asks_for_one(project):
    trainer = train.make_trainer(project(peft={"r": 2, "target_modules": ["q_proj"]}), {})
    assert {
        name.split(".lora")[0].split(".")[-1] for name, p in trainer.model.named_parameters() if p.requires_grad
    } == {"q_proj"}


def test_parquet_is_read(project):
    from datasets import load_dataset

    path = project(dataset="problems.parquet")
    load_dataset("json", data_files="problems.jsonl", split="train").to_parquet("problems.parquet")
    assert train.make_trainer(path, {}).train_dataset.column_names == ["prompt", "answer"]
