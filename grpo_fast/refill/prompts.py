"""Further prompts: a pass of its own over the training data, again and again, whose place a checkpoint can hold."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset

from grpo_fast.data import CachedRows, RepeatSampler, Row, fresh_row

# another order than the training pass has with the same seed
SEED_OFFSET = 14476


class PromptPass:
    """The rows of a data set or a stream one after another, and again from the start when they are used up.

    All processes make the same and take as many rows at a time, so that their parts of these do not overlap. No random
    state but its own is read or changed.

    Args:
        dataset: The training data.
        seed: The run's seed. Each turn through the data has an order of its own that depends on it.
        shuffle: Whether to shuffle; a stream as `datasets` does, within a buffer.
        epoch: The turn to go on in, from 0.
        offset: Rows of this turn to leave out, such as those that have been taken.
    """

    def __init__(self, dataset: Any, *, seed: int, shuffle: bool, epoch: int = 0, offset: int = 0) -> None:
        self.epoch = epoch
        self.offset = offset
        self._is_stream = isinstance(dataset, IterableDataset)
        seed += SEED_OFFSET
        if not self._is_stream:
            self._order: Any = RepeatSampler(dataset, mini_repeat_count=1, shuffle=shuffle, seed=seed)
            self._rows = CachedRows(dataset)
        else:
            # the training pass sets the epoch of the stream itself
            self._order = dataset.shuffle(seed=seed) if shuffle else copy.deepcopy(dataset)
        self._items = self._turns()

    @property
    def place(self) -> dict[str, int]:
        """Where it stands, as the arguments of one that goes on from there."""
        return {"epoch": self.epoch, "offset": self.offset}

    def take(self, count: int, part: slice, repeats: int) -> list[Row]:
        """Move on by `count` rows, and return those in `part` of them, each `repeats` times in a row.

        Raises:
            ValueError: If the data has no rows.
        """
        items = list(itertools.islice(self._items, count))[part]
        repeated = [item for item in items for _ in range(repeats)]
        return [fresh_row(row) for row in repeated] if self._is_stream else self._rows.__getitems__(repeated)

    def _turns(self) -> Iterator[Any]:
        """Rows of a stream, or else indices."""
        while True:
            self._order.set_epoch(self.epoch)
            num_rows = 0
            for item in self._order:
                num_rows += 1
                if num_rows > self.offset:
                    self.offset += 1
                    yield item
            if num_rows == 0:
                raise ValueError("train_dataset has no rows to take further prompts from")
            # more may have been left out than there were
            self.epoch, self.offset = self.epoch + 1, self.offset - num_rows
