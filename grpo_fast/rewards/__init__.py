"""Rewards: calling the user's functions the way TRL calls them."""

from grpo_fast.rewards.calling import RewardFunc, RewardFunctions

__all__ = ["RewardFunc", "RewardFunctions"]
