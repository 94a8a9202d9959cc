"""Rewards: what the user's reward functions and models are, and how a batch is scored with them.

Names are imported when they are used: worker processes need some of these modules, but not torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.rewards.calling import RewardCall
    from grpo_fast.rewards.choice import MultipleChoice
    from grpo_fast.rewards.classifier import ModelReward
    from grpo_fast.rewards.code import Code
    from grpo_fast.rewards.compose import gate, route, weighted
    from grpo_fast.rewards.format import Format, TagCount
    from grpo_fast.rewards.judge import Judge
    from grpo_fast.rewards.language import LanguageConsistency
    from grpo_fast.rewards.marks import DROP, callable_name, is_async
    from grpo_fast.rewards.math.accuracy import Accuracy, accuracy
    from grpo_fast.rewards.pooled import in_pool
    from grpo_fast.rewards.reasoning import ReasoningSteps
    from grpo_fast.rewards.registry import make_reward
    from grpo_fast.rewards.shaping import CosineLength, GroupLength, RepetitionPenalty, SoftOverlong
    from grpo_fast.rewards.sources import RewardFunc, Rewards, check_rewards, make_rewards
    from grpo_fast.rewards.steps import StepScorer, process_reward

_MODULES = {
    "Accuracy": "math.accuracy",
    "Code": "code",
    "CosineLength": "shaping",
    "DROP": "marks",
    "Format": "format",
    "GroupLength": "shaping",
    "Judge": "judge",
    "LanguageConsistency": "language",
    "ModelReward": "classifier",
    "MultipleChoice": "choice",
    "ReasoningSteps": "reasoning",
    "RepetitionPenalty": "shaping",
    "RewardCall": "calling",
    "RewardFunc": "sources",
    "Rewards": "sources",
    "SoftOverlong": "shaping",
    "StepScorer": "steps",
    "TagCount": "format",
    "accuracy": "math.accuracy",
    "callable_name": "marks",
    "check_rewards": "sources",
    "gate": "compose",
    "in_pool": "pooled",
    "is_async": "marks",
    "make_reward": "registry",
    "make_rewards": "sources",
    "process_reward": "steps",
    "route": "compose",
    "weighted": "compose",
}

__all__ = [
    "DROP",
    "Accuracy",
    "Code",
    "CosineLength",
    "Format",
    "GroupLength",
    "Judge",
    "LanguageConsistency",
    "ModelReward",
    "MultipleChoice",
    "ReasoningSteps",
    "RepetitionPenalty",
    "RewardCall",
    "RewardFunc",
    "Rewards",
    "SoftOverlong",
    "StepScorer",
    "TagCount",
    "accuracy",
    "callable_name",
    "check_rewards",
    "gate",
    "in_pool",
    "is_async",
    "make_reward",
    "make_rewards",
    "process_reward",
    "route",
    "weighted",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'grpo_fast.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"grpo_fast.rewards.{_MODULES[name]}"), name)
