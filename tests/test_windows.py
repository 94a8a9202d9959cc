"""What an optimizer step runs: packs of all its micro-batches, without silent rows, one pass a token."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer
from tests.processes import launch_text
from tests.tiny_lm import make_model, make_tokenizer

# fp32: the same sums in another order
RTOL, ATOL = 1e-5, 1e-6
PROMPTS = ["abcdefgh+", "12345678="]
G = 4


def lengths_of(row):
    return 2 + (row * 5) % 7


def rollout(prompts, trainer):
    """Ragged completions that depend on the row alone; rewards read them."""
    tokenizer = trainer.processing_class
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    completions = [[5 + (3 * i + j) % 30 for j in range(lengths_of(i))] for i in range(len(prompts))]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[-1.0] * len(c) for c in completions]}


def by_first_token(completions, completion_ids, **kwargs):
    return [float(ids[0] % 7) for ids in completion_ids]


def first_group_alike(completions, completion_ids, **kwargs):
    """No signal in the first prompt's group."""
    return [0.0 if i < G else float(ids[0] % 7) for i, ids in enumerate(completion_ids)]


def no_signal(completions, **kwargs):
    return [1.0] * len(completions)


class Embedded:
    """Counts the tokens that go through a model's embedding."""

    def __init__(self, model):
        self.counts = []
        model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: self.counts.append(inputs[0].numel()))


class Gradients(TrainerCallback):
    """The gradients of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))


def build(tmp_path, *, reward=by_first_token, base=GRPOTrainer, num_prompts=2, **kwargs):
    settings = {
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_generations": G,
        "max_completion_length": 9,
        # what memory allows is not asked here
        "max_tokens_per_pack": 4096,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 1e3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
    } | kwargs
    gradients = Gradients()
    trainer = base(
        model=make_model(),
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path / "out"), **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:num_prompts] * 8}),
        processing_class=make_tokenizer(),
        callbacks=[gradients],
        rollout_func=rollout,
    )
    return trainer, gradients


def run(tmp_path, **kwargs):
    """Gradients of each step, logs of each step, and the tokens of each pass."""
    trainer, gradients = build(tmp_path, **kwargs)
    embedded = Embedded(trainer.model)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return gradients.steps, logs, embedded.counts


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_prompts_are_shared_over_micro_batches(tmp_path):
    """The shuffle tears groups apart; a step still runs each prompt once."""
    (together,), (logs,), counts = run(tmp_path, share_prompts=True)
    bodies = sum(lengths_of(row) - 1 for row in range(2 * G))
    assert counts == [2 * 9 + bodies]
    unshared = 2 * G * 9 + bodies
    assert logs["tokens/shared_ratio"] == pytest.approx(1 - counts[0] / unshared)
    assert logs["tokens/useful_ratio"] == pytest.approx((bodies + 2 * G) / counts[0])
    assert logs["tokens/padding_ratio"] == logs["rows/skipped"] == 0

    class OneByOne(GRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            return super()._prepare_inputs(generation_batch)

    # whose micro-batches are packed alone, since it may change each when its turn comes
    (apart,), (other_logs,), other_counts = run(tmp_path, share_prompts=True, base=OneByOne)
    assert len(other_counts) == 4
    torch.testing.assert_close(together, apart, rtol=RTOL, atol=ATOL)
    for name in ("loss", "entropy", "clip_ratio/region_mean"):
        assert logs[name] == pytest.approx(other_logs[name], abs=1e-6)


@pytest.mark.parametrize("budget", [9, 12, 30])
def test_packs_are_dealt_to_micro_batches_and_none_is_lost(tmp_path, budget):
    (whole,), (logs,), _ = run(tmp_path)
    (parts,), (other_logs,), counts = run(tmp_path, max_tokens_per_pack=budget, share_prompts=False)
    assert len(counts) > 4 or budget == 30
    torch.testing.assert_close(parts, whole, rtol=RTOL, atol=ATOL)
    assert logs["loss"] == pytest.approx(other_logs["loss"], abs=1e-6)


@pytest.mark.parametrize("steps_per_generation", [1, 2, 8])
def test_windows_end_with_the_generation_and_with_the_step(tmp_path, steps_per_generation):
    """A generation of fewer micro-batches than a step, and of more."""
    settings = {"steps_per_generation": steps_per_generation, "per_device_train_batch_size": 4, "max_steps": 2}
    together, _, _ = run(tmp_path, **settings)

    class OneByOne(GRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            return super()._prepare_inputs(generation_batch)

    apart, _, _ = run(tmp_path, base=OneByOne, **settings)
    assert len(together) == len(apart) == 2
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=ATOL)


def test_silent_rows_do_not_run_and_the_gradient_is_the_same(tmp_path):
    (with_them,), (full,), all_counts = run(tmp_path, reward=first_group_alike, skip_zero_gradient_rows=False)
    (without,), (logs,), counts = run(tmp_path, reward=first_group_alike)
    assert sum(counts) < sum(all_counts)
    assert logs["rows/skipped"] == G
    torch.testing.assert_close(without, with_them, rtol=RTOL, atol=ATOL)
    assert logs["loss"] == pytest.approx(full["loss"], abs=1e-6)


@pytest.mark.parametrize("reason", [{"beta": 0.1}, {"entropy_coef": 0.1}])
def test_rows_with_another_term_run(tmp_path, reason):
    _, (logs,), counts = run(tmp_path, reward=first_group_alike, **reason)
    _, _, all_counts = run(tmp_path, reward=first_group_alike, skip_zero_gradient_rows=False, **reason)
    assert logs["rows/skipped"] == 0
    assert counts == all_counts


def test_a_step_without_a_signal_runs_one_token_and_steps_as_trl_does(tmp_path):
    """Zeros for gradients: AdamW's moments, its weight decay and the schedule go on."""

    def signal_at_first(completions, completion_ids, trainer_state, **kwargs):
        return [float(ids[0] % 7) * (trainer_state.global_step == 0) for ids in completion_ids]

    settings = {"reward": signal_at_first, "max_steps": 3, "optim": "adamw_torch", "weight_decay": 0.1}
    skipping, gradients = build(tmp_path, **settings)
    embedded = Embedded(skipping.model)
    skipping.train()
    assert embedded.counts[-2:] == [1, 1]
    assert gradients.steps[0].any()
    assert not gradients.steps[1].any()
    logs = [row for row in skipping.state.log_history if "loss" in row]
    assert logs[1]["loss"] == logs[1]["grad_norm"] == 0
    assert logs[1]["rows/skipped"] == 2 * G
    # of no token, so not 0
    assert logs[1]["entropy"] is None
    running, _ = build(tmp_path, skip_zero_gradient_rows=False, **settings)
    running.train()
    torch.testing.assert_close(weights(skipping), weights(running), rtol=RTOL, atol=ATOL)


