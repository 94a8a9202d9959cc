"""Generation with transformers' own `generate`: no second copy of the weights, no second library."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.batch import Completions, Sampling
from grpo_fast.generation.base import check_options, check_prompts, context_length
from grpo_fast.modes import evaluating


class TransformersEngine:
    """One `model.generate` for the whole batch, left-padded."""

    name = "transformers"

    def __init__(
        self,
        *,
        model: nn.Module,
        pad_token_id: int,
        eos_token_ids: list[int],
        bos_token_id: int | None = None,
        cache_implementation: str | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """An engine that runs the trainer's own model.

        Args:
            model: The unwrapped transformers (or PEFT) model.
            pad_token_id: Fills the prompts' left and the completions' right.
            eos_token_ids: Any of these ends a completion and is kept as its last token.
            bos_token_id: Goes into the generation config.
            cache_implementation: Goes into the generation config.
            context: Entered around `generate`: the run's mixed precision, the model's own attention.
        """
        self._model: Any = model
        self._pad_token_id = pad_token_id
        self._bos_token_id = bos_token_id
        self._eos_token_ids = eos_token_ids
        self._cache_implementation = cache_implementation
        self._context = context

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> Completions:
        """See `Engine.generate`. The log-probs are None: transformers does not keep them."""
        context = context_length(self._model.config)
        check_prompts(prompt_ids, context=context)
        if not prompt_ids:
            return Completions(ids=[], logps=None)
        input_ids, attention_mask = _left_padded(prompt_ids, self._pad_token_id, self._model.device)
        config = self._generation_config(sampling)
        if context is not None:
            config.max_new_tokens = min(config.max_new_tokens, context - input_ids.size(1))
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.enter_context(_generation_config_of(self._model, config))
            stack.enter_context(self._context())
            if sampling.seed is not None:
                stack.enter_context(_seeded(sampling.seed, self._model.device))
            output = self._model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
        completions = output[:, input_ids.size(1) :].tolist()
        return Completions(ids=[cut_after(row, self._eos_token_ids) for row in completions], logps=None)

    def update_weights(self, model: nn.Module) -> None:
        """Take `model` for the next call; its weights are read in place, so an optimizer step needs nothing more."""
        self._model = model

    def close(self) -> None:
        """Nothing is held besides the trainer's model."""

    def _generation_config(self, sampling: Sampling) -> Any:
        """The model's own generation config under the run's settings, with `sampling.extra` on top."""
        greedy = sampling.temperature == 0
        settings = {
            "max_new_tokens": sampling.max_tokens,
            "do_sample": not greedy,
            "temperature": None if greedy else sampling.temperature,
            "top_p": None if greedy else sampling.top_p,
            "top_k": None if greedy else sampling.top_k,
            "min_p": None if greedy else sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "cache_implementation": self._cache_implementation,
            "use_cache": True,
            "disable_compile": True,
            "pad_token_id": self._pad_token_id,
            "bos_token_id": self._bos_token_id,
            "eos_token_id": self._eos_token_ids,
        }
        config = copy.deepcopy(self._model.generation_config)
        extra = sampling.extra or {}
        check_options(extra, known=set(vars(config)) | {"max_new_tokens"})
        config.update(**settings | extra)
        return config


def cut_after(ids: list[int], ends: list[int]) -> list[int]:
    """`ids` up to and including the first of `ends`."""
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _left_padded(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [rows, longest row] int64."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@contextmanager
def _generation_config_of(model: Any, config: Any) -> Iterator[None]:
    """Stop `generate` from filling what `config` leaves unset with the model's defaults."""
    # PEFT hands its own attribute down to the model it wraps
    owners = [model, model.get_base_model()] if hasattr(model, "peft_config") else [model]
    before = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.generation_config = own


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
