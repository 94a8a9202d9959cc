"""Shapes by name: the heads and attention layers of well-known models, and numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Head:
    """A language-model head: `hidden` wide, `vocab` columns; `softcap` is c in `c * tanh(logit / c)`, or None."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None


@dataclass(frozen=True)
class AttentionHeads:
    """A model's attention layer: query heads, key-value heads, and the width of each."""

    name: str
    num_heads: int
    num_kv_heads: int
    width: int


HEADS = {
    head.name: head
    for head in (
        Head("SmolLM2-135M", 576, 49152),
        Head("Qwen2.5-0.5B", 896, 151936),
        Head("Qwen2.5-1.5B", 1536, 151936),
        Head("Qwen3-1.7B", 2048, 151936),
        Head("Qwen3-8B", 4096, 151936),
        Head("Llama-3.1-8B", 4096, 128256),
        Head("Gemma-3-1B", 1152, 262144),
    )
}
ATTENTION = {
    heads.name: heads
    for heads in (
        AttentionHeads("SmolLM2-135M", 9, 3, 64),
        AttentionHeads("Qwen2.5-0.5B", 14, 2, 64),
        AttentionHeads("Qwen2.5-1.5B", 12, 2, 128),
        AttentionHeads("Qwen3-1.7B", 16, 8, 128),
        AttentionHeads("Qwen3-8B", 32, 8, 128),
        AttentionHeads("Llama-3.1-8B", 32, 8, 128),
        AttentionHeads("Gemma-3-1B", 4, 1, 256),
    )
}
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536)


def parse_shape(name: str) -> tuple[Head, int]:
    """The head and the number of tokens of a name like "Qwen3-8B/8192".

    Raises:
        ValueError: If the model is unknown or the number is not positive.
    """
    model, _, tokens = name.partition("/")
    if model not in HEADS or not tokens.isdecimal() or int(tokens) < 1:
        raise ValueError(f"shape must be MODEL/TOKENS with MODEL one of {', '.join(HEADS)}, got {name!r}")
    return HEADS[model], int(tokens)
