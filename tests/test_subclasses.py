"""Subclasses of the trainer and patches of an instance: heard, and with the results they have on TRL's trainer."""

import functools
import logging

import pytest
import torch
from datasets import Dataset

import grpo_fast
from grpo_fast.tools import make_toolbox
from tests import trainer_subclasses as subclasses
from tests.tiny_lm import make_model, save
from tests.tool_chats import HERMES, encode, weather
from tests.tool_chats import make_tokenizer as make_chat_tokenizer
from tests.trainer_runs import (
    ATOL_OURS,
    RTOL_OURS,
    SEED,
    both,
    is_same,
    plain,
    rows,
    trained,
    weights_of,
)

# -- overrides against TRL ---------------------------------------------------------------------------------------------

SEAMS = {
    "_generate_and_score_completions: advantages of tokens": (subclasses.token_advantages, {}),
    "_generate_and_score_completions: shorter masks": (subclasses.shorter_masks, {"loss_type": "bnpo"}),
    "_calculate_rewards": (subclasses.length_penalty, {}),
    "_compute_loss: twice with other masks": (subclasses.two_losses, {"gradient_accumulation_steps": 2}),
    "_compute_loss: all its own": (subclasses.own_scores, {"temperature": 0.7}),
    "_get_per_token_logps_and_entropies": (subclasses.flattened_policy, {"steps_per_generation": 2}),
}
MORE_SEAMS = {
    "advantages of tokens, sequence level": (
        subclasses.token_advantages, {"importance_sampling_level": "sequence", "loss_type": "luspo"}
    ),
    "advantages of tokens, in slices": (subclasses.token_advantages, {"steps_per_generation": 2, "loss_type": "grpo"}),
    "shorter masks, KL": (subclasses.shorter_masks, {"beta": 0.1, "num_iterations": 2}),
    "masks with holes": (subclasses.masks_with_holes, {}),
    "_prepare_inputs": (subclasses.annealed_inputs, {"gradient_accumulation_steps": 2}),
    "_generate": (subclasses.cut_completions, {}),
    "_generate_single_turn": (subclasses.forced_ends, {}),
    "_tokenize_prompts": (subclasses.longer_prompts, {}),
    "compute_loss": (subclasses.reward_in_the_loss, {}),
    "geometric mean": (
        subclasses.geometric_mean,
        {"beta": 0.05, "num_iterations": 2, "epsilon": 0.002, "epsilon_high": 0.003, "top_entropy_quantile": 0.5},
    ),
    "the sampler": (subclasses.in_order, {"max_steps": 2}),
    "the loader": (subclasses.last_rows_only, {"max_steps": 2}),
}  # fmt: skip


@pytest.mark.trl
@pytest.mark.parametrize(
    ("make_class", "settings"),
    [
        *(pytest.param(*case, id=name) for name, case in SEAMS.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in MORE_SEAMS.items()),
    ],
)
def test_an_override_does_what_it_does_in_trl(tmp_path, make_class, settings):
    ours, _ = both(tmp_path, make_class, **settings)
    assert not is_same(ours, plain(**settings)), "the override is not heard"


@pytest.mark.trl
def test_a_subclasses_logs_are_written(tmp_path):
    ours, _ = both(tmp_path, subclasses.extra_log)
    assert all("best" in line for line in ours.state.log_history)
    assert is_same(ours, plain())


@pytest.mark.trl
@pytest.mark.parametrize(
    "settings", [{"steps_per_generation": 2, "gradient_accumulation_steps": 2}, {"num_iterations": 2}], ids=str
)
def test_keys_of_a_subclass_reach_the_loss_beside_their_rows(tmp_path, settings):
    ours, theirs = both(tmp_path, subclasses.keys_of_its_own, **settings)
    assert ours.seen == theirs.seen
    assert ours.seen[0] != sorted(ours.seen[0]), "rows are shuffled"


@pytest.mark.trl
def test_a_replay_buffer(tmp_path):
    """Whole groups of rows swapped for older ones, of other widths."""

    def long(completions, **kwargs):
        return [float(len(text) > 8) for text in completions]

    ours, _ = both(tmp_path, subclasses.replay_buffer, rewards=[long], max_steps=5, beta=0.05)
    assert ours.num_replayed > 1


@pytest.mark.trl
def test_evaluation_of_a_subclass(tmp_path):
    ours, theirs = both(
        tmp_path,
        subclasses.evaluating,
        eval_dataset=Dataset.from_list(rows()[:4]),
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=2,
    )
    # after two steps, and at the end
    assert ours.rewards == [pytest.approx(rewards) for rewards in theirs.rewards]
    assert [len(rewards) for rewards in ours.rewards] == [1, 2]


