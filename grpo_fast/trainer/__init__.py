"""The trainer: rollouts, loss, and the order of the steps."""

from grpo_fast.compatibility import refuse_patched_library

refuse_patched_library()

from grpo_fast.trainer.grpo_trainer import GRPOTrainer  # noqa: E402 - the classes below are what would be patched

__all__ = ["GRPOTrainer"]
