"""`grpo-fast lint-data CONFIG.yaml`: which gold answers can score at all, before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from grpo_fast.recipes.train import read_dataset, read_run, resolve_rewards
from grpo_fast.rewards.compose import parts_of
from grpo_fast.rewards.marks import callable_name

# rows that are shown one by one, and characters of each
SHOWN = 10
WIDTH = 80
# one message to a worker process must not hold a whole data set
ROWS_AT_A_TIME = 10_000


@dataclass(frozen=True, kw_only=True)
class GoldReport:
    """What the gold answers of a data set are, for one reward.

    Attributes:
        dataset: The setting that names the data set.
        reward: The reward's name.
        num_rows: Rows that it scores.
        kinds: Readable gold answers by kind.
        hopeless: Rows against which nothing can score: the row's number from 0, its gold answer and why.
    """

    dataset: str
    reward: str
    num_rows: int
    kinds: Counter[str]
    hopeless: list[tuple[int, str, str]]

    def lines(self) -> list[str]:
        """The report as text."""
        good = self.num_rows - len(self.hopeless)
        share = 100 * good / max(1, self.num_rows)
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(self.kinds).most_common())
        found = [
            f"{self.dataset}, reward {self.reward}: {good} of {self.num_rows} gold answers can score ({share:.2f}%)"
        ]
        found += [f"  kinds: {kinds}"] if kinds else []
        for row, gold, reason in self.hopeless[:SHOWN]:
            found.append(f"  row {row}: {_shortened(gold)}: {reason}")
        if len(self.hopeless) > SHOWN:
            rows = ", ".join(str(row) for row, _, _ in self.hopeless[SHOWN : 20 * SHOWN])
            found.append(
                f"  and {len(self.hopeless) - SHOWN} more: rows {rows}{' ...' * (len(self.hopeless) > 20 * SHOWN)}"
            )
        return found


def run_lint(path: str | Path, flags: Mapping[str, object]) -> int:
    """Print a report a data set and reward that reads gold answers; 1 if a row of them can never score, else 0.

    Raises:
        ValueError: As `make_trainer`, and if no reward reads gold answers.
    """
    reports = lint(path, flags)
    for report in reports:
        print("\n".join(report.lines()))
    return int(any(report.hopeless for report in reports))


def lint(path: str | Path, flags: Mapping[str, object]) -> list[GoldReport]:
    """The reports of `run_lint`; arguments as `make_trainer`. No model is needed or loaded."""
    path = Path(path)
    run, _ = read_run(path, flags, needed=("dataset", "rewards"))
    functions = resolve_rewards(run["rewards"], [path.parent, Path.cwd()])
    reports = []
    for key, split in (("dataset", "train"), ("eval_dataset", "test")):
        dataset = read_dataset(run, key, path.parent, default_split=split)
        if dataset is not None:
            reports += _reports(key, dataset, functions)
    if not reports:
        names = ", ".join(callable_name(function) for function in functions)
        raise ValueError(f"{path}: none of the rewards reads gold answers; they are {names}")
    return reports


def _reports(key: str, dataset: Dataset, functions: Sequence[Callable[..., Any]]) -> list[GoldReport]:
    names: dict[int, str] = {}
    counts: Counter[int] = Counter()
    kinds: dict[int, Counter[str]] = {}
    hopeless: dict[int, list[tuple[int, str, str]]] = {}
    for start in range(0, len(dataset), ROWS_AT_A_TIME):
        columns = dataset[start : start + ROWS_AT_A_TIME]
        for part, rows in [pair for function in functions for pair in parts_of(function, columns)]:
            if not hasattr(part, "describe_golds"):
                continue
            own = {name: [values[row] for row in rows] for name, values in columns.items()}
            names[id(part)] = callable_name(part)
            counts[id(part)] += len(rows)
            for row, golds, (kind, reason) in zip(rows, part.golds(own), part.describe_golds(own), strict=True):
                if reason:
                    hopeless.setdefault(id(part), []).append((start + row, " | ".join(golds), reason))
                else:
                    kinds.setdefault(id(part), Counter())[kind] += 1
    return [
        GoldReport(
            dataset=key,
            reward=name,
            num_rows=counts[part],
            kinds=kinds.get(part, Counter()),
            hopeless=hopeless.get(part, []),
        )
        for part, name in names.items()
    ]


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= WIDTH else f"{line[:WIDTH]}...")
