"""Prompts: what a data set must look like, the order rows are drawn in, and prompts as token ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from datasets import Dataset, IterableDataset, Value
from torch.utils.data import Sampler

from grpo_fast.config import GRPOConfig

Prompt = str | list[dict[str, Any]]
Row = dict[str, Any]

# where a row of a data set may hold messages, the prompt first
MESSAGE_KEYS = ("prompt", "messages", "chosen", "rejected", "completion")
IMAGE_COLUMNS = ("image", "images")


def is_conversational(example: Row) -> bool:
    """Whether a row holds messages rather than plain text, in the first of `MESSAGE_KEYS` it has."""
    messages = next((example[key] for key in MESSAGE_KEYS if key in example), None)
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], dict) and "role" in messages[0]


# -- what a data set must look like ------------------------------------------------------------------------------------


def settle_train_dataset(
    train_dataset: Dataset | IterableDataset | None, args: GRPOConfig, environment_factory: object = None
) -> Dataset | IterableDataset:
    """The training set as given, or a stand-in of empty prompts where an environment owns the data.

    What `check_dataset` refuses is left to it.

    Args:
        train_dataset: What the user passed.
        args: The settings; `max_steps` bounds a run over a stream or over an environment's own data.
        environment_factory: None, one environment, or a dict of them that the column `environment` chooses from.

    Raises:
        ValueError: If the data set is missing where it is needed, or its column `environment`, or `max_steps`.
    """
    if train_dataset is None:
        if environment_factory is None:
            raise ValueError("train_dataset is needed, unless an environment_factory brings the prompts; it is None")
        if isinstance(environment_factory, dict):
            raise ValueError(
                "an environment_factory of several environments needs a train_dataset whose column `environment` says "
                "which one a row is for; train_dataset is None"
            )
        if args.max_steps <= 0:
            raise ValueError(
                f"without a train_dataset max_steps says how long to train; it must be above 0, it is {args.max_steps}"
            )
        assert args.generation_batch_size is not None
        empty = [{"role": "user", "content": ""}]
        return Dataset.from_dict({"prompt": [empty] * (args.generation_batch_size // args.num_generations)})
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"train_dataset is a stream, of unknown length: max_steps must be above 0, it is {args.max_steps}"
        )
    columns = getattr(train_dataset, "column_names", None)
    if isinstance(environment_factory, dict) and columns is not None and "environment" not in columns:
        raise ValueError(
            "an environment_factory of several environments needs the column `environment` in train_dataset, whose "
            f"columns are {columns}"
        )
    return train_dataset


def named_eval_datasets(eval_dataset: object) -> dict[str, Any]:
    """The evaluation sets by what to call them in a message; a dict of them counts each, None none."""
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        return {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    return {"eval_dataset": eval_dataset}


def check_dataset(dataset: object, name: str, *, has_environment: bool = False) -> None:
    """Refuse a data set that cannot give prompts.

    A stream is judged by its features, without reading from it; only one that does not know them is read, anew and up
    to its first row.

    Args:
        dataset: What the user passed.
        name: The argument it was passed as, for the message.
        has_environment: An environment may bring the prompts, so the column `prompt` may be missing.

    Raises:
        ValueError: If it is missing or empty, has no `prompt` column, or its first prompt is neither text nor messages,
            or text beside images.
        TypeError: If it is not a `datasets.Dataset` or `IterableDataset`.
    """
    if dataset is None:
        raise ValueError(f"{name} is needed: a data set with a `prompt` column")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"{name} must be a datasets.Dataset or IterableDataset, it is {type(dataset).__name__}")
    columns, row = dataset.column_names, None
    if isinstance(dataset, Dataset) or columns is None:
        row = next(iter(dataset), None)
        if row is None:
            raise ValueError(f"{name} has no rows")
        columns = list(row)
    if "prompt" not in columns:
        if has_environment:
            return
        raise ValueError(f"{name} needs a `prompt` column, its columns are {columns}")
    if row is not None:
        prompt = row["prompt"]
        is_text, is_messages = isinstance(prompt, str), is_conversational(row)
    else:
        prompt = dataset.features["prompt"]
        is_text, is_messages = _holds_text(prompt), _holds_messages(prompt)
    if not is_text and not is_messages:
        raise ValueError(f"`prompt` of {name} must be text or a list of messages, the first is {prompt!r:.200}")
    for column in IMAGE_COLUMNS:
        if column in columns and is_text:
            raise ValueError(
                f"{name} has the column `{column}`: prompts with images must be lists of messages, the first is "
                f"{prompt!r:.200}"
            )


def _holds_text(feature: object) -> bool:
    return isinstance(feature, Value) and "string" in feature.dtype


def _holds_messages(feature: object) -> bool:
    """Whether values of a feature may be lists of messages; one whose structure is open, such as raw JSON, may."""
    if isinstance(feature, Value):
        return False
    element = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return "role" in element if isinstance(element, dict) else not isinstance(element, Value)


def check_chat_template(dataset: Dataset | IterableDataset, processing_class: Any, name: str) -> None:
    """Refuse conversational prompts for a tokenizer or processor that cannot render them (ValueError)."""
    if dataset.column_names is None or processing_class.chat_template is not None:
        return
    if "prompt" in dataset.column_names and _holds_text(dataset.features["prompt"]):
        return
    raise ValueError(
        f"{name} has conversational prompts but processing_class has no chat template: set "
        "processing_class.chat_template, or pass prompts as text"
    )


def check_conversational(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse prompts of plain text where tools are called, which only messages can say (ValueError)."""
    columns = dataset.column_names
    if columns is not None and "prompt" in columns and _holds_text(dataset.features["prompt"]):
        raise ValueError(f"`prompt` of {name} must be a list of messages to go with tools or environments, it is text")


