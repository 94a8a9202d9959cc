"""What every engine offers, and the checks that all engines share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from grpo_fast.batch import Completions, Sampling


class Engine(Protocol):
    """Draws completions from the policy that is being trained."""

    name: str

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling | None = None,
        *,
        images: list[list[Any] | None] | None = None,
        multimodal_fields: dict[str, Any] | None = None,
    ) -> Completions:
        """One completion per entry of `prompt_ids`; a prompt that is wanted G times is listed G times in a row.

        Args:
            prompt_ids: The prompts' tokens.
            sampling: How to draw; None means the engine's own settings, which a user may change during the run.
            images: Each prompt's PIL images, for engines that run the image processor themselves (vLLM).
            multimodal_fields: The image processor's output, for engines that run the trainer's model (transformers):
                tensors as the model takes them, and lists of per-token lists, which are padded like the prompts.

        Raises:
            ValueError: a prompt is empty or fills the context, or
                `sampling.extra` holds an option that the engine does not have.
        """
        ...

    def update_weights(self, model: nn.Module) -> None:
        """Generate from the weights `model` has now; to be called after every optimizer step."""
        ...

    def set_temperature(self, temperature: float) -> None:
        """Draw at this temperature where a call does not say otherwise; 0 is greedy."""
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Hold the memory that generating needs for the block, through several calls of `generate`."""
        ...

    def close(self) -> None:
        """Free what the engine holds; a second call does nothing."""
        ...


def context_length(config: Any) -> int | None:
    """The most positions a model with this transformers config takes, or None if its config states no bound."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


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
