"""Which rows a batch holds: samplers and data loaders for training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler

from grpo_fast.config import GRPOConfig
from grpo_fast.data import CachedRows, RepeatedStream, RepeatSampler
from grpo_fast.trainer.base import BaseTrainer

logger = logging.getLogger(__name__)


def settle_stream_loading(
    args: GRPOConfig, train_dataset: Dataset | IterableDataset, eval_dataset: object = None
) -> None:
    """Set what streams need of accelerate and of the workers, before `Trainer.__init__` reads it.

    Args:
        args: Changed in place: `accelerator_config.dispatch_batches` becomes False if any set is a stream, and
            `dataloader_num_workers` 0 if the training set is one.
        train_dataset: The training set.
        eval_dataset: None, a set, or a dict of them.

    Raises:
        ValueError: If the user wants batches dispatched from the main process.
    """
    evals = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evals)):
        _refuse_dispatching(args)
        args.accelerator_config.dispatch_batches = False
    if isinstance(train_dataset, IterableDataset) and args.dataloader_num_workers:
        logger.warning(
            "train_dataset is a stream, which the trainer reads itself to keep a prompt's rows together: "
            "dataloader_num_workers becomes 0, it was %d",
            args.dataloader_num_workers,
        )
        args.dataloader_num_workers = 0


def _refuse_dispatching(args: GRPOConfig) -> None:
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches must be False or None for an IterableDataset, because rows of text "
            "cannot be sent as tensors; it is True"
        )


class DataTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that feeds it rows.

    A training batch is one generation: `per_device_train_batch_size * steps_per_generation` rows a process. In W
    processes accelerate deals the batches out in turn, and `prompts_per_generation` prompts are exactly W batches of
    one repetition: process p gets the p-th slice of every generation, and all repetitions of it in a row. So groups
    may straddle processes, but gathered in the order of ranks they lie side by side.
    """

    shuffle_dataset: bool | None
    num_generations: int
    num_generations_eval: int
    num_iterations: int
    _eval_dataloaders: dict[str, DataLoader[Any]]
    _signature_columns: list[str] | None

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "image", "images"]

    def _repetition(self) -> dict[str, int]:
        """How the training rows repeat, in the words of `RepeatSampler`."""
        assert self.args.generation_batch_size is not None
        assert self.args.steps_per_generation is not None
        return {
            "mini_repeat_count": self.num_generations,
            "batch_size": self.args.generation_batch_size // self.num_generations,
            "repeat_count": self.num_iterations * self.args.steps_per_generation,
        }

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        """TRL's seam: the order of the training rows."""
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
            **self._repetition(),
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int]:
        """TRL's seam: the order of the evaluation rows, shuffled with the seed."""
        return RepeatSampler(data_source=eval_dataset, mini_repeat_count=self.num_generations_eval, seed=self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one generation each: `steps_per_generation` micro-batches."""
        assert self.args.steps_per_generation is not None
        loader = self._loader(
            self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            shuffle=bool(self.shuffle_dataset),
            repetition=self._repetition(),
            is_training=True,
        )
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):
            # where accelerate looks for `set_epoch` once a resumed run has wrapped the shard to skip batches
            shard.sampler = shard.batch_sampler.sampler
        return loader

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader[Any]:
        """Batches of `per_device_eval_batch_size` rows of a set, given itself, by its key, or the trainer's only one.

        Raises:
            ValueError: If there is no such set, or several and none was named.
        """
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if self.args.dataloader_persistent_workers and key in getattr(self, "_eval_dataloaders", {}):
            return self._eval_dataloaders[key]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset; it is None")
        if isinstance(dataset, dict):
            raise ValueError(f"eval_dataset holds several sets, name one of {list(dataset)}")
        return self._loader(
            dataset,
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
            shuffle=True,
            repetition={"mini_repeat_count": self.num_generations_eval},
            dataloader_key=key,
        )

    def _loader(
        self,
        dataset: Any,
        *,
        sampler_fn: Callable[[Dataset], Sampler[int]],
        shuffle: bool,
        repetition: dict[str, int],
        **settings: Any,
    ) -> DataLoader[Any]:
        """A prepared loader in TRL's order, of a data set or a stream, that decodes a row once a batch."""
        if isinstance(dataset, IterableDataset):
            _refuse_dispatching(self.args)
            self.accelerator.dataloader_config.dispatch_batches = False
            # a buffered shuffle; the sampler's permutation needs to know the length
            stream = dataset.shuffle(seed=self.args.seed) if shuffle else dataset
            with self._without_workers():
                return self._get_dataloader(dataset=RepeatedStream(stream, **repetition), **settings)
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description=settings["description"])
            # a sampler that a subclass makes may read columns, so it sees the data set itself
            return self._get_dataloader(
                dataset=CachedRows(dataset), sampler_fn=lambda _: sampler_fn(dataset), **settings
            )
        return self._get_dataloader(dataset=dataset, sampler_fn=sampler_fn, **settings)

    @contextmanager
    def _without_workers(self) -> Iterator[None]:
        """Read in this process: several workers would interleave a stream and split groups."""
        reset = {
            "dataloader_num_workers": 0,
            "dataloader_persistent_workers": False,
            "dataloader_prefetch_factor": None,
        }
        before = {name: getattr(self.args, name) for name in reset}
        for name, value in reset.items():
            setattr(self.args, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.args, name, value)
