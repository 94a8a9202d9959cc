"""What reward functions and their callers agree on: a function's name, whether it is async, and `DROP`."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any


class _Drop(float):
    """A reward value that takes the completion out of its group, whatever other functions say.

    It is NaN as a number, which TRL and whoever else does not know it take for None.
    """

    def __new__(cls) -> _Drop:
        return super().__new__(cls, math.nan)

    def __repr__(self) -> str:
        return "DROP"


DROP = _Drop()


def callable_name(function: Any) -> str:
    """A function's name in the metrics: that of the function inside a `partial`, or of an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def is_async(function: Any) -> bool:
    """Whether calling `function` gives a coroutine, also through `partial` and callable objects."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004 - the method is inspected, not tested for
