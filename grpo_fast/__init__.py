"""grpo-fast: a drop-in replacement for TRL's `GRPOTrainer`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.config import GRPOConfig
    from grpo_fast.trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: it comes with the first use
    if name == "GRPOConfig":
        from grpo_fast.config import GRPOConfig

        return GRPOConfig
    if name == "GRPOTrainer":
        from grpo_fast.trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module 'grpo_fast' has no attribute {name!r}")
