"""Scripts of five public shapes: as they are with TRL, and with nothing but the import line changed with us."""

import json
import math
import os
import re
import string
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tests.tool_chats import make_tokenizer

pytestmark = pytest.mark.trl

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parent.parent
PACKAGES = ("trl", "grpo_fast")
# fp32; TRL counts positions over the left padding, we from 0, and Adam enlarges what rounding leaves of small gradients
RTOL, ATOL = 1e-3, 1e-4
# timings and memory
IGNORED = re.compile(r"step_time|time/|memory/|train_runtime|_per_second|_runtime|total_flos")
# what ours measures on the rows that it runs
MEASURED = re.compile(r"entropy|clip_ratio|sampling/")
CHAT = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
EOS = "<|im_end|>"
CALL, END_OF_CALL = '<tool_call>\n{"name": "guess", "arguments": {"number": ', "}}\n</tool_call>"


def save_model(folder, template=CHAT, following=None):
    """A language model that writes digits until it ends, and what `following` says after certain tokens.

    Its embeddings are one-hot and its head is a table of logits, so that completions have a form without training.
    """
    tokenizer = make_tokenizer(template, EOS)
    tokenizer.add_tokens(sorted({*(following or {}), *(after for row in (following or {}).values() for after in row)}))
    size = len(tokenizer)
    logits = torch.full((size, size), -6.0)
    digits = tokenizer.convert_tokens_to_ids(list(string.digits))
    logits[:, digits] = 1.0
    logits[:, tokenizer.eos_token_id] = 2.0
    for token, row in (following or {}).items():
        for current in digits if token == "digit" else [tokenizer.convert_tokens_to_ids(token)]:
            if any(after != EOS for after in row):
                logits[current, [*digits, tokenizer.eos_token_id]] = -6.0
            for after, logit in row.items():
                ids = digits if after == "digit" else [tokenizer.convert_tokens_to_ids(after)]
                logits[current, ids] = logit
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(tokenizer))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        # a one-hot state has length 1 before the last norm, and this after it
        model.lm_head.weight[:, :size] = logits.T / math.sqrt(model.config.hidden_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_config(tokenizer):
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def run_script(name, package, folder, arguments):
    """Run one of `scripts/` in a process of its own, with `package` in place of trl in its import line."""
    text = (SCRIPTS / f"{name}.py").read_text()
    ours = "GRPOConfig, GRPOTrainer"
    (line,) = re.findall(rf"^from trl import {ours}.*$", text, re.MULTILINE)
    rest = line.removeprefix(f"from trl import {ours}").removeprefix(", ")
    # what is not the trainer's stays TRL's
    imports = [f"from {package} import {ours}", *([f"from trl import {rest}"] if rest else [])]
    folder.mkdir()
    script = folder / f"{name}.py"
    script.write_text(text.replace(line, "\n".join(imports)))
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{package}: {result.stderr[-4000:]}"
    return folder


def run_both(name, tmp_path, arguments):
    """The folders of both runs, after asserting that their histories are the same."""
    folders = {package: run_script(name, package, tmp_path / package, arguments) for package in PACKAGES}
    theirs, ours = (json.loads((folders[p] / "out" / "trainer_state.json").read_text()) for p in PACKAGES)
    assert_same_history(ours["log_history"], theirs["log_history"])
    for name in ("global_step", "max_steps", "num_input_tokens_seen", "best_global_step", "epoch"):
        assert ours[name] == theirs[name], name
    assert ours["best_metric"] == (theirs["best_metric"] and pytest.approx(theirs["best_metric"], rel=RTOL))
    return folders["trl"], folders["grpo_fast"]


def assert_same_history(ours, theirs):
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            where = f"{name} at step {expected['step']}"
            assert name in line, where
            if line.get("rows/skipped") and MEASURED.search(name):
                continue
            if value is None or (isinstance(value, float) and math.isnan(value)):
                assert line[name] is None or math.isnan(line[name]), where
            elif not IGNORED.search(name):
                assert line[name] == pytest.approx(value, rel=RTOL, abs=ATOL), where


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_recipe_with_a_yaml_file(tmp_path):
    rows = [
        {"problem": f"{i} + {j} = ", "solution": None if i == j else str(i + j)} for i in range(4) for j in range(4)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": save_model(tmp_path / "model"),
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "dataset_name": str(tmp_path / "train.json"),
        "reward_funcs": ["accuracy", "format", "repetition", "judge"],
        "repetition_max_penalty": -0.5,
        "system_prompt": "be brief",
        "output_dir": "out",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "max_completion_length": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "reward_weights": [1.0, 0.5, 1.0, 0.25],
        "temperature": 0.7,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "report_to": "none",
        "seed": 42,
        "log_completions": True,
        "chat_template_kwargs": {"thinking": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    # the command line has the last word
    theirs, ours = run_both("recipe", tmp_path, ["--config", str(tmp_path / "config.yaml"), "--max_steps", "4"])
    expected = {name for name in files_of(theirs / "out") if "completions" not in name}
    assert expected <= files_of(ours / "out")
    history = json.loads((ours / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"rewards/repetition_penalty/mean", "rewards/judge_reward/mean", "judge/step"} <= set(history[0])
    tables = [sorted((folder / "out" / "completions").glob("*.parquet")) for folder in (theirs, ours)]
    assert [path.name for path in tables[1]] == [path.name for path in tables[0]]
    for expected_table, table in zip(*tables, strict=True):
        expected_rows, own = pd.read_parquet(expected_table), pd.read_parquet(table)
        assert list(own.columns) == list(expected_rows.columns)
        assert [c[0]["content"] for c in own["completion"]] == [c[0]["content"] for c in expected_rows["completion"]]
    weights = [AutoModelForCausalLM.from_pretrained(folder / "out").state_dict() for folder in (theirs, ours)]
    # four steps of Adam at 1e-3: a gradient that is rounding alone may go either way
    for name, weight in weights[1].items():
        assert (weight - weights[0][name]).abs().max() < 8e-3, name


@pytest.mark.slow
def test_a_lora_notebook(tmp_path):
    theirs, ours = run_both("lora_notebook", tmp_path, [save_model(tmp_path / "model"), "out"])
    assert {"checkpoint-2/adapter_model.safetensors", "final/adapter_model.safetensors", "README.md"} <= (
        files_of(ours / "out")
    )
    assert files_of(theirs / "out") <= files_of(ours / "out")
    card = (ours / "out" / "README.md").read_text()
    assert "sums" in card
    assert "GRPO" in card


@pytest.mark.slow
def test_an_environment_with_tools(tmp_path):
    import trl.chat_template_utils

    following = {
        "\n": {CALL: 4.0, "digit": 0.5},
        CALL: {"digit": 1.0},
        "digit": {END_OF_CALL: 2.0, EOS: 1.0},
        END_OF_CALL: {EOS: 3.0},
    }
    # TRL knows tool calls by whole templates
    template = trl.chat_template_utils.qwen3_instruct_2507_chat_template
    model = save_model(tmp_path / "model", template=template, following=following)
    _, ours = run_both("environment", tmp_path, [model, "out"])
    history = json.loads((ours / "out" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["tools/call_frequency"] > 0.3
    assert {"rewards/GuessingGame/mean", "rewards/few_calls/std"} <= set(history[0])


@pytest.mark.slow
def test_a_rollout_function(tmp_path):
    _, ours = run_both("rollout", tmp_path, [save_model(tmp_path / "model"), "out"])
    history = json.loads((ours / "out" / "trainer_state.json").read_text())["log_history"]
    # each generation serves two steps; the reply's token is not the model's
    assert ["reward" in line for line in history] == [True, False, True, False, False]
    assert history[0]["completions/max_length"] <= 7


@pytest.mark.slow
def test_evaluation_callbacks_and_reward_models(tmp_path):
    model = save_model(tmp_path / "model")
    tokenizer = make_tokenizer(CHAT, EOS)
    torch.manual_seed(3)
    config = make_config(tokenizer)
    config.num_labels, config.initializer_range = 1, 0.2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    _, ours = run_both("evaluation", tmp_path, [model, str(tmp_path / "judge"), "out"])
    state = json.loads((ours / "out" / "trainer_state.json").read_text())
    assert state["best_global_step"] in (2, 3, 4)