def check_prompt_lengths(
    dataset: Dataset | IterableDataset,
    processing_class: Any,
    name: str,
    context_length: int | None,
    chat_template_kwargs: dict[str, Any],
    *,
    max_prompt_length: int | None = None,
) -> None:
    """Refuse a data set whose longest prompt, by characters, leaves no room in the model's context (ValueError).

    Streams are not read for it, prompts with images not measured, and prompts that will be cut short enough pass.
    """
    if context_length is None or not isinstance(dataset, Dataset):
        return
    if max_prompt_length is not None and max_prompt_length < context_length:
        return
    columns = dataset.column_names
    if "prompt" not in columns or any(column in columns for column in IMAGE_COLUMNS):
        return
    lengths = [len(prompt) if isinstance(prompt, str) else _num_characters(prompt) for prompt in dataset["prompt"]]
    row = max(range(len(lengths)), key=lengths.__getitem__)
    # a token is at least one byte, so a short text needs no tokenizing
    if 4 * lengths[row] < context_length // 2:
        return
    num_tokens = len(tokenize_prompts([dataset[row]["prompt"]], processing_class, chat_template_kwargs)[0])
    if num_tokens >= context_length:
        raise ValueError(
            f"{name}: the prompt of row {row} has {num_tokens} tokens, the model's context holds {context_length}"
        )


def _num_characters(messages: list[dict[str, Any]]) -> int:
    return sum(len(str(message.get("content"))) for message in messages)


# -- prompts as token ids ----------------------------------------------------------------------------------------------


def tokenize_prompts(
    prompts: list[Prompt],
    processing_class: Any,
    chat_template_kwargs: dict[str, Any],
    *,
    tools: list[Any] | None = None,
    chat_template: str | None = None,
    max_prompt_length: int | None = None,
) -> list[list[int]]:
    """Prompts as token ids; conversations through the chat template with its generation prompt.

    Args:
        prompts: All text or all conversations.
        processing_class: The tokenizer, or a processor for prompts without images.
        chat_template_kwargs: More arguments of the chat template.
        tools: What the chat template tells the model it may call; for conversations.
        chat_template: Takes the place of the tokenizer's own.
        max_prompt_length: Longer prompts lose their first tokens; None keeps them whole, as TRL 1.16 does.
    """
    if is_conversational({"prompt": prompts[0]}):
        rendered = processing_class.apply_chat_template(
            prompts,
            tools=tools or None,
            chat_template=chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **chat_template_kwargs,
        )
        ids = rendered["input_ids"]
    else:
        ids = processing_class(text=prompts)["input_ids"]
    return ids if max_prompt_length is None else [row[-max_prompt_length:] for row in ids]


# -- the order of rows -------------------------------------------------------------------------------------------------


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
        self.data_source = data_source
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
        yield from _repeated(indices, self.mini_repeat_count, self.batch_size, self.repeat_count)

    def __len__(self) -> int:
        return (self.num_samples // self.batch_size) * self.batch_size * self.mini_repeat_count * self.repeat_count


class RepeatedStream(torch.utils.data.IterableDataset[Row]):
    """The rows of a stream in the order in which `RepeatSampler` gives indices.

    Each row is read and decoded once a chunk. It is a plain torch stream on purpose: of a `datasets.IterableDataset`
    with as many shards as there are processes, accelerate gives each process its own shards, which tears groups apart
    (TRL 1.16 does that); this one it reads in contiguous slices, as it does batches of a sampler.

    Args:
        dataset: The stream, shuffled beforehand if it is to be; `set_epoch` is passed on to it.
        mini_repeat_count: Times a row repeats in a row (completions a prompt).
        batch_size: Rows a chunk; an incomplete last chunk is dropped.
        repeat_count: Times a chunk repeats.
    """

    def __init__(
        self, dataset: IterableDataset, mini_repeat_count: int, batch_size: int = 1, repeat_count: int = 1
    ) -> None:
        self.dataset = dataset
        self.mini_repeat_count = mini_repeat_count
        self.batch_size = batch_size
        self.repeat_count = repeat_count

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for epoch `epoch`, if the stream was shuffled at all."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Row]:
        for row in _repeated(self.dataset, self.mini_repeat_count, self.batch_size, self.repeat_count):
            yield fresh_row(row)


# TRL's name for it
repeat_iterable_dataset = RepeatedStream


def _repeated(items: Iterable[Any], mini_repeat_count: int, batch_size: int, repeat_count: int) -> Iterator[Any]:
    items = iter(items)
    while len(chunk := list(itertools.islice(items, batch_size))) == batch_size:
        for _ in range(repeat_count):
            for item in chunk:
                yield from itertools.repeat(item, mini_repeat_count)


def fresh_row(row: Row) -> Row:
    """A copy whose dicts and lists are its own; the values in them (text, images, arrays) are shared."""
    return {key: _fresh(value) for key, value in row.items()}


def _fresh(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fresh(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_fresh(part) for part in value]
    return value


class CachedRows(torch.utils.data.Dataset[Row]):
    """A data set whose batches name each row many times: a row is decoded once, and kept while batches name it.

    TRL decodes each row `num_generations` times a batch, and each batch again for every micro-batch its generation
    serves. A transform that is random draws once for the whole group here.

    Args:
        dataset: The rows; its own `__getitems__` decodes them.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._rows: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Row]:
        """The rows at `indices`, none sharing a list or dict with another."""
        wanted = dict.fromkeys(indices)
        missing = [index for index in wanted if index not in self._rows]
        rows = {index: self._rows[index] for index in wanted if index in self._rows}
        if missing:
            rows |= dict(zip(missing, self.dataset.__getitems__(missing), strict=True))
        self._rows = rows
        return [fresh_row(rows[index]) for index in indices]
