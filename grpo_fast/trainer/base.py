"""What all parts of the trainer share."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from grpo_fast.config import GRPOConfig


class BaseTrainer(Trainer):
    """`transformers.Trainer` with our settings."""

    args: GRPOConfig

    @property
    def _mode(self) -> str:
        """Which metrics and settings hold: "train", or "eval"."""
        return "train" if self.model.training else "eval"


def replaced_methods(trainer: Trainer, own: dict[str, Any]) -> list[str]:
    """Which of these methods a subclass, or an attribute of the instance or of the class, replaces.

    Args:
        trainer: The instance.
        own: The methods by name, as they are before anybody replaces them.
    """
    # not by the function's module: wrappers made with functools.wraps bear the wrapped function's
    return [name for name in own if name in vars(trainer) or getattr(type(trainer), name) is not own[name]]
