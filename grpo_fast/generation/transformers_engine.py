"""Generation with the trainer's own model: no second copy of the weights, no second library."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from grpo_fast.batch import Completions, Sampling
from grpo_fast.generation.base import check_options, check_prompts, context_length
from grpo_fast.generation.unwrap import generation_config_of
from grpo_fast.modes import evaluating

# what the run decides: left unset, it is transformers' default and not the model's own
RUN_SETTINGS = (
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "cache_implementation",
)


class Batching(Protocol):
    """A way to run prompts of different lengths through the model together."""

    name: str

    def __call__(
        self, model: Any, prompt_ids: list[list[int]], config: GenerationConfig, fields: dict[str, Any]
    ) -> list[list[int]]:
        """The completions, in the order of the prompts; what follows an end token may be anything."""
        ...


class PaddedBatch:
    """One `model.generate` for all prompts, padded on the left."""

    name = "transformers"

    def __init__(self, *, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        """A batch whose width is a multiple of `pad_to_multiple_of`."""
        self._pad_token_id = pad_token_id
        self._multiple = pad_to_multiple_of or 1

    def __call__(
        self, model: Any, prompt_ids: list[list[int]], config: GenerationConfig, fields: dict[str, Any]
    ) -> list[list[int]]:
        """See `Batching`."""
        width = -(-max(len(row) for row in prompt_ids) // self._multiple) * self._multiple
        inputs = {
            "input_ids": _left_padded(prompt_ids, width, fill=self._pad_token_id),
            "attention_mask": _left_padded([[1] * len(row) for row in prompt_ids], width, fill=0),
        } | {name: _field(value, width) for name, value in fields.items()}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        output = model.generate(**inputs, generation_config=config)
        completions: list[list[int]] = output[:, width:].tolist()
        return completions


class TransformersEngine:
    """Draws completions with transformers, from the trainer's weights."""

    def __init__(
        self,
        *,
        model: nn.Module,
        pad_token_id: int,
        eos_token_ids: list[int],
        bos_token_id: int | None = None,
        cache_implementation: str | None = None,
        suppress_tokens: list[int] | None = None,
        sampling: Sampling | None = None,
        batching: Batching | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        unwrap: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """An engine that runs the trainer's own model.

        Args:
            model: The unwrapped transformers (or PEFT) model.
            pad_token_id: Fills the prompts' left and the completions' right.
            eos_token_ids: Any of these ends a completion and is kept as its last token.
            bos_token_id: Goes into the generation config.
            cache_implementation: Goes into the generation config.
            suppress_tokens: Are never drawn.
            sampling: The run's own settings, from which the attribute `generation_config` is made.
            batching: How prompts run together; None pads them into one batch.
            context: Entered around the generation: the run's mixed precision, the model's own attention.
            unwrap: Entered around that, gives the model to call, in evaluation mode; None means `model` itself.
        """
        self._model: Any = model
        self._pad_token_id = pad_token_id
        self._bos_token_id = bos_token_id
        self._eos_token_ids = eos_token_ids
        self._cache_implementation = cache_implementation
        self._suppress_tokens = suppress_tokens
        self._batching = batching or PaddedBatch(pad_token_id=pad_token_id)
        self.name = self._batching.name
        self._context = context
        self._unwrap = unwrap or self._in_place
        self._seed = None if sampling is None else sampling.seed
        # what `generate` draws with unless told otherwise; it may be changed, or replaced, at any time
        self.generation_config = None if sampling is None else self._config_of(sampling)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling | None = None,
        *,
        images: list[list[Any] | None] | None = None,
        multimodal_fields: dict[str, Any] | None = None,
    ) -> Completions:
        """See `Engine.generate`: `sampling=None` draws with `generation_config`.

        The log-probs are None: transformers does not keep them.
        """
        context = context_length(self._model.config)
        check_prompts(prompt_ids, context=context)
        if not prompt_ids:
            return Completions(ids=[], logps=None)
        config = copy.deepcopy(self.generation_config) if sampling is None else self._config_of(sampling)
        if config is None:
            raise ValueError("sampling must be given: the engine was made without settings of its own")
        if context is not None and config.max_new_tokens is not None:
            config.max_new_tokens = min(config.max_new_tokens, context - max(len(row) for row in prompt_ids))
        seed = self._seed if sampling is None else sampling.seed
        with ExitStack() as stack:
            model = stack.enter_context(self._unwrap())
            stack.enter_context(generation_config_of(model, _without_run_settings(model.generation_config)))
            stack.enter_context(self._context())
            if seed is not None:
                stack.enter_context(_seeded(seed, model.device))
            completions = self._batching(model, prompt_ids, config, multimodal_fields or {})
        return Completions(ids=[cut_after(row, self._eos_token_ids) for row in completions], logps=None)

    def update_weights(self, model: nn.Module) -> None:
        """Take `model` for the next call; its weights are read in place, so an optimizer step needs nothing more."""
        self._model = model

    def set_temperature(self, temperature: float) -> None:
        """See `Engine.set_temperature`."""
        assert self.generation_config is not None
        self.generation_config.do_sample = temperature > 0
        self.generation_config.temperature = temperature or None

    def awake(self) -> AbstractContextManager[None]:
        """See `Engine.awake`; each call of `generate` allocates its own cache."""
        return nullcontext()

    def close(self) -> None:
        """Nothing is held besides the trainer's model."""

    @contextmanager
    def _in_place(self) -> Iterator[Any]:
        with evaluating(self._model):
            yield self._model

    def _config_of(self, sampling: Sampling) -> GenerationConfig:
        """The generation config of `sampling`, with `sampling.extra` on top."""
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
            "suppress_tokens": self._suppress_tokens,
            "use_cache": True,
            "disable_compile": True,
            "pad_token_id": self._pad_token_id,
            "bos_token_id": self._bos_token_id,
            "eos_token_id": self._eos_token_ids,
        }
        extra = sampling.extra or {}
        check_options(extra, known=set(vars(GenerationConfig())) | set(vars(self._model.generation_config)))
        return GenerationConfig(**settings | extra)


def cut_after(ids: list[int], ends: list[int]) -> list[int]:
    """`ids` up to and including the first of `ends`."""
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _left_padded(rows: list[list[int]], width: int, *, fill: int) -> Tensor:
    """[rows, width] int64."""
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])


def _field(value: Any, width: int) -> Tensor:
    """What the image processor returned, as a tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list) and value and isinstance(value[0], list):
        # one entry a token
        return _left_padded(value, width, fill=0)
    return torch.tensor(np.array(value))


def _without_run_settings(config: GenerationConfig) -> GenerationConfig:
    """The model's own generation config, from which `generate` fills what a run leaves unset."""
    config = copy.deepcopy(config)
    for name in RUN_SETTINGS:
        setattr(config, name, None)
    return config


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
