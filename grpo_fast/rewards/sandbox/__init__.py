"""A sandbox for programs that a policy writes."""

from grpo_fast.rewards.sandbox.launching import (
    Limits,
    Outcome,
    Report,
    Run,
    SandboxFailed,
    SandboxUnavailable,
    available_backend,
    run_in_sandbox,
)

__all__ = [
    "Limits",
    "Outcome",
    "Report",
    "Run",
    "SandboxFailed",
    "SandboxUnavailable",
    "available_backend",
    "run_in_sandbox",
]
