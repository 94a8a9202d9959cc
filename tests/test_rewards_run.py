"""`grpo-fast train` on reasoning-gym's word problems with SmolLM2 and three of R1's rewards, by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reasoning_gym
import yaml

from grpo_fast.recipes.smollm2 import load_smollm2

pytestmark = [pytest.mark.slow, pytest.mark.smol, pytest.mark.vllm]

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = "Think first, then answer: <think>your reasoning</think><answer>\\boxed{the number}</answer>"
STEPS, ROWS = 3, 16


def test_word_problems_with_rewards_by_name(tmp_path):
    with (tmp_path / "problems.jsonl").open("w") as file:
        for row in reasoning_gym.create_dataset("gsm_symbolic", size=40, seed=1):
            prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
            file.write(json.dumps({"prompt": prompt, "answer": row["answer"]}) + "\n")
    settings = {
        "model": str(load_smollm2()),
        "dataset": "problems.jsonl",
        "rewards": [
            {"accuracy": {"timeout": 30}},
            "format",
            {"language_consistency": {"language": "en", "part": "all"}},
        ],
        "output_dir": str(tmp_path / "out"),
        "use_vllm": True,
        "use_cpu": True,
        "bf16": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "max_completion_length": 64,
        "vllm_max_model_length": 512,
        "logging_steps": 1,
        "report_to": "none",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    for command in ("lint-data", "train"):
        done = subprocess.run(
            [sys.executable, "-m", "grpo_fast.cli", command, str(tmp_path / "run.yaml")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if command == "lint-data":
            assert "40" in done.stdout
    state = json.loads((tmp_path / "out" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    logs = [row for row in state["log_history"] if "reward" in row]
    assert len(logs) == STEPS
    for row in logs:
        for name in ("accuracy", "format", "language_consistency"):
            assert 0 <= row[f"rewards/{name}/mean"] <= 1
        for doubt in ("timeout", "unparsed_gold", "unparsed_answer", "error"):
            assert 0 <= row[f"rewards/accuracy/{doubt}"] <= 1
        # every gold answer is a number
        assert row["rewards/accuracy/unparsed_gold"] == 0
    # it writes English
    assert max(row["rewards/language_consistency/mean"] for row in logs) > 0.5
