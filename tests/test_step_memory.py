"""Smaller steps change no number: weights after two of them are bitwise those of plain ones."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig

import grpo_fast
from grpo_fast import heap
from grpo_fast.mixed_linear import _MixedLinear
from grpo_fast.tied_embedding import _Lookup
from tests.tiny_lm import make_model
from tests.trainer_runs import SEED, trained, weights_of

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def runs(monkeypatch):
    """How often each part ran; the heap's too, which leaves models of this size alone."""
    counts = {"linear": 0, "lookup": 0, "trim": 0}

    def count(name, original):
        def counted(*args):
            counts[name] += 1
            return original(*args)

        return counted

    monkeypatch.setattr(_MixedLinear, "forward", staticmethod(count("linear", _MixedLinear.forward)))
    monkeypatch.setattr(_Lookup, "forward", staticmethod(count("lookup", _Lookup.forward)))
    monkeypatch.setattr(heap, "trim_heap", count("trim", heap.trim_heap))
    monkeypatch.setattr(heap, "MIN_BYTES", 1)
    monkeypatch.setattr(heap, "MIN_TENSOR_BYTES", 1)
    return counts


def run(folder, *, plain, model, peft_config=None, **settings):
    def patch(trainer):
        if plain:
            trainer._small_steps = nullcontext

    def with_adapter(base):
        class Adapted(base):
            def __init__(self, **kwargs):
                super().__init__(**kwargs, peft_config=peft_config)

        return Adapted

    settings = {"bf16": True, "max_steps": 2, "gradient_checkpointing": False, "optim": "adamw_torch"} | settings
    make_class = with_adapter if peft_config is not None else None
    return trained(grpo_fast, folder, make_class, patch=patch, model=lambda: make_model(seed=SEED, **model), **settings)


@pytest.mark.parametrize(
    ("settings", "num_lookups"),
    [
        ({"model": {"tie_word_embeddings": True}}, 1),
        ({"model": {"tie_word_embeddings": False}, "share_prompts": True}, 0),
        ({"model": {"tie_word_embeddings": True}, "bf16": False}, 1),
        ({"model": {"tie_word_embeddings": True, "attention_bias": True}, "gradient_checkpointing": True}, 1),
        (
            {
                "model": {"tie_word_embeddings": True},
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            1,
        ),
        ({"model": {"tie_word_embeddings": True}, "peft_config": LORA}, 0),
        ({"model": {"tie_word_embeddings": True}, "beta": 0.1, "num_iterations": 2, "loss_type": "bnpo"}, 1),
    ],
    ids=["tied", "untied shared", "fp32", "checkpointed", "reentrant", "lora", "reference"],
)
def test_weights_are_the_same_bits(settings, num_lookups, tmp_path, runs):
    expected = run(tmp_path, plain=True, **settings)
    assert not any(runs.values())
    found = run(tmp_path, plain=False, **settings)
    assert torch.equal(weights_of(found), weights_of(expected))
    assert (runs["linear"] > 0) == settings.get("bf16", True)
    assert (runs["lookup"] > 0) == bool(num_lookups)
    assert runs["trim"] > 0
    # the model is as it was
    for module in found.model.modules():
        assert not module._forward_pre_hooks
        if type(module) in (torch.nn.Linear, torch.nn.Embedding) and module is not found.model.get_output_embeddings():
            assert "forward" not in vars(module)
    assert all(not parameter._post_accumulate_grad_hooks for parameter in found.model.parameters())
