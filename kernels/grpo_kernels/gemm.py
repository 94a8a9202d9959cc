"""Tile products whose half-precision operands are multiplied exactly and summed in fp32.

CUDA multiplies half operands and returns fp32. The CPU has no such product: there the operands are widened to fp32,
and oneDNN may multiply bf16 values by bf16 instructions with fp32 sums (it does with AMX, and in fp32 elsewhere).
fp32 products on a CPU are oneDNN's where torch has it: torch's own choice, MKL, is half as fast on AMD processors.
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

# oneDNN sums in sequence: pieces of this length keep a logit's error below that of MKL's blocked sums
PIECE = 128

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
    """`a @ b` of widened operands in fp32 (float64 for float64), in `out`'s memory where the product allows it.

    `operand` is the dtype the values were rounded to before they were widened. Each row of the result is independent
    of the other rows.
    """
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
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
        return out[:rows]
    if a.dtype == torch.float64:
        return torch.mm(a, b, out=out)[:rows]
    total = _mm_fp32(a[:, :PIECE], b[:PIECE])
    for start in range(PIECE, a.shape[1], PIECE):
        total += _mm_fp32(a[:, start : start + PIECE], b[start : start + PIECE])
    return total[:rows]


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of fp32 operands on a CPU."""
    if not torch.backends.mkldnn.is_available():
        return torch.mm(a, b)
    # oneDNN takes a thousand times longer where neither the weight nor its transpose is dense
    weight = b.t() if b.is_contiguous() or b.t().is_contiguous() else b.t().contiguous()
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), weight, None, "none", [], "")


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, summed in fp32 (float64 for float64); on CPU a half-precision product is rounded once."""
    if a.device.type == "cuda" and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.device.type == "cpu" and a.dtype == torch.float32:
        total += _mm_fp32(a, b)
    elif a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def add_rows_(total: Tensor, index: Tensor, values: Tensor) -> None:
    """`total[index] += values` in a fixed order, rows that occur several times included."""
    if total.device.type == "cpu":
        total.index_add_(0, index, values)
    else:
        # sorts the index first; `index_add_` would add with atomics there
        total.index_put_((index,), values, accumulate=True)
