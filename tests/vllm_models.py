"""A tiny model of each family that shares its weights with vLLM, of sizes that vLLM's CPU kernels take."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# not a multiple of 64, so that vLLM pads its embedding and head
VOCABULARY = 97
EOS, PAD = 2, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    # heads of 32, the smallest that vLLM's CPU attention takes
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
HEADS = {"head_dim": 32}
GEMMA = HEADS | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}

BUILDERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, HEADS),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA | WINDOW),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA | WINDOW),
    # fused linears in transformers, too
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, HEADS | EXPERTS),
}


def build(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose weights are large enough for a policy that is not uniform."""
    kind, config, own = BUILDERS[family]
    torch.manual_seed(seed)
    model = kind(config(**SIZES | own | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            # norms and biases start at constants
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if model.config.tie_word_embeddings:
            # otherwise a token predicts itself
            model.get_input_embeddings().weight.mul_(0.1)
    return model
