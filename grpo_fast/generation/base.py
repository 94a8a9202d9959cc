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
            ValueError: a prompt is empty or fills the context, or
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


def check_prompts(prompt_ids: list[list[int]], *, context: int | None) -> None:
    """Refuse prompts that leave no room for a token within `context` positions; completions end where it is full.

    Raises:
        ValueError: naming the first such row and its length.
    """
    for row, prompt in enumerate(prompt_ids):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens: there is nothing to complete")
        if context is not None and len(prompt) >= context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, the engine's context holds {context} with the completion"
            )


def check_options(extra: dict[str, Any], known: set[str]) -> None:
    """Refuse entries of `generation_kwargs` that the engine does not have.

    Raises:
        ValueError: naming the unknown entries.
    """
    unknown = sorted(set(extra) - known)
    if unknown:
        raise ValueError(f"generation_kwargs has entries this engine does not know: {', '.join(unknown)}")
