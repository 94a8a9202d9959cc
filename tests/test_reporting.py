"""What a run leaves behind: log lines, the model card, and checkpoints from which it resumes bit for bit."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard

from grpo_fast import GRPOConfig, GRPOTrainer
from tests.processes import launch_text
from tests.tiny_lm import make_tokenizer, save

ROWS = [{"prompt": f"{i}+{j}=", "answer": i + j} for i in range(2) for j in range(4)]
# windows of 8 micro-batches, 4 optimizer steps, 2 an epoch: step 11 is in the midst of the second epoch's first window
WINDOWS = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
}
# what depends on the clock and on the machine
CLOCKED = ("step_time", "time/", "memory/", "train_", "total_flos")


def reward(completions, answer, **kwargs):
    return [len(set(text)) / 4 + (str(a) in text) for text, a in zip(completions, answer, strict=True)]


def build(tmp_path, *, trainer_class=GRPOTrainer, model=None, **kwargs):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | kwargs
    return trainer_class(
        model=model or save(tmp_path / "model"),
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lines_of(trainer, first_step):
    return [
        {name: value for name, value in line.items() if not name.startswith(CLOCKED)}
        for line in trainer.state.log_history
        if line["step"] >= first_step and "loss" in line
    ]


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 8, 11], ids=["in a window", "at an epoch's end", "in the next epoch's window"])
def test_a_resumed_run_is_the_straight_one(tmp_path, step):
    settings = WINDOWS | {
        "max_steps": 14,
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "use_adaptive_entropy": True,
        "entropy_target": 2.65,
        "entropy_coef": 0.01,
        "save_steps": step,
    }
    straight = build(tmp_path, save_strategy="steps", **settings)
    straight.train()
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
    assert torch.equal(weights_of(resumed.model), weights_of(straight.model))
    assert torch.equal(weights_of(resumed.ref_model), weights_of(straight.ref_model))
    assert resumed.entropy_coef == straight.entropy_coef
    assert lines_of(resumed, step + 1) == lines_of(straight, step + 1)
    assert resumed._step % 8 == straight._step % 8


TWO_PROCESSES = """
import sys
from pathlib import Path

import torch

from tests.test_reporting import WINDOWS, build, weights_of

folder = Path(sys.argv[1])
settings = WINDOWS | {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "max_steps": 5, "save_steps": 3,
                      "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "model": str(folder / "model")}
straight = build(folder, save_strategy="steps", **settings)
straight.train()
resumed = build(folder, **settings)
resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-3"))
assert torch.equal(weights_of(resumed.model), weights_of(straight.model)), "the policies differ"
assert torch.equal(weights_of(resumed.ref_model), weights_of(straight.ref_model)), "the references differ"
assert not torch.equal(weights_of(resumed.ref_model), weights_of(build(folder, **settings).ref_model)), "no sync"
assert (folder / "out" / "checkpoint-3" / f"rollout_{straight.accelerator.process_index}.pth").is_file()
"""


@pytest.mark.slow
def test_two_processes_resume_as_one_does(tmp_path):
    save(tmp_path / "model")
    launch_text(TWO_PROCESSES, tmp_path, tmp_path)


def test_a_checkpoint_between_windows_holds_no_rollout(tmp_path):
    build(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, **WINDOWS).train()
    folders = {path.name: path for path in (tmp_path / "out").glob("checkpoint-*")}
    holders = {name for name, path in folders.items() if (path / "rollout_0.pth").is_file()}
    assert holders == {"checkpoint-2", "checkpoint-6"}


def test_without_a_rollout_the_run_generates_at_once(tmp_path):
    """TRL's checkpoints hold none; and what the trainer had in its buffer is not of that step."""
    build(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, **WINDOWS).train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    (checkpoint / "rollout_0.pth").unlink()
    trainer = build(tmp_path, max_steps=4, **WINDOWS)
    trainer._step, trainer._buffered_inputs = 5, [{"completion_ids": None}] * 4
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer._step == 2
    assert trainer._buffered_inputs[0]["completion_ids"] is not None


def test_a_rollout_of_other_windows_is_announced_and_left(tmp_path, caplog):
    build(tmp_path, max_steps=3, save_strategy="steps", save_steps=3, **WINDOWS).train()
    trainer = build(tmp_path, max_steps=4, **WINDOWS | {"num_iterations": 3})
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert "is not used: it was of" in caplog.text
    assert trainer._step == 2


def test_a_rollout_that_only_pickle_could_read_is_not_written(tmp_path, caplog):
    class Foreign(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs) | {"where": tmp_path}

    build(tmp_path, trainer_class=Foreign, max_steps=3, save_strategy="steps", save_steps=3, **WINDOWS).train()
    assert "the rollout is not saved, a resumed run generates anew: ['where'] cannot be stored" in caplog.text
    assert not (tmp_path / "out" / "checkpoint-3" / "rollout_0.pth").exists()


def test_a_model_alone_is_saved_alone(tmp_path):
    settings = WINDOWS | {"beta": 0.1, "sync_ref_model": True, "max_steps": 3, "save_steps": 3}
    build(tmp_path, save_strategy="steps", save_only_model=True, **settings).train()
    assert not list((tmp_path / "out" / "checkpoint-3").glob("*.pth"))


def test_a_reference_that_is_missing_is_announced(tmp_path, caplog):
    settings = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}
    build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **settings).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "ref_model.pth").unlink()
    build(tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert "has no ref_model.pth: the reference model starts from the initial policy" in caplog.text


def test_the_entropy_controllers_file_is_trls(tmp_path):
    settings = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 5.0, "save_steps": 1}
    trainer = build(tmp_path, max_steps=1, save_strategy="steps", **settings)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    state = json.loads((checkpoint / "entropy_ctrl_state.json").read_text())
    assert state == {"entropy_coef": pytest.approx(0.015), "last_world_entropy": trainer._last_world_entropy}
    assert math.isfinite(state["last_world_entropy"])
    fresh = build(tmp_path, **settings)
    assert fresh.entropy_coef == 0.01
    fresh.create_optimizer_and_scheduler(2)
    fresh._load_optimizer_and_scheduler(str(checkpoint))
    assert (fresh.entropy_coef, fresh._last_world_entropy) == (trainer.entropy_coef, trainer._last_world_entropy)


