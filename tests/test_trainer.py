"""`GRPOTrainer` as its users meet it: mistakes, subclasses, checkpoints, interruption, what it writes."""

import os
import signal

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from grpo_fast import GRPOConfig, GRPOTrainer, loading
from grpo_fast.attention import packed_attention
from tests.tiny_lm import CHAT_TEMPLATE, make_model, make_tokenizer, save

# fp32: the same sums in another order
RTOL, ATOL = 1e-4, 1e-6
ROWS = [{"prompt": f"{i}+{j}=", "answer": i + j} for i in range(4) for j in range(4)]


def reward(completions, answer, **kwargs):
    return [len(set(text)) / 4 + (str(a) in text) for text, a in zip(completions, answer, strict=True)]


def build(tmp_path, *, trainer_class=GRPOTrainer, rows=ROWS, model=None, tokenizer=None, rewards=reward, **kwargs):
    arguments = {name: kwargs.pop(name) for name in ("peft_config", "eval_dataset") if name in kwargs}
    settings = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | kwargs
    return trainer_class(
        model=make_model() if model is None else model,
        reward_funcs=rewards,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer or make_tokenizer(CHAT_TEMPLATE),
        **arguments,
    )


def trained(tmp_path, **kwargs):
    """A trainer after its run; construction seeds the process, so two runs must not be interleaved."""
    trainer = build(tmp_path, **kwargs)
    trainer.train()
    return trainer


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch):
    """Fail if a mistake is found only after the weights are read."""

    def refuse(*args):
        pytest.fail("the model was loaded before the mistake was named")

    monkeypatch.setattr(loading, "load_model", refuse)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": None}, ValueError, "train_dataset is needed"),
        ({"rows": [{"question": "a"}]}, ValueError, "needs a `prompt` column"),
        ({"rows": [{"prompt": "a" * 80}]}, ValueError, "the prompt of row 0 has 80 tokens, .* context holds 64"),
        ({"rewards": None}, ValueError, "reward_funcs is needed"),
        ({"rewards": ["/nowhere/reward"]}, ValueError, r"reward_funcs\[0\]='/nowhere/reward'"),
        ({"model": "/nowhere/model"}, ValueError, "model='/nowhere/model': the folder does not exist"),
        ({"tokenizer": "gpt2"}, TypeError, "processing_class must be a tokenizer or a processor, it is a str"),
        (
            {"rows": [{"prompt": [{"role": "user", "content": "a"}]}], "tokenizer": make_tokenizer()},
            ValueError,
            "processing_class has no chat template",
        ),
        ({"eval_dataset": {"easy": Dataset.from_dict({"q": ["a"]})}}, ValueError, r"eval_dataset\['easy'\] needs a"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_a_model_is_loaded(tmp_path, change, error, message):
    arguments = {"model": save(tmp_path / "model")} | change
    with pytest.raises(error, match=message):
        build(tmp_path, **arguments)


@pytest.mark.usefixtures("no_loading")
def test_missing_vllm_is_named(tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find_spec(name, *a))
    with pytest.raises(ImportError, match=r"use_vllm=True needs vLLM.*pip install"):
        build(tmp_path, model=save(tmp_path / "model"), use_vllm=True)


def test_raising_reward_names_itself_the_step_and_the_row(tmp_path):
    def fragile(completions, **kwargs):
        return [{}[text] for text in completions]

    with pytest.raises(RuntimeError, match="'fragile' raised KeyError at step 0 on row 0"):
        build(tmp_path, rewards=fragile).train()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [16, 4096])
def test_packs_do_not_change_the_step(tmp_path, budget):
    """Prompts repeated or shared, activations kept or recomputed: the same weights after two steps."""
    trainers = [
        trained(tmp_path, max_tokens_per_pack=budget, share_prompts=share, gradient_checkpointing=checkpointing)
        for share, checkpointing in [("never", False), ("always", True)]
    ]
    torch.testing.assert_close(weights_of(trainers[0]), weights_of(trainers[1]), rtol=RTOL, atol=ATOL)


