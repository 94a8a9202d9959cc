"""Whole models by name: their shapes as published, random weights, nothing downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.profile_rows import EOS, PAD

if TYPE_CHECKING:
    import torch

TOKENS: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
SMOLLM2: dict[str, Any] = TOKENS | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
QWEN3: dict[str, Any] = TOKENS | {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
# class of the configuration in transformers, and its fields
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "LlamaConfig",
        SMOLLM2
        | {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    "SmolLM2-135M": ("LlamaConfig", SMOLLM2),
    "Gemma-3-1B": (
        "Gemma3TextConfig",
        TOKENS
        | {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "max_position_embeddings": 32768,
        },
    ),
    "Qwen3-0.6B": ("Qwen3Config", QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072}),
    "Qwen3-1.7B": ("Qwen3Config", QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144}),
    "Qwen3-8B": (
        "Qwen3Config",
        QWEN3
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
}


def num_layers(name: str) -> int:
    """Layers of the whole model."""
    return int(CONFIGS[name][1]["num_hidden_layers"])


def make_config(name: str, *, layers: int | None = None) -> Any:
    """The configuration of a model.

    Args:
        name: A key of `CONFIGS`.
        layers: How many of its layers, with the same part of its vocabulary, so that layers and head keep their
            shares of the work; None takes all.

    Raises:
        ValueError: If there is no such model, or it has fewer layers.
    """
    import transformers

    if name not in CONFIGS:
        raise ValueError(f"model must be one of {', '.join(CONFIGS)}, got {name!r}")
    kind, fields = CONFIGS[name]
    whole = num_layers(name)
    layers = whole if layers is None else layers
    if not 1 <= layers <= whole:
        raise ValueError(f"layers must be 1 to {whole} for {name}, got {layers}")
    part = {"num_hidden_layers": layers, "vocab_size": fields["vocab_size"] * layers // whole}
    return getattr(transformers, kind)(**fields | part)


def make_model(
    name: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """A causal language model of `make_config` with random weights, drawn on `device` in `dtype` (default: fp32)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(make_config(name, layers=layers), dtype=dtype or torch.float32)
