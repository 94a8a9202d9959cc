"""GRPO training."""
