"""Log-probs of the targets, and entropies, of a language-model head whose logits never exist as a whole.

Shapes: N tokens, D hidden width, V vocabulary.
Source: the target-anchored sweep of kernels/README.md; its ideas are credited there.
Spec: `grpo_kernels.reference.linear_logps`, same signature without `workspace_mib` and `impl`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels import reference
from grpo_kernels.checks import check_head, check_positive, operand_dtype
from grpo_kernels.gemm import mm_gradient, mm_wide, widen
from grpo_kernels.head import Head, RowSums, Slopes, put_targets_
from grpo_kernels.tiles import Plan, make_plan, narrow_dtype

IMPLS = ("auto", "torch", "reference")


class _Operands:
    """Hidden states, weight and bias, rounded to the operand dtype one piece at a time."""

    def __init__(self, head: Head, plan: Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.head, self.plan = head, plan
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.buffer = torch.empty(plan.rows * plan.columns, dtype=head.wide, device=hidden.device)

    def block(self, block: slice) -> Tensor:
        """[block, D] rows of the hidden states."""
        return self.hidden[block].to(self.head.operand).contiguous()

    def vocab_tile(self, columns: slice) -> Tensor:
        """[columns, D] rows of the weight."""
        return self.weight[columns].to(self.head.operand)

    def logits(self, hidden: Tensor, wide_tile: Tensor, columns: slice) -> Tensor:
        """A tile of logits from block rows and a widened weight tile; the next call overwrites it."""
        shape = hidden.shape[0], wide_tile.shape[0]
        out = self.buffer[: shape[0] * shape[1]].view(shape)
        products = mm_wide(widen(hidden), wide_tile.t(), out=out, operand=self.head.operand)
        return self.head.logits_(products, self._rounded_bias(columns))

    def anchors(self, targets: Tensor) -> Tensor:
        """[N] the targets' logits."""
        wide = self.head.wide
        anchors = torch.empty(self.plan.N, dtype=wide, device=targets.device)
        for rows in self.plan.row_tiles(slice(0, self.plan.N)):
            hidden, chosen = self.hidden[rows], self.weight[targets[rows]]
            products = hidden.to(self.head.operand).to(wide).mul(chosen.to(self.head.operand)).sum(1)
            anchors[rows] = self.head.logits_(products, self._rounded_bias(targets[rows]))
        return anchors

    def _rounded_bias(self, columns: slice | Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias[columns].to(self.head.operand).to(self.head.wide)


def _forward_sweep(operands: _Operands, targets: Tensor, *, with_entropy: bool) -> tuple[RowSums, Tensor, Tensor]:
    """One pass over the [N, V] plane.

    Returns the rows' sums, the kept exponentials (flat, empty if none are kept; 0 at the targets), and the offsets
    [vocabulary tiles, N] they are relative to.
    """
    plan, wide = operands.plan, operands.head.wide
    sums = RowSums.at(operands.anchors(targets), with_entropy=with_entropy)
    kept = targets.new_empty(plan.N * plan.V if plan.keep else 0, dtype=narrow_dtype(operands.head.operand))
    offsets = targets.new_empty(plan.num_vocab_tiles if plan.keep else 0, plan.N, dtype=wide)
    buffer = torch.empty_like(operands.buffer)
    for block in plan.blocks():
        hidden = operands.block(block)
        for tile, columns in enumerate(plan.vocab_tiles()):
            wide_tile = widen(operands.vocab_tile(columns))
            for rows in plan.row_tiles(block):
                logits = operands.logits(hidden[plan.within(block, rows)], wide_tile, columns)
                exps = buffer[: logits.numel()].view_as(logits)
                sums.add_tile(logits, exps, rows, columns, targets[rows])
                if plan.keep:
                    plan.kept_tile(kept, rows, columns).copy_(exps)
            if plan.keep:
                offsets[tile] = sums.offset
    return sums, kept, offsets


class _Coefficients:
    """Tiles of coefficients for the gradient products: the kept exponentials where they serve, else recomputed."""

    def __init__(
        self, operands: _Operands, targets: Tensor, sums: RowSums, slopes: Slopes, kept: Tensor, offsets: Tensor
    ) -> None:
        self.operands, self.targets, self.sums, self.slopes = operands, targets, sums, slopes
        self.kept, self.offsets = kept, offsets
        # the entropy's gradient needs exponents finer than the kept values' logarithms
        self.is_kept = operands.plan.keep and slopes.at_entropy is None
        # the one wait for the device; offsets move only where a rival is e**30 times likelier than the target
        self.has_moved = self.is_kept and bool((offsets != sums.offset).any())

    def tile(self, hidden: Tensor, wide_tile: Tensor | None, rows: slice, columns: slice, tile: int) -> Tensor:
        """[rows, columns] coefficients, 0 at the targets, in the dtype of the gradient products."""
        head, plan = self.operands.head, self.operands.plan
        if wide_tile is not None:
            logits = self.operands.logits(hidden, wide_tile, columns)
            values = self.slopes.coefficients_(head, logits, self.sums.offset[rows], rows)
            put_targets_(values, self.targets[rows], columns, 0.0)
            return values.to(narrow_dtype(head.operand))
        kept = plan.kept_tile(self.kept, rows, columns)
        if not self.has_moved:
            return kept
        drift = self.offsets[tile, rows] - self.sums.offset[rows]
        return (kept * torch.exp(drift)[:, None]).to(kept.dtype)


class _Gradients:
    """The backward's outputs; one that nobody asked for is None and costs nothing."""

    def __init__(self, operands: _Operands, needs: tuple[bool, ...]) -> None:
        plan, hidden, weight = operands.plan, operands.hidden, operands.weight
        # one block finishes every weight tile at once, rounded once; several add up in the wide dtype
        self.is_one_block = plan.block >= plan.N > 0
        dtype = weight.dtype if self.is_one_block else torch.promote_types(weight.dtype, operands.head.wide)
        allocate = torch.empty if self.is_one_block else torch.zeros
        self.hidden = hidden.new_empty(hidden.shape) if needs[0] else None
        self.weight = allocate(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None
        self.bias = weight.new_zeros(plan.V, dtype=operands.head.wide) if needs[2] else None

    def add_weight_tile(self, columns: slice, dweight: Tensor) -> None:
        assert self.weight is not None
        if self.is_one_block:
            self.weight[columns] = dweight
        else:
            self.weight[columns] += dweight


class _TargetTerms:
    """The targets' own terms of one block: one product a row, added in the wide dtype and never rounded to half."""

    def __init__(self, operands: _Operands, coefficients: _Coefficients, block: slice, hidden: Tensor) -> None:
        slopes, plan = coefficients.slopes, operands.plan
        self.operands, self.hidden = operands, hidden
        self.targets = coefficients.targets[block]
        self.factors = (slopes.scale * slopes.at_target)[block]
        self.order = self.targets.argsort(stable=True)
        edges = torch.arange(0, plan.V + plan.columns, plan.columns, device=self.targets.device)
        self.bounds = torch.searchsorted(self.targets[self.order], edges).tolist()

    def add_to_hidden_(self, dhidden: Tensor) -> None:
        for rows in self.operands.plan.row_tiles(slice(0, dhidden.shape[0])):
            chosen = self.operands.weight[self.targets[rows]].to(self.operands.head.operand)
            dhidden[rows] += self.factors[rows, None] * chosen

    def add_to_weight_(self, dweight: Tensor, tile: int, columns: slice) -> None:
        for few in self.order[self.bounds[tile] : self.bounds[tile + 1]].split(self.operands.plan.rows):
            values = self.factors[few, None] * self.hidden[few]
            dweight.index_put_((self.targets[few] - columns.start,), values, accumulate=True)

    def add_to_bias_(self, dbias: Tensor) -> None:
        dbias.index_put_((self.targets,), self.factors, accumulate=True)


def _backward_sweep(operands: _Operands, coefficients: _Coefficients, needs: tuple[bool, ...]) -> _Gradients:
    """One pass over the plane: every coefficient tile meets the weight tile and the scaled hidden rows."""
    plan, head = operands.plan, operands.head
    wide, narrow = head.wide, narrow_dtype(head.operand)
    gradients = _Gradients(operands, needs)
    for block in plan.blocks():
        hidden, scale = operands.block(block), coefficients.slopes.scale[block, None]
        terms = _TargetTerms(operands, coefficients, block, hidden)
        scaled = (hidden * scale).to(narrow) if needs[1] else None
        dhidden = hidden.new_zeros(hidden.shape, dtype=wide) if needs[0] else None
        for tile, columns in enumerate(plan.vocab_tiles()):
            weight_tile = operands.vocab_tile(columns) if needs[0] or not coefficients.is_kept else None
            wide_tile = None if weight_tile is None or coefficients.is_kept else widen(weight_tile)
            narrow_tile = None if weight_tile is None else weight_tile.to(narrow)
            dweight: Tensor | None = None
            for rows in plan.row_tiles(block):
                local = plan.within(block, rows)
                values = coefficients.tile(hidden[local], wide_tile, rows, columns, tile)
                if dhidden is not None and narrow_tile is not None:
                    dhidden[local] += mm_gradient(values, narrow_tile)
                if scaled is not None:
                    product = mm_gradient(values.t(), scaled[local])
                    dweight = product.to(wide) if dweight is None else dweight.add_(product)
                if gradients.bias is not None:
                    gradients.bias[columns] += torch.mv(values.t().to(wide), scale[local, 0])
            if dweight is not None:
                terms.add_to_weight_(dweight, tile, columns)
                gradients.add_weight_tile(columns, dweight)
        if dhidden is not None and gradients.hidden is not None:
            terms.add_to_hidden_(dhidden.mul_(scale))
            gradients.hidden[block] = dhidden
        if gradients.bias is not None:
            terms.add_to_bias_(gradients.bias)
    return gradients


class _LinearLogps(torch.autograd.Function):
    """Keeps the row sums, and the exponentials where they fit the workspace; else the backward recomputes logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        plan: Plan,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(hidden.device.type, enabled=False):
            operands = _Operands(head, plan, hidden, weight, bias)
            sums, kept, offsets = _forward_sweep(operands, targets, with_entropy=with_entropy)
            entropy = sums.entropy() if with_entropy else None
        ctx.save_for_backward(hidden, weight, bias, targets, sums.anchor, sums.offset, sums.S, entropy, kept, offsets)
        ctx.head, ctx.plan = head, plan
        ctx.set_materialize_grads(False)
        return sums.logps(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogps is None and dentropy is None:
            return (None,) * 7
        hidden, weight, bias, targets, anchor, offset, S, entropy, kept, offsets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            operands = _Operands(ctx.head, ctx.plan, hidden, weight, bias)
            sums = RowSums(anchor=anchor, offset=offset, S=S)
            slopes = Slopes.of(ctx.head, sums, entropy, dlogps, dentropy)
            coefficients = _Coefficients(operands, targets, sums, slopes, kept, offsets)
            gradients = _backward_sweep(operands, coefficients, ctx.needs_input_grad[:3])
        dweight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        dbias = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        return gradients.hidden, dweight, dbias, None, None, None, None


def linear_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    workspace_mib: int = 640,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of each target under `softmax(logits / temperature)`, without ever holding the logits.

    `logits = logit_scale * (hidden @ weight.T + bias)`, then `softcap * tanh(logits / softcap)` if given. Under
    autocast the operands are rounded as `F.linear` would round them. Logits are summed and kept in float32 (float64 for
    float64 operands), never rounded to half precision. Differentiable once, in `hidden_ND`, `weight_VD` and `bias`,
    through both outputs. Half-precision gradients are products of half-precision operands summed in float32.

    Args:
        hidden_ND: [N, D] float, hidden states that predict the targets.
        weight_VD: [V, D] float, the head's weight; like `hidden_ND` in dtype outside autocast.
        targets_N: [N] int64 in [0, V).
        bias: [V] float, the head's bias.
        temperature: Divides the logits last; above 0.
        softcap: Bounds the logits' magnitude before the temperature; above 0.
        logit_scale: Multiplies the products first.
        return_entropy: Also return the entropies.
        workspace_mib: Bound in MiB on what is allocated beyond inputs and outputs, at any N: what a call holds while
            it runs, and what it keeps from forward to backward. Exponentials that fit it are kept, which spares the
            backward's recomputation. A tile is never cut below 64 x 64, whatever the bound.
        impl: "torch" (tiled), "reference" (materialises the logits) or "auto".

    Returns:
        [N] float32 log-probs (float64 for float64 operands), never above 0; with `return_entropy` also the [N]
        entropies of the same softmax, in nat.

    Raises:
        ValueError: If a tensor has the wrong shape, dtype or device, dtypes differ outside autocast, a number is out
            of range, `impl` is unknown, or on CPU a target lies outside the vocabulary.
    """
    if impl not in IMPLS:
        reason = " (triton is not available)" if impl == "triton" else ""
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}{reason}")
    check_head(hidden_ND, weight_VD, targets_N, bias)
    check_positive(temperature=temperature, softcap=softcap, logit_scale=logit_scale, workspace_mib=workspace_mib)
    if impl == "reference":
        return reference.linear_logps(
            hidden_ND,
            weight_VD,
            targets_N,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            return_entropy=return_entropy,
        )
    head = Head(operand_dtype(hidden_ND, weight_VD, bias), temperature, softcap, logit_scale)
    inputs = [hidden_ND, weight_VD] if bias is None else [hidden_ND, weight_VD, bias]
    has_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    N, D = hidden_ND.shape
    plan = make_plan(
        N,
        D,
        weight_VD.shape[0],
        operand=head.operand,
        device=hidden_ND.device,
        # kept exponentials lack the soft cap's slope
        may_keep=has_backward and softcap is None,
        workspace=workspace_mib << 20,
    )
    logps_N, entropy_N = _LinearLogps.apply(hidden_ND, weight_VD, bias, targets_N, head, plan, return_entropy)
    return (logps_N, entropy_N) if return_entropy else logps_N