# -- logs --------------------------------------------------------------------------------------------------------------


def test_metrics_are_means_without_nan(tmp_path):
    trainer = build(tmp_path)
    trainer._metrics["train"] |= {"a": [1.0, math.nan, 3.0], "b": [math.nan], "c": [2.0]}
    trainer._metrics["eval"] |= {"a": [5.0]}
    trainer.model.train()
    trainer.log({"loss": 0.0})
    trainer.model.eval()
    trainer.log({"eval_loss": 0.0})
    first, second = trainer.state.log_history
    assert first | {"a": 2.0, "b": None, "c": 2.0} == first
    assert second["eval_a"] == 5.0
    assert not trainer._metrics["train"]
    assert not trainer._metrics["eval"]


def test_the_table_is_written_at_every_log_of_the_main_process(tmp_path, capsys):
    trainer = build(tmp_path, log_completions=True, num_completions_to_print=1)
    folder = tmp_path / "out" / "completions"
    assert folder.is_dir()
    trainer.num_completions_to_print = 0
    trainer.train()
    assert sorted(path.name for path in folder.iterdir()) == ["completions_00001.parquet", "completions_00002.parquet"]
    assert "Step" not in capsys.readouterr().out


# -- the model card ----------------------------------------------------------------------------------------------------


def test_the_card_lies_beside_the_checkpoint(tmp_path):
    trainer = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    # the model came from a folder
    assert card.data.base_model is None
    assert card.data.library_name == "transformers"
    assert {"generated_from_trainer", "grpo-fast", "trl", "grpo"} <= set(card.data.tags)
    for text in ("# out\n", "shao2024deepseekmath", "2402.03300", f"- torch: {torch.__version__}", 'model="out"'):
        assert text in card.text


def test_the_card_says_what_it_is_told(tmp_path):
    trainer = build(tmp_path, hub_model_id="me/mine")
    trainer.model.config._name_or_path = "org/base"
    for tags in ("math", ["math", "grpo"]):
        trainer.create_model_card(dataset_name="org/problems", tags=tags)
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.base_model == "org/base"
        assert card.data.datasets == "org/problems"
        assert card.data.tags == ["generated_from_trainer", "grpo", "grpo-fast", "math", "trl"]
        assert card.data.model_name == "mine"
        assert 'model="me/mine"' in card.text
    trainer.create_model_card(model_name="Title")
    assert "# Title\n" in (tmp_path / "out" / "README.md").read_text()


def test_pushing_uploads_the_model_with_its_card(tmp_path, monkeypatch):
    """The hub is a recorder: what is uploaded, and what the folder holds by then."""
    from types import SimpleNamespace

    from transformers import trainer as hf

    uploads = []

    def upload_folder(*, folder_path, repo_id, **kwargs):
        uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
        return SimpleNamespace(done=lambda: True, result=lambda: None)

    created = SimpleNamespace(repo_id="me/mine")
    api = SimpleNamespace(create_repo=lambda *args, **kwargs: created, upload_folder=upload_folder)
    monkeypatch.setattr(hf, "hf_api", lambda: api)
    monkeypatch.setattr(hf, "upload_folder", upload_folder, raising=False)
    settings = {"push_to_hub": True, "hub_model_id": "mine", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = build(tmp_path, **settings)
    trainer.train()
    trainer.push_to_hub(dataset_name="org/problems")
    assert {repo for repo, _ in uploads} == {"me/mine"}
    assert all({"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= names for _, names in uploads)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.datasets == "org/problems"
