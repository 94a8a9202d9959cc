"""Memory that the C library keeps of freed tensors, given back before a process takes more from the system.

glibc serves tensors below some MiB from its heap, and keeps what they leave behind for later ones of their size. In a
backward pass that fails: the activations that a layer frees lie between small objects that live on, and gradients,
which are larger, do not fit between. The process then holds activations and gradients side by side, though most of
them never live at the same time.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

STATM = "/proc/self/statm"
# gradients that are worth it
MIN_BYTES = 2**26
# parameters of less are not looked at one by one
MIN_TENSOR_BYTES = 2**18
# of all gradients: what a process may grow by before its free pages go back, which takes some ms
SLACK = 1 / 32


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    # other C libraries have none
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Give the heap's free pages back to the system; does nothing where the C library cannot."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _page_bytes() -> int:
    import resource

    return resource.getpagesize()


def resident_bytes() -> int:
    """What the process holds of the machine's memory, on Linux."""
    with open(STATM, "rb") as file:
        return int(file.read().split()[1]) * _page_bytes()


class PeakKeeper:
    """Keeps a process near the most memory that it has needed: where it would grow, its heap is trimmed first.

    Pages that go back cost a fault each when they are used again, so below that mark nothing happens.
    """

    def __init__(self, slack: int) -> None:
        """Begin with the first check.

        Args:
            slack: Bytes by which the process may grow between two trims.
        """
        self.num_trims = 0
        self._slack = slack
        self._mark = 0

    def check(self, expected: int = 0) -> None:
        """Trim the heap if, with `expected` bytes more, the process would hold more than ever after a trim."""
        if resident_bytes() + expected > self._mark:
            trim_heap()
            self.num_trims += 1
            self._mark = max(self._mark, resident_bytes() + expected + self._slack)


@contextmanager
def kept_peak(model: nn.Module, layers: Iterable[nn.Module], head: nn.Module) -> Iterator[PeakKeeper | None]:
    """Within, look at the process's memory at each layer and each large gradient of a training step on a CPU.

    A look takes some 10 us. Passes without gradients are not looked at, such as those of a reference model that was
    copied from `model`.

    Args:
        model: Gradients of its trainable parameters are looked at as they appear.
        layers: Parts of `model` that run one after the other.
        head: Runs last, and makes its weight's gradient as it runs.

    Yields:
        What looks; None, without any hook, for small gradients or where the heap cannot be trimmed.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.nbytes >= MIN_TENSOR_BYTES]
    total = sum(parameter.nbytes for parameter in trained)
    if total < MIN_BYTES or _malloc_trim() is None or not os.path.exists(STATM):
        yield None
        return
    keeper = PeakKeeper(int(total * SLACK))
    with ExitStack() as hooks:
        for parameter in trained:
            hooks.callback(parameter.register_post_accumulate_grad_hook(partial(_at_gradient, keeper)).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(partial(_at_layer, keeper)).remove)
        hooks.callback(head.register_forward_pre_hook(partial(_at_head, keeper)).remove)
        yield keeper


def _at_gradient(keeper: PeakKeeper, parameter: Tensor) -> None:
    keeper.check()


def _at_layer(keeper: PeakKeeper, layer: nn.Module, args: Any) -> None:
    if torch.is_grad_enabled():
        keeper.check()


def _at_head(keeper: PeakKeeper, head: nn.Module, args: Any) -> None:
    if torch.is_grad_enabled():
        keeper.check(sum(p.nbytes for p in head.parameters(recurse=False) if p.requires_grad))