def test_overridden_loss_is_called_and_equals_the_packed_step(tmp_path):
    class Subclass(GRPOTrainer):
        calls = 0

        def _compute_loss(self, model, inputs):
            self.calls += 1
            assert inputs["completion_ids"].shape == inputs["completion_mask"].shape
            return super()._compute_loss(model, inputs)

    plain, subclassed = trained(tmp_path), trained(tmp_path, trainer_class=Subclass)
    assert subclassed.calls == 2
    torch.testing.assert_close(weights_of(plain), weights_of(subclassed), rtol=RTOL, atol=ATOL)


def test_weights_of_whole_rows_survive_the_sweep_in_blocks(tmp_path):
    """The sampler's weight of a row is a product over it: a block of the head's sweep must not end inside a row."""
    trainer = build(tmp_path, max_tokens_per_pack=4096)
    trainer.use_vllm, trainer.vllm_importance_sampling_mode = True, "sequence_truncate"
    g = torch.Generator().manual_seed(0)
    # more tokens than the 1,024 rows of a block
    lengths = torch.tensor([500, 450, 400])
    mask = (torch.arange(500) < lengths[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(4, 14, (3, 4), generator=g),
        "prompt_mask": torch.ones(3, 4, dtype=torch.int64),
        "completion_ids": torch.randint(4, 14, (3, 500), generator=g),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.eval()
    with torch.no_grad(), packed_attention(trainer.model):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], mask], 1)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 500)
    # each row's weight is about e to the mean of these: 1.3, 0.7 and, cut, 3
    inputs["sampling_per_token_logps"] = logps - torch.tensor([0.3, -0.4, 2.0])[:, None] / lengths[:, None]
    grads = []
    for way in (trainer._swept_loss, trainer._whole_loss):
        trainer.model.zero_grad()
        with trainer._scoring_attention(trainer.model):
            loss = way(trainer.model, inputs, trainer._objective)
            loss.backward()
        stats = trainer._pending_stats.pop()
        # of the sweep alone, which knows what is run
        stats.add(**{name: -stats.of(name)[0] for name in ("run", "unpadded", "unshared")})
        grads.append((loss.detach(), stats.vector(), [p.grad.clone() for p in trainer.model.parameters()]))
    swept, graphed = grads
    torch.testing.assert_close(swept[0], graphed[0], rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(swept[1], graphed[1], rtol=RTOL, atol=ATOL)
    for gradient, expected in zip(swept[2], graphed[2], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=RTOL, atol=ATOL)


def test_overridden_scoring_feeds_the_loss(tmp_path):
    """A subclass that replaces the log-probs alone is heard: the model's own, padded, give the same step."""

    class Padded(GRPOTrainer):
        calls = 0

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
            self.calls += 1
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            output = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions)
            logps = output.logits[:, -logits_to_keep - 1 : -1].log_softmax(-1)
            chosen = logps.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
            return chosen, -(logps.exp() * logps).sum(-1), None

    plain, subclassed = trained(tmp_path), trained(tmp_path, trainer_class=Padded)
    assert subclassed.calls == 2
    torch.testing.assert_close(weights_of(plain), weights_of(subclassed), rtol=RTOL, atol=1e-5)


def test_loss_patched_on_the_instance_is_called(tmp_path):
    trainer = build(tmp_path)
    before = weights_of(trainer).clone()
    trainer.compute_loss = lambda model, inputs, **kwargs: 0.0 * next(model.parameters()).sum()
    trainer.train()
    torch.testing.assert_close(weights_of(trainer), before)


def test_per_token_logps_are_the_padded_models(tmp_path):
    trainer = build(tmp_path, temperature=0.7)
    ids = torch.randint(3, 20, (2, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    with torch.no_grad(), packed_attention(trainer.model):
        logps, entropies, aux = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 4, compute_entropy=True
        )
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 4:-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, ids[:, 5:, None])[..., 0] * mask[:, 5:]
    torch.testing.assert_close(logps, expected, rtol=RTOL, atol=1e-5)
    expected = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1) * mask[:, 5:]
    torch.testing.assert_close(entropies, expected, rtol=RTOL, atol=1e-5)
    assert aux is None


