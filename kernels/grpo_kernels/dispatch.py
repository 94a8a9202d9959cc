"""Which implementation an op runs."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from grpo_kernels.head import Head
from grpo_kernels.operands import Operands
from grpo_kernels.tiles import Plan

IMPLS = ("auto", "triton", "torch", "reference")

logger = logging.getLogger(__name__)


def choose_impl(impl: str, *, operand: torch.dtype, device: torch.device, candidate: str | None = None) -> str:
    """Resolve "auto", and refuse what cannot run here.

    Raises:
        ValueError: If `impl` is unknown, or is "triton" without Triton, for float64, or on a CPU that does not
            interpret it; if `candidate` is given and something else than Triton runs.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    chosen = _automatic(operand, device) if impl == "auto" else impl
    if candidate is not None and chosen != "triton":
        raise ValueError(f"candidate is read by impl='triton' only, but candidate={candidate!r} came with {chosen!r}")
    if chosen == "triton":
        if not has_triton():
            raise ValueError("impl='triton' needs the package triton, which is not installed")
        if operand == torch.float64:
            raise ValueError("impl='triton' needs float32, bfloat16 or float16 operands, got float64")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"impl='triton' needs a CUDA device, or TRITON_INTERPRET=1 on a CPU, got {device}")
    return chosen


def _automatic(operand: torch.dtype, device: torch.device) -> str:
    if device.type != "cuda" or operand == torch.float64:
        return "torch"
    if not has_triton():
        _announce_torch()
        return "torch"
    return "triton"


def make_operands(
    impl: str,
    head: Head,
    plan: Plan,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    candidate: str | None = None,
) -> Operands:
    """The operands whose tiles `impl` makes, "triton" or "torch"; `candidate` is `launch.choose`'s."""
    if impl == "torch":
        return Operands(head, plan, hidden, weight, bias)
    from grpo_kernels.kernel_operands import KernelOperands

    return KernelOperands(head, plan, hidden, weight, bias, candidate=candidate)


@contextmanager
def exactly_on(device: torch.device) -> Iterator[None]:
    """Without autocast, and with the tensors' device as the one that kernels are launched on."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        yield


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _announce_torch() -> None:
    logger.warning("grpo_kernels runs torch's operations on CUDA: the package triton is not installed")
