"""Settings from YAML and from the command line, as the values `GRPOConfig` wants."""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import HfArgumentParser

from grpo_fast.config import GRPOConfig


@functools.cache
def _config_actions() -> dict[str, argparse.Action]:
    """How argparse converts each field of `GRPOConfig`, by field name."""
    parser = HfArgumentParser(GRPOConfig)
    # the later `--no_field` actions of boolean fields share their field's name
    return {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}


def config_fields() -> list[str]:
    """The names of the settings `GRPOConfig` takes."""
    return list(_config_actions())


def check_keys(keys: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Refuse a key that is not known.

    Raises:
        ValueError: Naming the key, where it stands and the known key most like it.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"unknown setting {key!r} in {where}; the nearest is {nearest[0]!r}")


def convert_settings(settings: Mapping[str, object]) -> dict[str, Any]:
    """Values as YAML or the command line gave them, as the types of `GRPOConfig`'s fields.

    Text is converted as `HfArgumentParser` converts flags: `2e-5`, which YAML reads as text, becomes a number. None
    passes as it is, and so do mappings, for fields that take JSON.

    Raises:
        ValueError: For a value that its field cannot hold; the message names the field.
    """
    return {name: _convert(name, value, _config_actions()[name]) for name, value in settings.items()}


def _convert(name: str, value: object, action: argparse.Action) -> object:
    if value is None or isinstance(value, dict):
        return value
    if action.nargs == "+":
        return [_convert_one(name, item, action) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        if action.type is not str:
            raise ValueError(f"{name} takes one value, it is {value!r}")
        return [_convert_one(name, item, action) for item in value]
    return _convert_one(name, value, action)


def _convert_one(name: str, value: object, action: argparse.Action) -> object:
    if value is False and action.choices is not None and "no" in action.choices:
        # YAML reads a bare `no` as false
        value = "no"
    convert: Any = action.type or str
    try:
        converted: object = convert(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"{name} must be {_type_name(action)}, it is {value!r}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, action.choices))}; it is {value!r}")
    return converted


def _type_name(action: argparse.Action) -> str:
    names = {int: "a whole number", float: "a number", str: "text"}
    return names.get(action.type, "true or false") if isinstance(action.type, type) else "true or false"
