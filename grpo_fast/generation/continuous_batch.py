"""Continuous batching with transformers: finished completions make room for waiting prompts, over a paged cache."""

from __future__ import annotations

import copy
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from grpo_fast.generation.base import base_model

# of the memory that is free beside the model; transformers' own 0.9 leaves none for the backward pass
MAX_MEMORY_PERCENT = 0.5


class ContinuousBatch:
    """`model.generate_batch` on a copy of the weights in the run's precision, which is dropped after each call.

    TRL rounds the trainer's own weights instead. A model that already has the precision is run as it is. Runs on a
    CPU, too; flash attention is used where it is installed.
    """

    name = "transformers, continuous batching"

    def __init__(
        self, *, dtype: torch.dtype | None = None, fp32_head: bool = False, options: dict[str, Any] | None = None
    ) -> None:
        """A batch without padding.

        Args:
            dtype: What the copy's floating-point parameters are rounded to; None means that of the model.
            fp32_head: Whether the LM head keeps its precision, where it is not the embedding.
            options: Arguments of transformers' `ContinuousBatchingConfig`; `max_memory_percent` is 0.5 unless set.

        Raises:
            ValueError: `options` has an entry that `ContinuousBatchingConfig` does not know.
        """
        from transformers.generation import ContinuousBatchingConfig

        known = {field.name for field in dataclass_fields(ContinuousBatchingConfig)}
        unknown = sorted(set(options or {}) - known)
        if unknown:
            raise ValueError(
                f"transformers_continuous_batching_config has entries that transformers does not know: "
                f"{', '.join(unknown)}"
            )
        self._dtype = dtype
        self._fp32_head = fp32_head
        self._options = {"max_memory_percent": MAX_MEMORY_PERCENT} | (options or {})

    def __call__(
        self, model: Any, prompt_ids: list[list[int]], config: GenerationConfig, fields: dict[str, Any]
    ) -> list[list[int]]:
        """See `Batching`.

        Raises:
            ValueError: the prompts have images, the model has prompt-learning adapters, or `config` asks for a logits
                processor that continuous batching would drop.
            RuntimeError: a completion was not finished.
        """
        from transformers.generation import ContinuousBatchingConfig

        if fields:
            raise ValueError(
                f"use_transformers_continuous_batching=True takes text only; the prompts have {', '.join(fields)}"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("use_transformers_continuous_batching=True would leave out a prompt-learning adapter")
        sampler = self._sampler(base_model(model))
        self._check_processors(sampler, config)
        options = self._options
        if sampler.device.type == "cpu" and options.get("num_blocks") is None:
            # half of a machine's memory takes half a minute to fill with zeros
            page = options.get("page_size") or ContinuousBatchingConfig.page_size
            longest = max(map(len, prompt_ids)) + (config.max_new_tokens or 0)
            options = options | {"num_blocks": len(prompt_ids) * (-(-longest // page) + 1)}
        outputs = sampler.generate_batch(
            prompt_ids,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(**options),
            progress_bar=False,
        )
        results = list(outputs.values())
        errors = [str(result.error) for result in results if result.error is not None]
        if errors or len(results) != len(prompt_ids):
            raise RuntimeError(
                f"continuous batching finished {len(results) - len(errors)} of {len(prompt_ids)} completions"
                + (f": {errors[0]}" if errors else "; transformers logged why")
            )
        return [list(result.generated_tokens) for result in results]

    def _check_processors(self, model: Any, config: GenerationConfig) -> None:
        if "drop_unsupported_processors" in self._options:
            return
        # transformers marks what it drops by False; an unmarked processor is applied
        unsupported = [
            type(processor).__name__
            for processor in model._get_logits_processor(config)
            if getattr(processor, "supports_continuous_batching", None) is False
        ]
        if unsupported:
            raise ValueError(
                f"use_transformers_continuous_batching=True cannot apply {', '.join(unsupported)}: leave "
                "repetition_penalty at 1.0 and such generation_kwargs out, or choose another engine"
            )

    def _sampler(self, model: Any) -> Any:
        """The model in the wanted precision, sharing what already has it."""
        head = model.get_output_embeddings()
        kept = set()
        if self._fp32_head and head is not None and head.weight is not model.get_input_embeddings().weight:
            kept = {id(parameter) for parameter in head.parameters()}
        # deepcopy looks a parameter's copy up here before it makes one
        memo: dict[int, Any] = {}
        is_rounded = False
        for parameter in model.parameters():
            is_cast = parameter.is_floating_point() and id(parameter) not in kept
            dtype = self._dtype if is_cast and self._dtype is not None else parameter.dtype
            is_rounded |= dtype != parameter.dtype
            shared = parameter.detach()
            memo[id(parameter)] = nn.Parameter(shared.to(dtype), requires_grad=False) if is_cast else parameter
        return copy.deepcopy(model, memo) if is_rounded else model
