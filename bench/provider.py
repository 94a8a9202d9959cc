"""One way to do a bench's work: ours, a peer's, or the bare products; and why it cannot run here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to do the work.

    Attributes:
        label: Its name on the command line and in tables; ours begin with "ours".
        step: Does the work once on a problem of its bench and returns what is compared with the truth.
        trains: Whether it computes gradients; else it only scores.
        package: What must be importable.
        cuda_only: Whether it runs on CUDA only.
        cpu_only: Whether it runs on a CPU only.
        is_floor: Whether it is the bare products, without softmax, loss or a right answer.
        accumulates: Whether the weight's gradient exists beforehand and is added to.
        asked_on_cpu: On a CPU, where a step takes seconds, it runs only if asked for by its label.
        unavailable: Why it never runs, for a peer that readers will look for; None for all others.
    """

    label: str
    step: Callable[[Any], Any]
    trains: bool = True
    package: str = "grpo_kernels"
    cuda_only: bool = False
    cpu_only: bool = False
    is_floor: bool = False
    accumulates: bool = False
    asked_on_cpu: bool = False
    unavailable: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the project answers for it."""
        return self.label.startswith("ours")


def why_not(
    provider: Provider, *, has_cuda: bool, is_frozen: bool = False, asked: Collection[str] | None = None
) -> str | None:
    """Why this provider does not run here, or None if it does; `asked` are the labels that were asked for, if any."""
    if provider.unavailable is not None:
        return provider.unavailable
    if provider.cuda_only and not has_cuda:
        return "needs CUDA"
    if provider.cpu_only and has_cuda:
        return "runs on a CPU only"
    if provider.accumulates and is_frozen:
        return "a frozen head has no gradient"
    if provider.asked_on_cpu and not has_cuda and asked is None:
        return "on a CPU only with --variant"
    if find_spec(provider.package) is None:
        return f"{provider.package} is not installed"
    if provider.label == "compile" and not has_cuda and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler"
    return None


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64."""
    return float((found.double() - truth).norm() / truth.norm())
