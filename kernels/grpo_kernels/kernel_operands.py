"""The same tiles as `operands`, made by the Triton kernels.

A tile's logits come from one product and one pass over it, or from one kernel that does both; `launch` decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels.fused_head import fused_exp_tile_
from grpo_kernels.head import Head, Slopes
from grpo_kernels.kept_kernels import entropy_coefficients_, rescale_
from grpo_kernels.launch import choose
from grpo_kernels.operands import Block, KeptCoefficients, Operands
from grpo_kernels.row_kernels import finish_hidden, scale_rows, target_logits
from grpo_kernels.tile_kernels import coefficient_tile_, exp_tile_
from grpo_kernels.tiles import Kept, Plan


class KernelOperands(Operands):
    """Operands whose tiles are made by kernels."""

    def __init__(
        self,
        head: Head,
        plan: Plan,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        candidate: str | None = None,
    ) -> None:
        super().__init__(head, plan, hidden, weight, bias)
        if hidden.is_cuda and head.operand == torch.float32:
            if candidate == "fused":
                raise ValueError("candidate='fused' needs bfloat16 or float16 operands on CUDA, got float32")
            candidate = "tile"
        capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else None
        self.launch = choose(capability, hidden.shape[1], candidate=candidate)
        if isinstance(head.temperature, Tensor):
            self.inv_temperature = head.temperature.reciprocal()
        else:
            self.inv_temperature = torch.full((plan.N,), 1.0 / head.temperature, device=hidden.device)

    def anchors(self, targets: Tensor) -> Tensor:
        """[N] the targets' logits."""
        return target_logits(
            self.hidden,
            self.weight,
            targets,
            bias_V=self.bias,
            inv_temperature_N=self.inv_temperature,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            operand=self.head.operand,
        )

    def fold(self, block: Block, rows: slice, columns: slice, wide_tile: Tensor, out: Tensor | None) -> None:
        """Add a tile to its rows' sums; with `out` [rows, columns] also write its coefficients, 0 at the targets."""
        sums = block.sums.at(rows)
        hidden = block.hidden[rows]
        arguments = {
            **self._tile_arguments(block, rows, columns),
            "offset_R": sums.offset,
            "S_R": sums.S,
            "U_R": sums.U,
            "kept_RC": out,
        }
        if self.launch.candidate == "fused":
            weight = wide_tile.to(self.head.operand).contiguous()
            fused_exp_tile_(hidden, weight, **arguments, config=self.launch.fused)
        else:
            exp_tile_(self.products(hidden, wide_tile), **arguments, kept_dtype=self.narrow)

    def coefficients(self, block: Block, rows: slice, columns: slice, wide_tile: Tensor, slopes: Slopes) -> Tensor:
        """[rows, columns] coefficients computed once more from the logits, 0 at the targets, in the narrow dtype."""
        products, own = self.products(block.hidden[rows], wide_tile), slopes.at(rows)
        out = torch.empty(products.shape, dtype=self.narrow, device=products.device)
        coefficient_tile_(
            products,
            out,
            **self._tile_arguments(block, rows, columns),
            offset_R=block.sums.offset[rows],
            constant_R=own.constant,
            at_entropy_R=own.at_entropy,
        )
        return out

    def kept_coefficients(self, kept: Kept, block: Block, slopes: Slopes) -> KeptCoefficients:
        """The block's kept exponentials, turned into coefficients in place."""
        return _InPlaceCoefficients(kept, block, slopes, dtype=self.narrow)

    def scaled(self, block: Block, rows: slice, slopes: Slopes) -> Tensor:
        """[rows, D] hidden states times the rows' scale, in the narrow dtype."""
        return scale_rows(block.hidden[rows], slopes.scale[rows], operand=self.head.operand, dtype=self.narrow)

    def finish_hidden(self, total: Tensor, block: Block, slopes: Slopes, out: Tensor) -> None:
        """From a block's sum of products to its hidden gradient: the targets' terms, the scale, `out`'s dtype."""
        finish_hidden(
            total,
            weight_VD=self.weight,
            targets_R=block.targets,
            scale_R=slopes.scale,
            at_target_R=slopes.at_target,
            operand=self.head.operand,
            out_RD=out,
        )

    def _tile_arguments(self, block: Block, rows: slice, columns: slice) -> dict[str, Any]:
        start = block.rows.start
        return {
            "bias_C": None if self.bias is None else self.bias[columns].to(self.head.operand),
            "targets_R": block.targets[rows],
            "column_start": columns.start,
            "inv_temperature_R": self.inv_temperature[start + rows.start : start + rows.stop],
            "logit_scale": self.head.logit_scale,
            "softcap": self.head.softcap,
        }


class _InPlaceCoefficients(KeptCoefficients):
    """Rescales the rows whose offset moved and applies an entropy's slope in the kept exponentials' own memory."""

    def __init__(self, kept: Kept, block: Block, slopes: Slopes, *, dtype: torch.dtype) -> None:
        self.kept, self.dtype = kept, dtype
        values = kept.tile(slice(0, block.size), slice(0, kept.plan.V))
        offsets = kept.offsets[:, : block.size]
        rescale_(values, offsets_TR=offsets, offset_R=block.sums.offset, columns=kept.plan.columns)
        # a second backward pass finds them rescaled
        offsets.copy_(block.sums.offset.expand_as(offsets))
        if slopes.constant is not None and slopes.at_entropy is not None:
            entropy_coefficients_(values, constant_R=slopes.constant, at_entropy_R=slopes.at_entropy)

    def tile(self, rows: slice, columns: slice, tile: int) -> Tensor:
        """[rows, columns] coefficients in the narrow dtype, 0 at the targets."""
        return self.kept.tile(rows, columns).to(self.dtype)
