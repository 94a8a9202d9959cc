"""The completions table: the latest generation batch with its rewards, printed, written as parquet, sent to loggers."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
from collections import defaultdict, deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_fast.config import GRPOConfig

if TYPE_CHECKING:
    from huggingface_hub import CommitScheduler
    from rich.text import Text

# minutes between two commits to the completions' repository
COMMIT_EVERY = 2


class CompletionLog(dict[str, Any]):
    """Prompts, completions, rewards and advantages of the latest generation batch; keys as in TRL's `_logs`.

    Args:
        max_rows: Rows kept: one generation batch, with the further rounds that it may have.
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

    def clear_rows(self) -> None:
        """Begin anew, with the same columns."""
        for name in ("images", "prompt", "completion", "advantages"):
            self[name].clear()
        for column in (*self["rewards"].values(), *self["extra"].values()):
            column.clear()

    def table(self, step: int) -> dict[str, list[Any]]:
        """Columns `step`, `prompt`, `completion`, one a reward function, one an extra, `advantage`.

        The newest rows of the columns stand beside each other: one that has fewer than there are prompts begins with
        None. A reward or an extra that has another column's name gets its kind after it.
        """
        num_rows = len(self["prompt"])
        table: dict[str, list[Any]] = {
            "step": [step] * num_rows,
            "prompt": [without_images(prompt) for prompt in self["prompt"]],
            "completion": [without_images(completion) for completion in self["completion"]],
        }
        for kind, columns in (("reward", self["rewards"]), ("extra", self["extra"])):
            for name, values in columns.items():
                is_taken = name in table or name == "advantage"
                table[f"{name} ({kind})" if is_taken else name] = _newest(values, num_rows)
        return table | {"advantage": _newest(self["advantages"], num_rows)}

    def print_table(self, step: int, num_rows: int | None) -> None:
        """Print `num_rows` random rows (None: all) to the terminal."""
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table

        columns = {name: values for name, values in self.table(step).items() if name != "step"}
        rows = list(zip(*columns.values(), strict=True))
        if num_rows is not None and num_rows < len(rows):
            # a generator of its own: printing must not move the run's random state
            rows = random.Random(step).sample(rows, max(num_rows, 0))
        if not rows:
            return
        table = Table(show_lines=True, expand=True)
        for name in columns:
            is_number = name in self["rewards"] or name == "advantage"
            table.add_column(name, justify="right" if is_number else "left")
        for row in rows:
            table.add_row(*map(_cell, row))
        Console().print(Panel(table, expand=False, title=f"Step {step}"))

    def write(self, step: int, directory: Path) -> Path:
        """Write `completions_{step:05d}.parquet` into `directory` and return its path."""
        import pandas as pd
        import pyarrow as pa

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"completions_{step:05d}.parquet"
        # renamed when it is whole: a commit to the hub may read the folder at any time
        unfinished = path.with_suffix(".unfinished")
        table = self.table(step)
        try:
            pd.DataFrame(table).to_parquet(unfinished)
        except pa.ArrowException:
            pd.DataFrame({name: _storable(values) for name, values in table.items()}).to_parquet(unfinished)
        os.replace(unfinished, path)
        return path

    def send(self, step: int, report_to: list[str], unique_prompts: bool) -> None:
        """Log the table to Weights & Biases and trackio where the run reports to them, images as an `image` column."""
        import pandas as pd

        for name in ("wandb", "trackio"):
            if name not in report_to:
                continue
            backend = importlib.import_module(name)
            if name == "wandb" and backend.run is None:
                continue
            table = self.table(step)
            if any(self["images"]):
                images = _newest(self["images"], len(table["prompt"]))
                table["image"] = [[backend.Image(image) for image in row or []] for row in images]
            frame = pd.DataFrame(table)
            if unique_prompts:
                # conversations are lists, which only their text can compare
                frame = frame[~frame["prompt"].astype(str).duplicated()]
            backend.log({"completions": backend.Table(dataframe=frame)})