def test_several_passes_take_the_old_policy_from_the_first(tmp_path):
    """Three iterations over a generation, of which only the first runs the weights that generated."""
    settings = {"num_iterations": 3, "max_steps": 3, "reward": first_group_alike, "learning_rate": 0.5}
    taken, logs, counts = run(tmp_path, **settings)

    class Scored(GRPOTrainer):
        # scored apart, as where a subclass may read the old log-probs
        _takes_old_logps = False

    scored, scored_logs, scored_counts = run(tmp_path, base=Scored, **settings)
    assert len(counts) == 3
    assert len(scored_counts) == 4
    for ours, theirs in zip(taken, scored, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=ATOL)
    # the policy has moved
    assert logs[2]["clip_ratio/region_mean"] == scored_logs[2]["clip_ratio/region_mean"] > 0
    assert [row["rows/skipped"] for row in logs] == [G] * 3


def test_rows_that_the_first_pass_skipped_stay_out(tmp_path):
    """They have no old log-probs, whatever the advantages become."""

    class Edit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for part in trainer._buffered_inputs:
                part["advantages"] = part["advantages"] + 1.0

    trainer, _ = build(tmp_path, num_iterations=2, max_steps=2, reward=first_group_alike)
    trainer.add_callback(Edit())
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["rows/skipped"] for row in logs] == [G, G]


def test_what_users_write_into_the_buffer_is_seen(tmp_path):
    """In place, after the rollout's copies on the host have been made."""

    class Silence(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise AssertionError("one micro-batch a step")

        def on_step_end(self, args, state, control, **kwargs):
            trainer._buffered_inputs[1]["advantages"].zero_()

    trainer, gradients = build(
        tmp_path, gradient_accumulation_steps=1, steps_per_generation=2, per_device_train_batch_size=4, max_steps=2
    )
    trainer.add_callback(Silence())
    trainer.train()
    assert gradients.steps[0].any()
    assert not gradients.steps[1].any()


def test_evaluation_between_micro_batches_disturbs_nothing(tmp_path):
    class Evaluate(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer.evaluate()

    plain, _, _ = run(tmp_path, max_tokens_per_pack=12)
    trainer, gradients = build(tmp_path, max_tokens_per_pack=12, per_device_eval_batch_size=G)
    trainer.eval_dataset = trainer.train_dataset
    trainer.add_callback(Evaluate())
    trainer.train()
    torch.testing.assert_close(gradients.steps[0], plain[0], rtol=RTOL, atol=ATOL)


def test_a_micro_batch_out_of_turn_is_an_error(tmp_path):
    class Replace(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            trainer._buffered_inputs = [dict(part) for part in trainer._buffered_inputs]

    trainer, _ = build(tmp_path)
    trainer.add_callback(Replace())
    with pytest.raises(RuntimeError, match="micro-batch 2 of 4 of an optimizer step was expected"):
        trainer.train()


SHARDED = """
import os
import sys
import torch
from torch.distributed.fsdp import fully_shard
from tests.test_windows import GRPOTrainer, build
from pathlib import Path

seen, rank = [], int(os.environ["RANK"])


class Counting(GRPOTrainer):
    def _swept(self, *args):
        seen.append("pack")
        return super()._swept(*args)

    def _zero_loss(self, *args):
        seen.append("filler")
        return super()._zero_loss(*args)


trainer, gradients = build(
    Path(sys.argv[1]), base=Counting, ddp_backend="gloo", max_tokens_per_pack=12, share_prompts=False,
    # the second process has no signal
    reward=lambda completions, completion_ids, **_: [float(ids[0] % 7) * (rank == 0) for ids in completion_ids],
)
for layer in trainer.model.model.layers:
    fully_shard(layer)
fully_shard(trainer.model)
trainer.accelerator.prepare_model = lambda model, **_: model
trainer.train()
assert ("filler" in seen) == (rank == 1), seen
counts = [None, None]
torch.distributed.all_gather_object(counts, len(seen))
assert counts[0] == counts[1] > 4, counts
"""


def test_processes_that_share_weights_run_equally_many_passes(tmp_path):
    """FSDP2 gathers each layer's weights from all processes: a pass fewer in one of them would hang the other."""
    launch_text(SHARDED, tmp_path, tmp_path / "out")
