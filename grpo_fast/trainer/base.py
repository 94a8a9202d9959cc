"""What all parts of the trainer share."""

from __future__ import annotations

from transformers import Trainer

from grpo_fast.config import GRPOConfig


class BaseTrainer(Trainer):
    """`transformers.Trainer` with our settings."""

    args: GRPOConfig

    @property
    def _mode(self) -> str:
        """Which metrics and settings hold: "train", or "eval"."""
        return "train" if self.model.training else "eval"
