"""A model's training and evaluation mode, module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode inside; each module's own mode after."""
    resting = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in resting:
            module.training = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, which also switches gradient checkpointing off; each module's own mode after."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
