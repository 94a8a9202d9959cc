"""Dataclasses whose fields are tensors of one value a row: some of their rows, and parts put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Rows = TypeVar("Rows")


def cut(values: Rows, rows: slice | Tensor) -> Rows:
    """The dataclass of a slice of the rows, in views, or of rows by their numbers; None and 0-dim fields stay."""
    given = {name: t for name, t in _fields(values).items() if isinstance(t, Tensor) and t.ndim > 0}
    return dataclasses.replace(values, **{name: t[rows] for name, t in given.items()})  # type: ignore[type-var]


def joined(parts: Sequence[Rows]) -> Rows:
    """The dataclass of all rows, from those of some after the other; at least one part. None stays None."""
    columns = {name: [_fields(part)[name] for part in parts] for name in _fields(parts[0])}
    return type(parts[0])(**{name: None if c[0] is None else torch.cat(c) for name, c in columns.items()})


def _fields(values: Any) -> dict[str, Any]:
    return {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
