"""Tile products whose half-precision operands are multiplied exactly and summed in fp32.

CUDA multiplies half operands and returns fp32. The CPU has no such product: there the operands are widened to fp32,
and bf16 values are multiplied by the processor's bf16 instructions with fp32 sums where it has them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)

# below this many rows the CPU's fp32 product takes another summation order, and a row would depend on its company
MIN_ROWS = 16

# the precision setting is the process's: two threads that save and restore it at once would leave it changed
_PRECISION_LOCK = threading.Lock()


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Let fp32 CPU products round their operands to bf16; they still sum in, and return, fp32."""
    with _PRECISION_LOCK:
        setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch's stub omits it
        before = setting.fp32_precision
        setting.fp32_precision = "bf16"
        try:
            yield
        finally:
            setting.fp32_precision = before


def widen(operand: Tensor) -> Tensor:
    """The operand as `mm_wide` wants it on its device: half precision becomes fp32 off CUDA."""
    if operand.dtype in HALF and operand.device.type != "cuda":
        return operand.float()
    return operand


def mm_wide(a: Tensor, b: Tensor, *, out: Tensor, operand: torch.dtype) -> Tensor:
    """`a @ b` of widened operands in fp32 (float64 for float64), in `out`'s memory where the device allows it.

    `operand` is the dtype the values were rounded to before they were widened. Each row of the result is independent
    of the other rows.
    """
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.device.type != "cpu":
        return torch.mm(a, b, out=out)
    rows = a.shape[0]
    if rows < MIN_ROWS:
        a = torch.cat([a, a.new_zeros(MIN_ROWS - rows, a.shape[1])])
        out = out.new_empty(MIN_ROWS, out.shape[1])
    if operand == torch.bfloat16:
        # the operands are bf16 values already, so the instructions' rounding changes nothing
        with _bf16_products():
            torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out=out)
    return out[:rows]


def mm_gradient(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` summed in fp32; returned in fp32 on CUDA, in the operands' dtype elsewhere."""
    if a.dtype in HALF and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
