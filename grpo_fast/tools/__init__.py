"""Tools: functions and environments that the model may call, how it calls them, and what comes back."""

from grpo_fast.tools.calls import Reply, run_calls
from grpo_fast.tools.environments import Environments, observed
from grpo_fast.tools.parsing import parse_response
from grpo_fast.tools.toolbox import Toolbox, make_toolbox, warn_experimental

__all__ = [
    "Environments",
    "Reply",
    "Toolbox",
    "make_toolbox",
    "observed",
    "parse_response",
    "run_calls",
    "warn_experimental",
]
