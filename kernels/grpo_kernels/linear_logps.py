"""Log-probs of the targets, and entropies, of a language-model head whose logits never exist as a whole.

Shapes: N tokens, D hidden width, V vocabulary.
Source: the target-anchored sweep of kernels/README.md; its ideas are credited there.
Spec: `grpo_kernels.reference.linear_logps`, same signature without `workspace_mib` and `impl`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import reference
from grpo_kernels.checks import check_positive
from grpo_kernels.dispatch import choose_impl, exactly_on, make_operands
from grpo_kernels.first_order import first_order
from grpo_kernels.head import Head, RowSums, Slopes
from grpo_kernels.operands import Operands
from grpo_kernels.sweeps import Gradients, forward_sweep, gradient_sweep, weight_sweep
from grpo_kernels.tiles import Kept, Plan, Request, make_plan, narrow_dtype


def _score(
    operands: Operands, targets: Tensor, *, with_entropy: bool, unit: Tensor | None
) -> tuple[RowSums, Kept | None]:
    """All rows' sums; the kept exponentials if the plan keeps them; `unit` [N, D] becomes d log-prob / d hidden."""
    plan, head = operands.plan, operands.head
    sums = RowSums.empty(operands.anchors(targets), with_entropy=with_entropy)
    kept = None
    if plan.keep:
        kept = Kept.empty(plan, dtype=operands.narrow, wide=head.wide, device=targets.device)
    for rows in plan.blocks():
        block = operands.block(rows, targets, sums)
        total = None if unit is None else block.hidden.new_zeros(block.hidden.shape, dtype=head.wide)
        forward_sweep(operands, block, kept=kept, unit=total)
        if total is not None and unit is not None:
            operands.finish_hidden(total, block, Slopes.of_logps(block.head, block.sums), unit[rows])
    return sums, kept


class _LinearLogps(torch.autograd.Function):
    """Keeps the row sums, and what spares the backward a recomputation.

    That is the exponentials where they fit the workspace, or for a frozen head the log-probs' own hidden gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        plan: Plan,
        impl: str,
        candidate: str | None,
        with_entropy: bool,
        has_backward: bool,
    ) -> tuple[Tensor, Tensor | None]:
        is_frozen = has_backward and not any(ctx.needs_input_grad[1:3])
        with exactly_on(hidden.device):
            operands = make_operands(impl, head, plan, hidden, weight, bias, candidate=candidate)
            unit = torch.empty_like(hidden) if is_frozen else None
            sums, kept = _score(operands, targets, with_entropy=with_entropy, unit=unit)
            entropy = sums.entropy() if with_entropy else None
        kept_values, kept_offsets = (None, None) if kept is None else (kept.values, kept.offsets)
        saved = (sums.anchor, sums.offset, sums.S, entropy, unit, kept_values, kept_offsets)
        ctx.save_for_backward(hidden, weight, bias, targets, *saved)
        ctx.head, ctx.plan, ctx.impl, ctx.candidate = head, plan, impl, candidate
        ctx.set_materialize_grads(False)
        return sums.logps(), entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        if dlogps is None and dentropy is None:
            return None, None, None, *nothing
        hidden, weight, bias, targets, anchor, offset, S, entropy, unit, values, offsets = ctx.saved_tensors
        if unit is not None and dentropy is None and dlogps is not None:
            dhidden = torch.empty_like(unit)
            for rows in ctx.plan.row_tiles(slice(0, ctx.plan.N)):
                dhidden[rows] = unit[rows] * dlogps[rows, None]
            return dhidden, None, None, *nothing
        plan = ctx.plan
        with exactly_on(hidden.device):
            operands = make_operands(ctx.impl, ctx.head, plan, hidden, weight, bias, candidate=ctx.candidate)
            sums = RowSums(anchor=anchor, offset=offset, S=S)
            slopes = Slopes.of(ctx.head, sums, entropy, dlogps, dentropy)
            # a second backward through a retained graph wants the exponentials as they are
            kept = None if values is None or dentropy is not None else Kept(plan, values, offsets)
            gradients = Gradients(operands, ctx.needs_input_grad[:3])
            for rows in plan.blocks():
                block = operands.block(rows, targets, sums)
                gradient_sweep(operands, block, slopes.at(rows), gradients, kept=kept)
            if gradients.weight is not None and not plan.sums_weight:
                weight_sweep(operands, operands.all_rows(targets, sums), slopes, gradients)
        dbias = None if gradients.bias is None or bias is None else gradients.bias.to(bias.dtype)
        return gradients.hidden, gradients.finished_weight(weight.dtype), dbias, *nothing


def linear_logps(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    workspace_mib: int = 640,
    impl: str = "auto",
    candidate: str | None = None,
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
        temperature: Divides the logits last; one number above 0, or [N] float, one a token.
        softcap: Bounds the logits' magnitude before the temperature; above 0.
        logit_scale: Multiplies the products first.
        return_entropy: Also return the entropies.
        workspace_mib: Bound in MiB on what is allocated beyond inputs and outputs, at any N: what a call holds while
            it runs, and what it keeps from forward to backward. Exponentials that fit it are kept, which spares the
            backward's recomputation; a frozen head needs none of that and keeps d logp / d hidden instead, [N, D] like
            `hidden_ND`. A tile is never cut below 64 x 64, whatever the bound.
        impl: "triton" (kernels; a CUDA device, or a CPU under TRITON_INTERPRET=1; not for float64), "torch" (tiled),
            "reference" (materialises the logits), or "auto": "triton" on CUDA where it is installed, else "torch".
        candidate: What makes a tile for "triton", "tile" (a product and a pass over it) or "fused" (one kernel); None
            is the launch table's choice.

    Returns:
        [N] float32 log-probs (float64 for float64 operands), never above 0; with `return_entropy` also the [N]
        entropies of the same softmax, in nat.

    Raises:
        ValueError: If a tensor has the wrong shape, dtype or device, dtypes differ outside autocast, a number is out
            of range, `impl` is unknown or cannot run here, or a target lies outside the vocabulary (on an accelerator
            that is looked for only under TRITON_DEBUG=1, since it waits for the device).
    """
    head = Head.of(
        hidden_ND, weight_VD, targets_N, bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    check_positive(workspace_mib=workspace_mib)
    impl = choose_impl(impl, operand=head.operand, device=hidden_ND.device, candidate=candidate)
    if impl == "reference":
        return reference.linear_logps(
            hidden_ND,
            weight_VD,
            targets_N,
            bias=bias,
            temperature=head.temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            return_entropy=return_entropy,
        )
    # kernels read these element by element
    targets_N, bias = targets_N.contiguous(), None if bias is None else bias.contiguous()
    has_backward = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias)
    )
    trains_head = has_backward and (weight_VD.requires_grad or (bias is not None and bias.requires_grad))
    request = Request(
        operand=head.operand,
        device=hidden_ND.device,
        keeps="all" if trains_head else "none",
        casts_weight=weight_VD.dtype != narrow_dtype(head.operand, hidden_ND.device),
        rounds_weight_grad=has_backward and weight_VD.requires_grad and weight_VD.dtype.itemsize < head.wide.itemsize,
        uses_kernels=impl == "triton",
        workspace=workspace_mib << 20,
    )
    N, D = hidden_ND.shape
    plan = make_plan(N, D, weight_VD.shape[0], request)
    logps_N, entropy_N = _LinearLogps.apply(
        hidden_ND, weight_VD, bias, targets_N, head, plan, impl, candidate, return_entropy, has_backward
    )
    return (logps_N, entropy_N) if return_entropy else logps_N
