"""A progress bar of one generation: completions done, and tokens a second."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

# between two updates: a terminal draws over its line, a log file keeps every one
TERMINAL_INTERVAL_S = 0.2
LOG_INTERVAL_S = 30.0


class GenerationBar:
    """A bar on stderr, below those that are open already, that its end removes.

    It first shows after one interval, so that generations shorter than that leave nothing in a log file.
    """

    def __init__(self, total: int, *, is_shown: bool) -> None:
        """A bar of `total` completions to come; unless `is_shown`, nothing is written."""
        self._interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S
        self._start = self._last = time.perf_counter()
        self._bar = tqdm(
            total=total,
            desc="vLLM",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} completions [{elapsed}{postfix}]",
            leave=False,
            dynamic_ncols=True,
            disable=not is_shown,
            # `is_due` says when
            mininterval=0,
            miniters=0,
            delay=self._interval_s,
        )

    @property
    def is_due(self) -> bool:
        """Whether the next `show` writes; counting tokens for one that does not is wasted."""
        return not self._bar.disable and time.perf_counter() - self._last >= self._interval_s

    def show(self, done: int, num_tokens: int) -> None:
        """Write how many completions are done and the mean rate of all tokens so far."""
        self._last = time.perf_counter()
        self._bar.set_postfix_str(f"{num_tokens / (self._last - self._start):.0f} tokens/s", refresh=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
