"""What every engine offers, and the checks that all engines share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from grpo_fast.batch import Completions, Sampling

# takes the first row of a prompt that is listed several times in a row, and the tokens of all its completions
GroupCallback = Callable[[int, list[list[int]]], None]


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
        on_group: GroupCallback | None = None,
    ) -> Completions:
        """One completion per entry of `prompt_ids`; a prompt that is wanted G times is listed G times in a row.

        Args:
            prompt_ids: The prompts' tokens.
            sampling: How to draw; None means the engine's own settings, which a user may change during the run.
            images: Each prompt's PIL images, for engines that run the image processor themselves (vLLM).
            multimodal_fields: The image processor's output, for engines that run the trainer's model (transformers):
                tensors as the model takes them, and lists of per-token lists, which are padded like the prompts.
            on_group: Called once for each run of equal prompts, from this thread, as soon as the engine has all of its
                completions: an engine that finishes all at one time calls it at the end.

        Raises:
            ValueError: a prompt is empty or fills the context, or
                `sampling.extra` holds an option that the engine does not have.
        """
        ...

    def update_weights(self, model: nn.Module) -> None:
        """Generate from the weights `model` has now; to be called after every optimizer step."""
        ...

    def shadows(self) -> dict[nn.Parameter, Tensor]:
        """The engine's own copies of the policy's parameters, by parameter, for an optimizer to write.

        A shadow has its parameter's shape and device and another dtype. An engine that reads the parameters
        themselves, or that copies them in `update_weights` only, has none.
        """
        return {}

    def shadows_written(self) -> None:
        """Take note that an optimizer has just written all of `shadows`: the next update need not."""
        return

    def any_in_group(self, flag: bool) -> bool:
        """Whether `flag` is set on any process that must call `generate` as often as this one; all of them ask."""
        ...

    def set_temperature(self, temperature: float) -> None:
        """Draw at this temperature where a call does not say otherwise; 0 is greedy."""
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Hold the memory that generating needs for the block, through several calls of `generate`."""
        return nullcontext()

    def close(self) -> None:
        """Free what the engine holds; a second call does nothing."""
        ...


def report_groups(prompt_ids: list[list[int]], completion_ids: list[list[int]], on_group: GroupCallback | None) -> None:
    """Call `on_group` for every run of equal prompts, in their order."""
    if on_group is None:
        return
    for _, run in itertools.groupby(range(len(prompt_ids)), key=prompt_ids.__getitem__):
        rows = list(run)
        on_group(rows[0], [completion_ids[row] for row in rows])


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
