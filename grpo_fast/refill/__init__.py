"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups without a signal make way for others."""

from grpo_fast.refill.groups import check_rows, equal_rewards, in_loss, silent_groups
from grpo_fast.refill.merging import can_merge, replace_rows
from grpo_fast.refill.pooling import Entries
from grpo_fast.refill.prompts import PromptPass

__all__ = [
    "Entries",
    "PromptPass",
    "can_merge",
    "check_rows",
    "equal_rewards",
    "in_loss",
    "replace_rows",
    "silent_groups",
]
