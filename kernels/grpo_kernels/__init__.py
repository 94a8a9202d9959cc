"""The LM head, the policy loss and the optimizer step of GRPO: exact, without the logits."""

from grpo_kernels import reference
from grpo_kernels.adamw import adamw_step
from grpo_kernels.linear_logps import linear_logps
from grpo_kernels.linear_loss import linear_loss
from grpo_kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from grpo_kernels.normalisers import entropy_quantile, row_weights
from grpo_kernels.policy_loss import PolicyLoss, PolicyTotals, policy_loss

__all__ = [
    "LinearPolicyLoss",
    "PolicyLoss",
    "PolicyTotals",
    "adamw_step",
    "entropy_quantile",
    "linear_logps",
    "linear_loss",
    "linear_policy_loss",
    "policy_loss",
    "reference",
    "row_weights",
]
