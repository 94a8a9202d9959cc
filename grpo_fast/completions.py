"""The completions table: the latest generation batch with its rewards, printed, written as parquet, sent to loggers."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from pathlib import Path
from typing import Any


class CompletionLog(dict[str, Any]):
    """Prompts, completions, rewards and advantages of the latest generation batch; keys as in TRL's `_logs`.

    Args:
        max_rows: Rows kept: one generation batch.
    """

    def __init__(self, max_rows: int) -> None:
        def column() -> deque[Any]:
            return deque(maxlen=max_rows)

        super().__init__(
            images=column(),
            prompt=column(),
            completion=column(),
            rewards=defaultdict(column),
            advantages=column(),
            extra=defaultdict(column),
        )

    def table(self, step: int) -> dict[str, list[Any]]:
        """Columns `step`, `prompt`, `completion`, one a reward function, one an extra, `advantage`."""
        return {
            "step": [step] * len(self["prompt"]),
            "prompt": list(self["prompt"]),
            "completion": list(self["completion"]),
            **{name: list(values) for name, values in self["rewards"].items()},
            **{name: list(values) for name, values in self["extra"].items()},
            "advantage": list(self["advantages"]),
        }

    def print_table(self, step: int, num_rows: int | None) -> None:
        """Print `num_rows` random rows (None: all) to the terminal."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        columns = {name: values for name, values in self.table(step).items() if name != "step"}
        rows = list(zip(*columns.values(), strict=True))
        if num_rows is not None and num_rows < len(rows):
            # a generator of its own: printing must not move the run's random state
            rows = random.Random(step).sample(rows, num_rows)
        table = Table(title=f"Step {step}", show_lines=True, expand=True)
        for name in columns:
            table.add_column(name)
        for row in rows:
            table.add_row(*[Text(_cell(value)) for value in row])
        Console().print(table)

    def write(self, step: int, directory: Path) -> Path:
        """Write `completions_{step:05d}.parquet` into `directory` and return its path."""
        import pandas as pd

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"completions_{step:05d}.parquet"
        pd.DataFrame(self.table(step)).to_parquet(path)
        return path

    def send(self, step: int, report_to: list[str], unique_prompts: bool) -> None:
        """Log the table to Weights & Biases and trackio where the run reports to them."""
        backends = [name for name in ("wandb", "trackio") if name in report_to]
        if not backends:
            return
        import importlib

        import pandas as pd

        frame = pd.DataFrame(self.table(step))
        if unique_prompts:
            frame = frame[~frame["prompt"].astype(str).duplicated()]
        for name in backends:
            backend = importlib.import_module(name)
            if name == "trackio" or backend.run is not None:
                backend.log({"completions": backend.Table(dataframe=frame)})


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)
    return str(value)
