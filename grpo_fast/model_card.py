"""The model card of a run: README.md beside its checkpoints, with what the hub reads from its head."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

PACKAGES = ("grpo-fast", "transformers", "torch", "datasets", "tokenizers")


def make_model_card(
    *,
    model_name: str,
    base_model: str | None,
    hub_model_id: str | None,
    dataset_name: str | None,
    tags: Iterable[str],
    method: str,
    paper: dict[str, str],
    run_urls: dict[str, str],
) -> ModelCard:
    """A card that says what was trained, from what, on what and how.

    Args:
        model_name: The card's title.
        base_model: Hub id of the model that training began from; None if it was a folder or made in memory.
        hub_model_id: Where the trained model can be loaded from; None means under `model_name`.
        dataset_name: Hub id of the training data.
        tags: The hub's tags; `generated_from_trainer` is added.
        method: The training method's short name.
        paper: Its `title`, arXiv `id` and BibTeX `citation`.
        run_urls: Name and address of each logger's page of the run.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="transformers",
        model_name=model_name,
        tags=["generated_from_trainer", *sorted(set(tags))],
    )
    origin = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    source = f" on [{dataset_name}](https://huggingface.co/datasets/{dataset_name})" if dataset_name else ""
    runs = "".join(f"[{name}]({url})\n\n" for name, url in run_urls.items())
    versions = "\n".join(f"- {package}: {version(package)}" for package in PACKAGES)
    return ModelCard(f"""---
{data.to_yaml()}
---

# {model_name}

A fine-tuned version{origin}{source}, trained with grpo-fast.

## Use

```python
from transformers import pipeline

generator = pipeline("text-generation", model="{hub_model_id or model_name}")
messages = [{{"role": "user", "content": "Which is larger, 9.9 or 9.11? Explain."}}]
print(generator(messages, max_new_tokens=256, return_full_text=False)[0]["generated_text"])
```

## Training

{runs}The method is {method}, from [{paper["title"]}](https://huggingface.co/papers/{paper["id"]}).

```bibtex
{paper["citation"]}
```

Versions:

{versions}
""")


def hub_id(model: Any) -> str | None:
    """The hub id a model was loaded from, or None if it was a folder or was made in memory."""
    name = getattr(model.config, "_name_or_path", "")
    return name if name and not os.path.isdir(name) else None


def run_urls(report_to: Iterable[str]) -> dict[str, str]:
    """The pages of this run at the loggers that it reports to and that have pages."""
    urls = {}
    if "wandb" in report_to and (run := _backend("wandb").run) is not None:
        urls["Weights & Biases"] = run.url
    if "comet_ml" in report_to and (experiment := _backend("comet_ml").get_running_experiment()) is not None:
        urls["Comet"] = experiment.url
    if "trackio" in report_to and (run := _backend("trackio").context_vars.current_run.get()) is not None:
        space = getattr(run, "_space_id", None)
        if space is not None:
            host = space.replace("/", "-")
            urls["trackio"] = f"https://{host}.hf.space?project={run.project}&runs={run.name}&sidebar=collapsed"
    return urls


def _backend(name: str) -> Any:
    return importlib.import_module(name)
