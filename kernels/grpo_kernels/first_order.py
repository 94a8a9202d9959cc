"""Refuses second derivatives, which hand-written backward passes do not have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an `autograd.Function`'s backward: under `create_graph=True` it raises RuntimeError.

    torch's `once_differentiable` raises only if the upstream gradient itself wants a gradient; else it would return
    a constant that a gradient penalty takes for a function.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            name = type(ctx).__name__.removeprefix("_").removesuffix("Backward")
            raise RuntimeError(f"{name} has no second derivative: backward with create_graph=True is not supported")
        return backward(ctx, *gradients)

    return refusing
