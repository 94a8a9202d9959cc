"""Rewards: what the user's reward functions and models are, and how a batch is scored with them."""

from grpo_fast.rewards.calling import RewardCall, callable_name, is_async
from grpo_fast.rewards.sources import RewardFunc, Rewards, check_rewards, make_rewards

__all__ = [
    "RewardCall",
    "RewardFunc",
    "Rewards",
    "callable_name",
    "check_rewards",
    "is_async",
    "make_rewards",
]
