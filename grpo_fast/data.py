"""Prompts: what a data set must look like, the order rows are drawn in, and prompts as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]


def is_conversational(prompt: object) -> bool:
    """Whether a prompt is a list of messages rather than plain text."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


def check_dataset(dataset: object, name: str) -> None:
    """Refuse a data set that cannot give prompts.

    Args:
        dataset: What the user passed.
        name: The argument it was passed as, for the message.

    Raises:
        ValueError: If it is missing or empty, has no `prompt` column, or its first prompt is neither text nor messages.
        TypeError: If it is not a `datasets.Dataset` or `IterableDataset`.
    """
    if dataset is None:
        raise ValueError(f"{name} is needed: a datasets.Dataset with a `prompt` column")
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name} is an IterableDataset, which is not supported; pass a map-style datasets.Dataset")
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset, it is {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} needs a `prompt` column, its columns are {dataset.column_names}")
    for column in ("image", "images"):
        if column in dataset.column_names:
            raise ValueError(f"{name} has an `{column}` column: prompts with images are not supported")
    prompt = dataset[0]["prompt"]
    if not isinstance(prompt, str) and not is_conversational(prompt):
        raise ValueError(f"`prompt` of {name} must be text or a list of messages, the first is {prompt!r:.200}")


def check_chat_template(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse conversational prompts for a tokenizer that cannot render them (ValueError)."""
    if is_conversational(dataset[0]["prompt"]) and tokenizer.chat_template is None:
        raise ValueError(
            f"{name} has conversational prompts but the tokenizer has no chat template: "
            "set processing_class.chat_template, or pass prompts as text"
        )


def check_prompt_lengths(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    context_length: int | None,
    chat_template_kwargs: dict[str, Any],
) -> None:
    """Refuse a data set whose longest prompt, by characters, leaves no room in the model's context (ValueError)."""
    if context_length is None:
        return
    lengths = [len(prompt) if isinstance(prompt, str) else _num_characters(prompt) for prompt in dataset["prompt"]]
    row = max(range(len(lengths)), key=lengths.__getitem__)
    # a token is at least one byte, so a short text needs no tokenizing
    if 4 * lengths[row] < context_length // 2:
        return
    num_tokens = len(tokenize_prompts([dataset[row]["prompt"]], tokenizer, chat_template_kwargs)[0])
    if num_tokens >= context_length:
        raise ValueError(
            f"{name}: the prompt of row {row} has {num_tokens} tokens, the model's context holds {context_length}"
        )


def _num_characters(messages: list[dict[str, Any]]) -> int:
    return sum(len(str(message.get("content"))) for message in messages)


def tokenize_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]
) -> list[list[int]]:
    """Prompts as token ids, never truncated; conversations through the chat template with its generation prompt."""
    if is_conversational(prompts[0]):
        rendered = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
        )
        return rendered["input_ids"]
    return tokenizer(text=prompts)["input_ids"]


class RepeatSampler(Sampler[int]):
    """Indices in TRL's order: chunks of prompts, each index `mini_repeat_count` times, each chunk `repeat_count` times.

    Args:
        data_source: Anything with a length.
        mini_repeat_count: Times an index repeats in a row (completions a prompt).
        batch_size: Prompts a chunk; an incomplete last chunk is dropped.
        repeat_count: Times a chunk repeats.
        shuffle: Permute the indices anew at every epoch.
        seed: Seed of the permutations.
    """

    def __init__(
        self,
        data_source: Sized,
        mini_repeat_count: int,
        batch_size: int = 1,
        repeat_count: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        self.num_samples = len(data_source)
        self.mini_repeat_count = mini_repeat_count
        self.batch_size = batch_size
        self.repeat_count = repeat_count
        self.shuffle = shuffle
        self.seed = torch.initial_seed() if seed is None else seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of epoch `epoch` next, so that a resumed run goes on where it stopped."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        indices = list(range(self.num_samples))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.epoch + 1):
                indices = torch.randperm(self.num_samples, generator=generator).tolist()
        self.epoch += 1
        for start in range(0, self.num_samples - self.batch_size + 1, self.batch_size):
            for _ in range(self.repeat_count):
                for index in indices[start : start + self.batch_size]:
                    yield from [index] * self.mini_repeat_count

    def __len__(self) -> int:
        return (self.num_samples // self.batch_size) * self.batch_size * self.mini_repeat_count * self.repeat_count
