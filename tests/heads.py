"""Heads whose logits look like a trained model's, and how gradients are compared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# where the kernels run: without a CUDA device, on the CPU by Triton's interpreter
KERNEL_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same leaves on the kernels' device."""
    return {k: v.detach().to(KERNEL_DEVICE).requires_grad_(v.requires_grad) for k, v in tensors.items()}


def make_head(
    N: int,
    V: int,
    D: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    peak: float = 4.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Logits of standard deviation ~3 with a target that stands out in half of the rows, as in a trained model."""
    g = torch.Generator().manual_seed(seed + 31 * N + 7 * V + D)
    weight = torch.randn(V, D, generator=g) * 3 / D**0.5
    targets = torch.randint(V, (N,), generator=g)
    hidden = torch.randn(N, D, generator=g)
    hidden[::2] += peak * F.normalize(weight[targets[::2]], dim=-1)
    inputs = {"hidden_ND": hidden, "weight_VD": weight, "targets_N": targets}
    if bias:
        inputs["bias"] = torch.randn(V, generator=g)
    return {k: v if v.dtype == torch.int64 else v.to(dtype).requires_grad_() for k, v in inputs.items()}


def to_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k: v if v.dtype == torch.int64 else v.detach().double().requires_grad_(v.requires_grad)
        for k, v in inputs.items()
    }


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    # an empty or all-zero gradient must be met exactly
    error = (actual.double() - expected).norm()
    return float(error if error == 0 else error / expected.norm())
