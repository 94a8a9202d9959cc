"""`GRPOTrainer` with a real vLLM in its process: after every optimizer step the engine runs the trainer's weights."""

import os

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.attention import native_attention
from grpo_fast.batch import Sampling
from grpo_fast.generation import progress
from tests.tiny_lm import make_model, make_tokenizer

pytestmark = pytest.mark.vllm

PROMPTS = [[5, 9, 4], [7], [11, 12, 13, 14], [3, 3]]
GREEDY = Sampling(max_tokens=8, temperature=0.0)
# fp32 in both: what is left is the order of sums
MAX_LOGP_DIFFERENCE = 1e-4


def greedy_by_transformers(model):
    """One prompt at a time, without padding."""
    outputs = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(GREEDY.max_tokens):
            with native_attention(model), torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
        outputs.append(ids[len(prompt) :])
    return outputs


class CompareEngines(TrainerCallback):
    def __init__(self):
        self.outputs = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.trainer.sync_engine()
        self.outputs.append(self.trainer.engine.generate(PROMPTS, GREEDY).ids)
        assert self.outputs[-1] == greedy_by_transformers(model)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    compare = CompareEngines()
    trainer = GRPOTrainer(
        # vLLM's CPU attention takes heads of 32 and wider
        model=make_model(seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1),
        reward_funcs=lambda completions, **kwargs: [len(set(text)) / 8 for text in completions],
        args=GRPOConfig(
            str(tmp_path_factory.mktemp("vllm")),
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            learning_rate=3e-2,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=5,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(10)]),
        processing_class=make_tokenizer(),
        callbacks=[compare],
    )
    compare.trainer = trainer
    trainer.train()
    yield trainer, compare.outputs
    trainer.engine.close()


def test_the_engine_follows_every_step(trained):
    trainer, outputs = trained
    assert trainer.engine.name == "vllm"
    assert len(outputs) == 3
    assert outputs[0] != outputs[-1], "the policy did not move: equal outputs would prove nothing"


def test_the_engine_is_in_this_process(trained):
    import psutil

    names = [child.name() for child in psutil.Process(os.getpid()).children(recursive=True)]
    assert not [name for name in names if "vllm" in name.lower() or "engine" in name.lower()], names


def test_sampled_log_probs_are_the_trainers(trained):
    lines = [line for line in trained[0].state.log_history if "reward" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] < MAX_LOGP_DIFFERENCE
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        difference = [line[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "p99", "max")]
        assert difference == sorted(difference)
        assert line["sampling/effective_sample_size"] == pytest.approx(1, abs=MAX_LOGP_DIFFERENCE**2)
        # half the mean square of the log-ratios; above 0, since orders of sums do differ
        for name in ("sampling/kl_sampler_trainer", "sampling/kl_trainer_sampler"):
            assert 0 < line[name] < MAX_LOGP_DIFFERENCE**2
        # aligned steps take the old log-probs from the loss pass: the ratio is exactly 1 and nothing is clipped
        assert line["clip_ratio/region_mean"] == 0
    assert lines[1]["time/sync"] > 0


def test_disable_tqdm_silences_the_engines_bar(trained, monkeypatch, capsys):
    # due at every step
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    trained[0].engine.generate(PROMPTS, GREEDY)
    assert capsys.readouterr() == ("", "")
