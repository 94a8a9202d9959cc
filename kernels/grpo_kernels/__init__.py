"""The LM head and the policy loss of a GRPO step, exact and without the logits."""

from grpo_kernels import reference
from grpo_kernels.linear_logps import linear_logps
from grpo_kernels.policy_loss import PolicyLoss, policy_loss

__all__ = ["PolicyLoss", "linear_logps", "policy_loss", "reference"]