@pytest.mark.trl
def test_the_tool_loop_of_a_subclass(tmp_path):
    tokenizer = make_chat_tokenizer(HERMES.template, HERMES.eos)
    # TRL writes one for templates that it knows by heart
    make_toolbox(tokenizer, [weather], None)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    prompts = [[{"role": "user", "content": f"row {i}"}] for i in range(9)]

    def last_letter(completions, **kwargs):
        return [ord(messages[-1]["content"][-1:] or "a") / 64 for messages in completions]

    ours, theirs = both(
        tmp_path,
        subclasses.scripted_tools,
        model=functools.partial(make_model, seed=SEED, vocab_size=len(tokenizer), max_position_embeddings=512),
        processing_class=tokenizer,
        dataset=Dataset.from_dict({"prompt": prompts}),
        rewards=[last_letter],
        tools=[weather],
        script=encode(tokenizer, call),
        max_completion_length=256,
        max_steps=2,
    )
    assert ours.loops == theirs.loops
    # a message with a call, the reply, a message; one message without
    assert ours.loops[0] == (4, 0, [3, 1] * 4)
    assert ours.state.log_history[0]["tools/call_frequency"] == 0.5


@pytest.mark.trl
def test_trls_own_subclass_runs_on_our_trainer(tmp_path):
    """TRL's GMPO replaces the whole loss: its code, on both trainers."""
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    def make_class(base):
        return type("Geometric", (base,), {"_compute_loss": GMPOTrainer._compute_loss})

    settings = {"num_iterations": 2, "epsilon": 0.002, "epsilon_high": 0.003, "beta": 0.05}
    ours, _ = both(tmp_path, make_class, **settings)
    by_formula = trained(
        grpo_fast, tmp_path, subclasses.geometric_mean, model=save(tmp_path / "m", seed=SEED), **settings
    )
    torch.testing.assert_close(weights_of(ours), weights_of(by_formula), rtol=RTOL_OURS, atol=ATOL_OURS)
    assert not is_same(ours, plain(**{**settings, "beta": 0.0}))


# -- patches of an instance --------------------------------------------------------------------------------------------


def doubled(trainer):
    """As frameworks patch a trainer: closures over the methods it had."""
    compute_loss, log, prepare_inputs = trainer.compute_loss, trainer.log, trainer._prepare_inputs

    def double_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        trainer._metrics["train"]["patched"].append(trainer._metrics["train"]["reward"][-1])
        return 2 * loss

    def log_more(logs, start_time=None):
        return log({**logs, "kind": 1.0}, start_time)

    def halved(generation_batch):
        inputs = dict(prepare_inputs(generation_batch))
        inputs["advantages"] = torch.where(inputs["advantages"] > 0, inputs["advantages"] / 4, inputs["advantages"])
        return inputs

    trainer.compute_loss, trainer.log, trainer._prepare_inputs = double_loss, log_more, halved


@pytest.mark.trl
def test_a_patched_instance(tmp_path):
    ours, _ = both(tmp_path, patch=doubled)
    assert not is_same(ours, plain())
    assert all(line["kind"] == 1.0 for line in ours.state.log_history)


EVERY_SEAM = (
    "_calculate_rewards", "_compute_loss", "_generate", "_generate_and_score_completions", "_generate_single_turn",
    "_get_per_token_logps_and_entropies", "_get_train_sampler", "_prepare_inputs", "_tokenize_prompts", "compute_loss",
    "create_model_card", "evaluate", "get_eval_dataloader", "get_train_dataloader", "log", "prediction_step",
    "training_step", "_get_eval_sampler", "_save_checkpoint", "_set_signature_columns_if_needed",
)  # fmt: skip


@pytest.mark.parametrize("how", ["instance", "subclass", "class"])
def test_every_seam_is_called_and_may_be_passed_through(tmp_path, monkeypatch, how):
    """Each method in turn of a subclass, of one object, or of the class itself is what runs, and changes nothing."""
    calls = dict.fromkeys(EVERY_SEAM, 0)

    def counted(name, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    def make_class(base):
        return type("Counting", (base,), {name: counted(name, getattr(base, name)) for name in EVERY_SEAM})

    def patch(trainer):
        for name in EVERY_SEAM:
            setattr(trainer, name, counted(name, getattr(trainer, name)))

    if how == "class":
        for name in EVERY_SEAM:
            monkeypatch.setattr(grpo_fast.GRPOTrainer, name, counted(name, getattr(grpo_fast.GRPOTrainer, name)))
    evaluation = {"eval_dataset": Dataset.from_list(rows()[:2]), "eval_strategy": "steps", "eval_steps": 3}
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 2, "num_iterations": 2}
    trainer = trained(
        grpo_fast,
        tmp_path,
        make_class if how == "subclass" else None,
        patch=patch if how == "instance" else None,
        save_strategy="steps",
        save_steps=3,
        remove_unused_columns=False,
        **evaluation,
        **settings,
    )
    missed = [name for name, count in calls.items() if not count and name != "_set_signature_columns_if_needed"]
    assert not missed
    torch.testing.assert_close(weights_of(trainer), weights_of(plain(**settings)), rtol=RTOL_OURS, atol=ATOL_OURS)


