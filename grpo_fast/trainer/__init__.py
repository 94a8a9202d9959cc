"""The trainer: the order of the steps."""

from grpo_fast.trainer.grpo_trainer import GRPOTrainer

__all__ = ["GRPOTrainer"]
