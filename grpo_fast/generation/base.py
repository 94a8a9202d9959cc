"""What every engine offers, and the check of the prompts that all engines share."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from grpo_fast.batch import Completions, Sampling


class Engine(Protocol):
    """Draws completions from the policy that is being trained."""

    name: str

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> Completions:
        """One completion per entry of `prompt_ids`; a prompt that is wanted G times is listed G times in a row.

        Raises:
            ValueError: a prompt is empty or does not fit the context with `sampling.max_tokens` after it, or
                `sampling.extra` holds an option that the engine does not have.
        """
        ...

    def update_weights(self, model: nn.Module) -> None:
        """Generate from the weights `model` has now; to be called after every optimizer step."""
        ...

    def close(self) -> None:
        """Free what the engine holds; a second call does nothing."""
        ...


def context_length(config: Any) -> int | None:
    """The most positions a model with this transformers config takes, or None if its config states no bound."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_prompts(prompt_ids: list[list[int]], *, max_tokens: int, context: int | None) -> None:
    """Refuse prompts that cannot be completed with `max_tokens` tokens within `context` positions.

    Raises:
        ValueError: naming the first such row and its length.
    """
    for row, prompt in enumerate(prompt_ids):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens: there is nothing to complete")
        if context is not None and len(prompt) + max_tokens > context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, but the context of {context} tokens leaves room for "
                f"{max(context - max_tokens, 0)} before max_completion_length={max_tokens}: shorten the prompt or "
                "max_completion_length"
            )


def check_options(extra: dict[str, Any], known: set[str]) -> None:
    """Refuse entries of `generation_kwargs` that the engine does not have.

    Raises:
        ValueError: naming the unknown entries.
    """
    unknown = sorted(set(extra) - known)
    if unknown:
        raise ValueError(f"generation_kwargs has entries this engine does not know: {', '.join(unknown)}")