def test_rows_with_holes_are_the_models_own(tmp_path):
    """A subclass may mask tokens inside a completion: the others' log-probs are what the model says of such a row."""
    trainer = build(tmp_path)
    ids = torch.randint(3, 20, (2, 8))
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 0, 1]])
    with torch.no_grad():
        with packed_attention(trainer.model):
            logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, 2:-1]
    expected = logits.log_softmax(-1).gather(-1, ids[:, 3:, None])[..., 0] * mask[:, 3:]
    torch.testing.assert_close(logps, expected, rtol=RTOL, atol=1e-5)


def test_empty_completions_train_on(tmp_path):
    class Mute(GRPOTrainer):
        def _generate(self, prompts):
            prompt_ids, completion_ids, *rest = super()._generate(prompts)
            completion_ids[0] = []
            if self.state.global_step == 1:
                completion_ids = [[] for _ in completion_ids]
            return prompt_ids, completion_ids, *rest

    trainer = build(tmp_path, trainer_class=Mute, loss_type="grpo")
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_bf16_mixed_precision_trains(tmp_path):
    trainer = build(tmp_path, bf16=True, learning_rate=1e-2, optim="adamw_torch")
    before = weights_of(trainer).clone()
    trainer.train()
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert not torch.equal(weights_of(trainer), before)


def test_adapter_is_all_that_trains(tmp_path):
    from peft import LoraConfig

    trainer = build(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), beta=0.1)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_adapter_on_the_head_is_refused(tmp_path):
    from peft import LoraConfig

    with pytest.raises(ValueError, match="peft_config covers the LM head"):
        build(tmp_path, peft_config=LoraConfig(r=4, target_modules=["lm_head"]))


def test_the_learned_policy_is_better(tmp_path):
    """Twenty-five steps raise a reward that a random policy seldom gets."""

    def likes_nines(completions, **kwargs):
        return [text.count("9") / 6 for text in completions]

    trainer = build(tmp_path, rewards=likes_nines, max_steps=25, learning_rate=2e-2, optim="adamw_torch")
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_resumed_run_equals_the_straight_one(tmp_path):
    straight = build(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, num_train_epochs=3)
    straight.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    assert os.path.isfile(os.path.join(checkpoint, "model.safetensors"))
    resumed = build(tmp_path, max_steps=6, num_train_epochs=3)
    resumed.train(resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(weights_of(resumed), weights_of(straight), rtol=RTOL, atol=ATOL)


def test_saved_model_loads_anywhere(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.config._attn_implementation != "grpo_packed"
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_leaves_a_loadable_checkpoint(tmp_path, number, error):
    def interrupting(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            os.kill(os.getpid(), number)
        return [float(len(text)) for text in completions]

    trainer = build(tmp_path, rewards=interrupting, max_steps=50)
    handler = signal.getsignal(number)
    with pytest.raises(error):
        trainer.train()
    assert signal.getsignal(number) is handler
    assert trainer.state.global_step == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")


def test_completions_table(tmp_path, capsys):
    def verbose(completions, log_extra, log_metric, **kwargs):
        log_extra("length", [len(text) for text in completions])
        log_metric("longest", float(max(len(text) for text in completions)))
        return [0.5] * len(completions)

    trainer = build(tmp_path, rewards=[reward, verbose], log_completions=True, num_completions_to_print=2)
    trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00002.parquet")
    assert list(table.columns) == ["step", "prompt", "completion", "reward", "verbose", "length", "advantage"]
    assert len(table) == 8
    assert table["length"].tolist() == [len(text) for text in table["completion"]]
    assert "longest" in trainer.state.log_history[0]
    assert "Step 2" in capsys.readouterr().out


def test_conversations_and_a_dict_of_eval_sets(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]

    def conversational(completions, answer, **kwargs):
        assert completions[0][0]["role"] == "assistant"
        return reward([messages[0]["content"] for messages in completions], answer)

    data = Dataset.from_list(rows)
    trainer = build(
        tmp_path,
        rows=rows,
        rewards=conversational,
        eval_dataset={"a": data.select(range(2)), "b": data.select(range(2))},
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    trainer.train()
    names = {name for line in trainer.state.log_history for name in line}
    assert {"eval_a_loss", "eval_b_loss"} <= names
    assert {"reward", "eval_reward", "time/generation", "time/train", "time/optimizer"} <= names
