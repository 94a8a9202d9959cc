"""What is fixed before the loss: the weight of a token, and the entropy below which one loses its policy term.

Shapes: B = rows of a micro-batch.
Source: TRL 1.16's normalisers, and its `top_entropy_quantile` (arXiv:2506.01939).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_kernels.checks import check_share
from grpo_kernels.options import LOSS_TYPES

# torch.quantile takes no more values
MAX_QUANTILE = 16_000_000


def row_weights(
    lengths_B: Tensor,
    *,
    loss_type: str,
    accumulation: float,
    num_items_per_process: Tensor | None = None,
    windows: float = 1.0,
    max_completion_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What one token of each row weighs in the loss, so that the loss is the plain sum of weighted tokens.

    "grpo" and "sapo" take the mean of each row, then of the rows; "bnpo" the mean of the micro-batch's tokens;
    "dr_grpo" divides by rows times `max_completion_length`; "luspo" takes the sum of each row and the mean of the rows;
    "dapo", "cispo" and "vespo" divide by the tokens of an optimizer step, averaged over the generation batch.

    Args:
        lengths_B: [B], tokens of each row in the loss; a fully masked row still counts as a row.
        loss_type: One of the eight loss types.
        accumulation: Micro-batches of this optimizer step (1 in evaluation).
        num_items_per_process: "dapo", "cispo" and "vespo" only: 0-dim, tokens in the loss of the whole generation
            batch, at least 1, over the number of processes.
        windows: The same three only: `accumulation` over the micro-batches of a generation batch (1 in evaluation).
        max_completion_length: "dr_grpo" only.
        dtype: Of the weights.

    Returns:
        [B] `dtype`; no weight is infinite or NaN.

    Raises:
        ValueError: If `loss_type` is unknown or what it divides by was not given.
    """
    num_rows = lengths_B.numel()
    ones = torch.ones(num_rows, dtype=dtype, device=lengths_B.device)
    if loss_type in ("grpo", "sapo"):
        return 1 / (lengths_B.clamp(min=1).to(dtype) * num_rows * accumulation)
    if loss_type == "bnpo":
        return ones / (lengths_B.sum().clamp(min=1) * accumulation)
    if loss_type == "luspo":
        return ones / (num_rows * accumulation)
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("max_completion_length is needed by loss_type='dr_grpo', and was not given")
        return ones / (num_rows * max_completion_length * accumulation)
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if num_items_per_process is None:
        raise ValueError(f"num_items_per_process is needed by loss_type={loss_type!r}, and was not given")
    return ones / (num_items_per_process * windows)


def entropy_quantile(entropies: Tensor, top_entropy_quantile: float) -> Tensor:
    """The entropy that a token must reach to be among the `top_entropy_quantile` share with the highest entropies.

    Args:
        entropies: Entropies of all tokens in the loss, any shape; the caller gathers those of other processes.
        top_entropy_quantile: Share of the tokens that keep their policy term, in (0, 1].

    Returns:
        0-dim, like `entropies` in dtype: their quantile, linear between neighbours. Of no entropies plus infinity, of
        any NaN a NaN: both keep no token.

    Raises:
        ValueError: If the share is out of range.
    """
    check_share(top_entropy_quantile=top_entropy_quantile)
    values = entropies.detach().flatten()
    if values.numel() == 0:
        return values.new_full((), math.inf)
    if values.numel() <= MAX_QUANTILE:
        return torch.quantile(values, 1 - top_entropy_quantile)
    return _quantile_by_sorting(values, 1 - top_entropy_quantile)


def _quantile_by_sorting(values: Tensor, quantile: float) -> Tensor:
    ordered = values.sort().values
    position = quantile * (values.numel() - 1)
    below = math.floor(position)
    threshold = torch.lerp(ordered[below], ordered[math.ceil(position)], position - below)
    # NaN sorts last
    return torch.where(ordered[-1].isnan(), ordered[-1], threshold)
