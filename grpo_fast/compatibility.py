"""What scripts import from TRL's trainer module beside the trainer; and the library we cannot share a process with."""

from __future__ import annotations

import sys
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor


def refuse_patched_library() -> None:
    """Raise ImportError where Unsloth has been imported: it rewrites the classes this trainer is built on."""
    if "unsloth" in sys.modules:
        raise ImportError(
            "unsloth has been imported in this process and patches transformers' classes, under which grpo_fast's "
            "results cannot be vouched for: remove `import unsloth`, or train with Unsloth's own trainer"
        )


def nanmin(tensor: Tensor) -> Tensor:
    """The smallest value that is not NaN, 0-dim; NaN if there is none."""
    return _extreme(tensor, torch.min)


def nanmax(tensor: Tensor) -> Tensor:
    """The greatest value that is not NaN, 0-dim; NaN if there is none."""
    return _extreme(tensor, torch.max)


def _extreme(tensor: Tensor, function: Any) -> Tensor:
    valid = tensor[~tensor.isnan()]
    return function(valid) if valid.numel() else tensor.new_tensor(torch.nan)


# the rows TRL knows, by the columns that hold messages
CHAT_COLUMNS = (
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
)


def apply_chat_template(
    example: dict[str, Any], processing_class: Any, tools: list[Any] | None = None, **template_kwargs: Any
) -> dict[str, Any]:
    """The conversations of a row as text, like TRL's function of this name.

    Args:
        example: A row whose columns are one of `CHAT_COLUMNS`; of others `label` is handed on, and
            `chat_template_kwargs` are more arguments of the template.
        processing_class: A tokenizer or processor with a chat template.
        tools: What the template says can be called.
        template_kwargs: More arguments of the template.

    Returns:
        `text` for `messages`; else each column as text, what follows a prompt without it. A prompt ends where the
        assistant's turn is to begin, or goes on if its last message is the assistant's.

    Raises:
        KeyError: If the row has other columns of messages.
        ValueError: If the prompt ends with a message of the system.
    """

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        options |= example.get("chat_template_kwargs", {}) | template_kwargs
        text: str = processing_class.apply_chat_template(messages, tools=tools or None, tokenize=False, **options)
        return text

    columns = {key for key in example if any(key in known for known in CHAT_COLUMNS)}
    if columns not in CHAT_COLUMNS:
        raise KeyError(f"a row's columns of messages must be one of {CHAT_COLUMNS}, they are {sorted(columns)}")
    if "messages" in columns:
        return {"text": render(example["messages"])}
    texts: dict[str, Any] = {"label": example["label"]} if "label" in example else {}
    if "prompt" not in columns:
        return texts | {name: render(example[name]) for name in sorted(columns)}
    role = example["prompt"][-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise ValueError(f"a prompt must end with a message of user, tool or assistant; its last role is {role!r}")
    is_open = role == "assistant"
    prompt = render(example["prompt"], add_generation_prompt=not is_open, continue_final_message=is_open)
    wholes = {name: render(example["prompt"] + example[name]) for name in sorted(columns - {"prompt"})}
    # templates that rewrite earlier turns differ before the prompt's end
    shared = takewhile(lambda letters: len(set(letters)) == 1, zip(prompt, *wholes.values(), strict=False))
    prompt = prompt[: sum(1 for _ in shared)]
    return texts | {"prompt": prompt} | {name: whole[len(prompt) :] for name, whole in wholes.items()}
