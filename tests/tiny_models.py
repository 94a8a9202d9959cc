"""Models small enough to check against float64, one builder a family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # large enough for attention and logits to be far from uniform
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# shorter than the test rows, on one layer of two
WINDOW = 5


def llama(*, tied: bool = False) -> PreTrainedModel:
    return build(LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=tied))


def qwen2(*, tied: bool = False) -> PreTrainedModel:
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    config = Qwen2Config(
        **sizes,
        tie_word_embeddings=tied,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    )
    return build(Qwen2ForCausalLM, config)


def qwen3(*, tied: bool = False) -> PreTrainedModel:
    return build(Qwen3ForCausalLM, Qwen3Config(**SIZES, tie_word_embeddings=tied))


def gemma2(*, tied: bool = False) -> PreTrainedModel:
    config = Gemma2Config(
        **SIZES,
        tie_word_embeddings=tied,
        query_pre_attn_scalar=8,
        # low enough to bend the scores and logits of these models
        attn_logit_softcapping=4.0,
        final_logit_softcapping=3.0,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    # torch's own attention would leave out the cap on scores
    config._attn_implementation = "eager"
    return build(Gemma2ForCausalLM, config)


def qwen3_moe(*, tied: bool = False) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **SIZES, tie_word_embeddings=tied, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    return build(Qwen3MoeForCausalLM, config)


def falcon() -> PreTrainedModel:
    """A model whose attention cannot be replaced."""
    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return build(FalconForCausalLM, config)


FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "gemma2": gemma2}


def build(kind: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config)
    # norms and biases start at constants: random ones make their gradients tell
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()