def without_images(messages: Any) -> Any:
    """A conversation whose image blocks have lost their images; anything else as it is."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": [_without_image(block) for block in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _without_image(block: Any) -> Any:
    is_image = isinstance(block, dict) and block.get("type") == "image"
    return {"type": "image"} if is_image else block


def _newest(values: Iterable[Any], num_rows: int) -> list[Any]:
    """The last `num_rows` values, with None before them where there are fewer."""
    values = list(values)
    return [None] * (num_rows - len(values)) + values[len(values) - num_rows if len(values) > num_rows else 0 :]


def _storable(values: list[Any]) -> list[Any]:
    """A column that parquet can hold: values of several types, such as tool calls' arguments, become JSON texts."""
    import pandas as pd
    import pyarrow as pa

    try:
        pd.DataFrame({"values": values}).to_parquet(io.BytesIO())
    except pa.ArrowException:
        return [None if value is None else json.dumps(value, default=str, ensure_ascii=False) for value in values]
    return values


def _cell(value: Any) -> Text:
    from rich.text import Text

    if isinstance(value, float):
        return Text(f"{value:.2f}")
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return Text("\n\n").join(_message(message) for message in value)
    return Text("" if value is None else str(value))


def _message(message: dict[str, Any]) -> Text:
    """A message as its role, reasoning, content and tool calls, one below the other."""
    from rich.text import Text

    parts = [Text(str(message.get("role", "")).upper(), style="bold red")]
    reasoning = message.get("reasoning_content") or message.get("thinking")
    if reasoning:
        parts.append(Text(str(reasoning), style="italic dim"))
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            str(block.get("text", f"[{str(block.get('type')).upper()}]")) if isinstance(block, dict) else str(block)
            for block in content
        )
    if content:
        parts.append(Text(str(content)))
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        parts.append(Text(f"{function.get('name')}({_arguments(function.get('arguments'))})"))
    return Text("\n").join(parts)


def _arguments(arguments: Any) -> str:
    if not isinstance(arguments, dict):
        return str(arguments or "")
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def commit_completions(args: GRPOConfig, directory: Path) -> CommitScheduler:
    """Commit the parquet files of `directory` to `args.log_completions_hub_repo` every two minutes, from a thread.

    Raises:
        ConnectionError: If the hub cannot be reached, or does not give access to the repository.
    """
    from huggingface_hub import CommitScheduler, DatasetCard, DatasetCardData, create_repo

    # of the HTTP library that this version of huggingface_hub uses
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    repo, token = args.log_completions_hub_repo, args.hub_token
    assert repo is not None
    data = DatasetCardData(pretty_name="Completions of a GRPO run", tags=["grpo-fast", "trl-logs", "completions"])
    card = DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(repo, args.hub_model_id)}")
    try:
        create_repo(repo, repo_type="dataset", private=args.hub_private_repo, exist_ok=True, token=token)
        card.push_to_hub(repo, token=token)
        return CommitScheduler(
            repo_id=repo,
            repo_type="dataset",
            folder_path=directory,
            every=COMMIT_EVERY,
            allow_patterns=["*.parquet"],
            token=token,
        )
    except (OSError, HTTPError) as error:
        raise ConnectionError(
            f"log_completions_hub_repo={repo!r} needs the hub and the right to write there, which failed ({error}); "
            f"log in with `hf auth login`, or leave it None: the files are in {directory} all the same"
        ) from error


def _card_text(repo: str, model: str | None) -> str:
    of = f" of [{model}](https://huggingface.co/{model})" if model else ""
    return f"""# Completions of a GRPO run

Completions sampled during the training{of} with grpo-fast, one parquet file a logged step. Columns: `step`, `prompt`,
`completion`, one a reward function, what reward functions logged beside, and `advantage`.

```python
import datasets

datasets.load_dataset("{repo}")
```
"""
