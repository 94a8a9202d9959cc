"""TRL's place of `GRPOConfig`, for scripts that import it from there."""

from grpo_fast.config import GRPOConfig as GRPOConfig
