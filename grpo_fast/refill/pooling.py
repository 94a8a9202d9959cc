"""Metrics of a rollout in several rounds: one entry a key, for everything that was rolled out.

Rounds differ in size, so a mean of their means would count the rows of small ones too much. And a rollout that begins
badly has more rows than others, which would count less than theirs in a mean over rollouts: for its entry to count as
many as it is of, it is a `RowMean`. A logged line then is the mean of all rows since the last line. Its bias is that of
any ratio of sums whose sizes depend on what is summed: of the order of one over the number of groups in it, since the
sums themselves are unbiased (Wald's identity).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_fast.metrics import RowMean

# set anew by every round, not added to
TOTALS = ("num_tokens",)
TERMINATED = (
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
)


@dataclass(frozen=True)
class _Round:
    """What a round added: its values by key, how many rows it had, and how many values are behind a key if not that."""

    values: dict[str, list[float]]
    num_rows: int
    counts: dict[str, int]

    def mean(self, name: str) -> float:
        values = [value for value in self.values.get(name, []) if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan

    def count(self, name: str) -> float:
        """How many values the round's entry under a name is of; 0 for a placeholder."""
        if math.isnan(self.mean(name)):
            return 0.0
        if name in TERMINATED:
            return self.num_rows * (1 - self.mean("completions/clipped_ratio"))
        if name == "tools/failure_frequency":
            return self.num_rows * self.mean("tools/call_frequency")
        return self.counts.get(name, self.num_rows)


class Entries:
    """Collects what the rounds of one rollout add to the metrics.

    Args:
        metrics: Lists of values by key, to which rounds append.
    """

    def __init__(self, metrics: dict[str, list[float]]) -> None:
        self._metrics = metrics
        self._rounds: list[_Round] = []
        self._lengths = {name: len(values) for name, values in metrics.items()}
        self._starts = dict(self._lengths)

    def end_round(self, num_rows: int, counts: dict[str, int]) -> None:
        """Note what has been appended since the last round.

        Args:
            num_rows: The round's rows, of all processes.
            counts: How many values are behind an entry, for those that are not of every row.
        """
        values = {name: list(entries[self._lengths.get(name, 0) :]) for name, entries in self._metrics.items()}
        self._rounds.append(_Round(values, num_rows, counts))
        self._lengths = {name: len(entries) for name, entries in self._metrics.items()}

    def pool(self) -> None:
        """Put one entry a key in the place of all that the rounds have appended."""
        for name, entries in self._metrics.items():
            rounds = [part for part in self._rounds if part.values.get(name)]
            if rounds and name not in TOTALS:
                entries[self._starts.get(name, 0) :] = [_pooled(name, rounds)]


def _pooled(name: str, rounds: list[_Round]) -> float:
    """Extremes of extremes, stds about the common mean, means weighted by what they are of."""
    last = name.rsplit("/", 1)[-1]
    if last in ("min", "max") or last.startswith(("min_", "max_")):
        known = [part for part in rounds if part.count(name) > 0] or rounds
        return (min if last.startswith("min") else max)(value for part in known for value in part.values[name])
    if last == "std" or name == "reward_std":
        mean_name = "reward" if name == "reward_std" else f"{name.removesuffix('std')}mean"
        if all(mean_name in part.values for part in rounds):
            return _pooled_std(name, mean_name, rounds)
    return _pooled_mean(name, rounds)


def _pooled_mean(name: str, rounds: list[_Round]) -> RowMean:
    total = sum(part.count(name) for part in rounds)
    known = [part for part in rounds if part.count(name) > 0]
    if len(known) < 2:
        # one, or nothing but placeholders, which are the same
        return RowMean((known or rounds)[0].mean(name), total)
    return RowMean(sum(part.count(name) * part.mean(name) for part in known) / total, total)


def _pooled_std(name: str, mean_name: str, rounds: list[_Round]) -> RowMean:
    known = [part for part in rounds if part.count(mean_name) > 0]
    if len(known) < 2:
        return _pooled_mean(name, rounds)
    mean = _pooled_mean(mean_name, known)
    squares = 0.0
    for part in known:
        # a std of one value is NaN
        std = 0.0 if math.isnan(part.mean(name)) else part.mean(name)
        count = part.count(mean_name)
        squares += (count - 1) * std**2 + count * (part.mean(mean_name) - mean) ** 2
    return RowMean(math.sqrt(squares / (mean.num_rows - 1)), mean.num_rows)
