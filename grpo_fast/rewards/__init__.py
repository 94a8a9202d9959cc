"""Rewards: what the user's reward functions and models are, and how a batch is scored with them.

Names are imported when they are used: worker processes need some of these modules, but not torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.rewards.calling import DROP, RewardCall, callable_name, is_async
    from grpo_fast.rewards.compose import gate, route, weighted
    from grpo_fast.rewards.math.accuracy import Accuracy, accuracy
    from grpo_fast.rewards.pooled import in_pool
    from grpo_fast.rewards.registry import make_reward
    from grpo_fast.rewards.sources import RewardFunc, Rewards, check_rewards, make_rewards

_MODULES = {
    "DROP": "marks",
    "Accuracy": "math.accuracy",
    "RewardCall": "calling",
    "RewardFunc": "sources",
    "Rewards": "sources",
    "accuracy": "math.accuracy",
    "callable_name": "marks",
    "check_rewards": "sources",
    "gate": "compose",
    "in_pool": "pooled",
    "is_async": "marks",
    "make_reward": "registry",
    "make_rewards": "sources",
    "route": "compose",
    "weighted": "compose",
}

__all__ = [
    "DROP",
    "Accuracy",
    "RewardCall",
    "RewardFunc",
    "Rewards",
    "accuracy",
    "callable_name",
    "check_rewards",
    "gate",
    "in_pool",
    "is_async",
    "make_reward",
    "make_rewards",
    "route",
    "weighted",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'grpo_fast.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"grpo_fast.rewards.{_MODULES[name]}"), name)