@pytest.mark.parametrize("name", ["_compute_loss", "compute_loss"])
@pytest.mark.parametrize("how", ["subclass", "instance", "class"])
def test_a_scaled_loss_scales_every_pack(tmp_path, monkeypatch, name, how):
    """Whatever replaces a loss, its result is what goes backward, wrapped as libraries wrap or not."""

    def tripled(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            return 3 * method(*args, **kwargs)

        return call

    def make_class(base):
        return type("Tripled", (base,), {name: tripled(getattr(base, name))})

    def patch(trainer):
        setattr(trainer, name, tripled(getattr(trainer, name)))

    expected = trained(grpo_fast, tmp_path, learning_rate=3e-3, max_steps=1)
    if how == "class":
        monkeypatch.setattr(grpo_fast.GRPOTrainer, name, tripled(getattr(grpo_fast.GRPOTrainer, name)))
    trainer = trained(
        grpo_fast,
        tmp_path,
        make_class if how == "subclass" else None,
        patch=patch if how == "instance" else None,
        learning_rate=1e-3,
        max_steps=1,
    )
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), rtol=RTOL_OURS, atol=ATOL_OURS)


def test_a_training_step_of_ones_own_gets_the_whole_loss(tmp_path):
    """It calls backward itself, so nothing may have gone backward before."""

    class Stepping(grpo_fast.GRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = 3 * self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            self._step += 1
            return loss.detach()

    expected = trained(grpo_fast, tmp_path, learning_rate=3e-3, max_steps=1)
    trainer = trained(grpo_fast, tmp_path, lambda base: Stepping, learning_rate=1e-3, max_steps=1)
    torch.testing.assert_close(weights_of(trainer), weights_of(expected), rtol=RTOL_OURS, atol=ATOL_OURS)


def test_a_loss_asked_for_outside_of_training_leaves_no_gradients(tmp_path):
    trainer = trained(grpo_fast, tmp_path, max_steps=1)
    trainer.model.zero_grad()
    inputs = trainer._buffered_inputs[0]
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    assert all(p.grad is None for p in trainer.model.parameters())
    loss.backward()
    assert any(p.grad.abs().max() > 0 for p in trainer.model.parameters())


def test_scores_of_two_values(tmp_path):
    """Overrides written before TRL 1.7 return no auxiliary loss."""

    class Two(grpo_fast.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)[:2]

    settings = {"steps_per_generation": 2, "beta": 0.1}
    two = trained(grpo_fast, tmp_path, lambda base: Two, **settings)
    expected = trained(grpo_fast, tmp_path, **settings)
    torch.testing.assert_close(weights_of(two), weights_of(expected), rtol=RTOL_OURS, atol=ATOL_OURS)


def test_an_overridden_loss_is_announced_once(tmp_path, caplog):
    class Announced(grpo_fast.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    with caplog.at_level(logging.WARNING):
        trained(grpo_fast, tmp_path, lambda base: Announced, gradient_accumulation_steps=2)
    assert [m for m in caplog.messages if "Announced overrides" in m] == [
        "Announced overrides the loss or the scorer: a micro-batch's packs share one graph, whose activations live "
        "together"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trained(grpo_fast, tmp_path)
    assert not [m for m in caplog.messages if "overrides" in m]


# -- with vLLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_overrides_see_the_samplers_correction(tmp_path):
    """Where nobody looks, the loss pass gives the old log-probs; an override finds them in the dict, as in TRL."""
    seen = []

    class Looking(grpo_fast.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            seen.append({name: batch[name].shape for name in sorted(batch)})
            difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
            # fp32 in both: what is left is the order of sums
            assert difference.abs().max() < 1e-4
            return batch

    settings = {
        # vLLM's CPU attention takes heads of 32 and wider
        "model": functools.partial(make_model, seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1),
        "use_vllm": True,
        "max_completion_length": 6,
        "max_steps": 2,
    }
    trainer = trained(grpo_fast, tmp_path, lambda base: Looking, **settings)
    assert trainer.vllm_generation.llm is trainer.engine.llm
    trainer.engine.close()
    assert len(seen) == 2
    for shapes in seen:
        assert shapes["old_per_token_logps"] == shapes["sampling_per_token_logps"] == shapes["completion_ids"]
        assert shapes["importance_sampling_ratio"] == (8, 1)
    line = trainer.state.log_history[0]
    assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
