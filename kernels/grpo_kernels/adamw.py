"""One step of AdamW over lists of tensors that writes a second copy of every parameter in the same pass.

A policy that trains in fp32 and generates in bf16 has each weight twice: the parameter and its shadow in the engine.
The step has the parameter at hand when it is done with it, so the shadow costs its own bytes and no pass of its own.

Source: Decoupled Weight Decay Regularization (arXiv:1711.05101), algorithm 2; kernels/README.md, "AdamW with shadows".
Spec: `grpo_kernels.reference.adamw_step`, same signature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels import reference
from grpo_kernels.checks import check_dtype, describe
from grpo_kernels.dispatch import choose_impl, exactly_on

# Elements a thread updates before it copies them, on a CPU: 2 MiB of fp32. On one thread of a Zen 5 (2 x 1 MiB of L2,
# 32 of L3) SmolLM2-135M's step takes 125, 108, 102, 97, 98 and 102 ms with 2^16 to 2^21 elements, torch's fused step
# with copies after it 100. Shorter pieces pay for more calls, longer ones leave the cache.
PIECE = 2**19
# torch's vector loop takes multiples of this many elements, and a scalar loop, which rounds otherwise, takes the rest:
# a piece ends where a whole parameter's vector loop would not
VECTOR = 64


@dataclass(frozen=True)
class AdamWOptions:
    """The numbers of a step; see `adamw_step`.

    Raises:
        ValueError: If one is out of range.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class Update:
    """One parameter with what belongs to it; all but `step` are laid out alike."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    shadow: Tensor | None

    def part(self, start: int, stop: int) -> Update:
        """The same of some elements, counted in the order of the storage: views."""
        if stop - start == self.param.numel():
            return self

        def cut(tensor: Tensor) -> Tensor:
            return tensor.as_strided((stop - start,), (1,), tensor.storage_offset() + start)

        return Update(
            cut(self.param),
            cut(self.grad),
            cut(self.exp_avg),
            cut(self.exp_avg_sq),
            self.step,
            None if self.shadow is None else cut(self.shadow),
        )


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    shadows: Sequence[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Update parameters, moments and steps in place, and set every shadow to its parameter, rounded to its dtype.

    On a CPU parameters and moments are bitwise those of torch's fused AdamW, and a shadow is bitwise
    `param.to(shadow.dtype)` anywhere. The arithmetic is in float32 at least; values are stored in their own dtype.

    Args:
        params: P dense tensors of any shape, of one floating dtype on one device; updated.
        grads: P tensors like `params` in shape, strides, dtype and device; changed by `grad_scale` only.
        exp_avgs: P tensors like `params`, the running mean of the gradient; updated.
        exp_avg_sqs: P tensors like `params`, the running mean of its square; updated.
        steps: P tensors [] float, the steps taken before, each its own; incremented. On any device, with `found_inf` on
            that of `params`.
        lr: Learning rate.
        betas: Decays of the two means.
        eps: Added to the root of the second mean.
        weight_decay: A parameter loses `lr * weight_decay` of itself.
        maximize: Go along the gradient.
        shadows: P tensors like `params` in shape and device, of any floating dtype and strides, or None each. One
            whose strides are not its parameter's is copied after the step, in a pass of its own.
        grad_scale: [] or [1] float32, divides the gradients first, which are left divided; `torch.amp.GradScaler`'s.
        found_inf: [] or [1] float32; 1 leaves everything as it was. The host does not wait for it on an accelerator.
        impl: "triton" (CUDA), "torch", "reference" or "auto": "triton" on CUDA, "torch" elsewhere.

    Raises:
        ValueError: If lists differ in length, a tensor in shape, strides, dtype or device from its parameter, a
            parameter has gaps or another dtype or device than the first, a number is out of range, or `impl` does not
            run here.
    """
    options = AdamWOptions(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    shadows = [None] * len(params) if shadows is None else shadows
    _check_tensors(params, steps, shadows, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if not params:
        return
    device = params[0].device
    _check_scaling(device, steps, grad_scale=grad_scale, found_inf=found_inf)
    chosen = choose_impl(impl, operand=params[0].dtype, device=device)
    if chosen == "reference":
        reference.adamw_step(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            maximize=maximize, shadows=shadows, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        return
    torch._foreach_add_(list(steps), 1)
    updates, copied_after = [], []
    for param, grad, exp_avg, exp_avg_sq, step, shadow in zip(
        params, grads, exp_avgs, exp_avg_sqs, steps, shadows, strict=True
    ):
        if shadow is not None and shadow.stride() != param.stride():
            copied_after.append((shadow, param))
            shadow = None
        if param.numel() > 0:
            updates.append(Update(param, grad, exp_avg, exp_avg_sq, step, shadow))
    with exactly_on(device):
        if chosen == "triton":
            from grpo_kernels.adamw_kernel import launch_adamw

            launch_adamw(updates, options, grad_scale=grad_scale, found_inf=found_inf)
        else:
            _update_by_torch(updates, options, grad_scale=grad_scale, found_inf=found_inf)
    for shadow, param in copied_after:
        shadow.copy_(param)
    if found_inf is not None:
        torch._foreach_sub_(list(steps), [found_inf.reshape(())] * len(steps))


def _update_by_torch(
    updates: Sequence[Update], options: AdamWOptions, *, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The fused step of torch, on a CPU piece by piece: a piece is copied while it is in the cache."""
    if not updates:
        return
    sizes = [update.param.numel() for update in updates]
    device = updates[0].param.device
    room = PIECE * torch.get_num_threads() if device.type == "cpu" else sum(sizes)
    for batch in batches(sizes, room):
        parts = [updates[i].part(start, stop) for i, start, stop in batch]
        torch._fused_adamw_(
            [part.param for part in parts],
            [part.grad for part in parts],
            [part.exp_avg for part in parts],
            [part.exp_avg_sq for part in parts],
            [],
            [part.step.to(device, torch.float32) for part in parts],
            lr=options.lr,
            beta1=options.betas[0],
            beta2=options.betas[1],
            weight_decay=options.weight_decay,
            eps=options.eps,
            amsgrad=False,
            maximize=options.maximize,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        copied = [(part.shadow, part.param) for part in parts if part.shadow is not None]
        if copied:
            torch._foreach_copy_([shadow for shadow, _ in copied], [param for _, param in copied])


def batches(sizes: Sequence[int], room: int) -> Iterator[list[tuple[int, int, int]]]:
    """Ranges `(i, start, stop)` that cover tensors of these sizes in order, in batches of about `room` elements.

    Tensors are cut at multiples of `VECTOR`; a batch exceeds `room` by less than that.
    """
    room = -(-room // VECTOR) * VECTOR
    batch: list[tuple[int, int, int]] = []
    left = room
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + left)
            batch.append((i, start, stop))
            # a ragged end counts as whole, so that the next tensor is cut at a multiple, too
            left -= -(-(stop - start) // VECTOR) * VECTOR
            start = stop
            if left == 0:
                yield batch
                batch, left = [], room
    if batch:
        yield batch


def _check_tensors(
    params: Sequence[Tensor], steps: Sequence[Tensor], shadows: Sequence[Tensor | None], **alike: Sequence[Tensor]
) -> None:
    for name, tensors in {**alike, "steps": steps, "shadows": shadows}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must have as many tensors as params, {len(params)}, got {len(tensors)}")
    for i, param in enumerate(params):
        if i == 0:
            check_dtype(**{"params[0]": param})
        elif param.dtype != params[0].dtype or param.device != params[0].device:
            raise ValueError(
                f"params must have one dtype and device, got params[0] {describe(params[0])} and params[{i}] "
                f"{describe(param)}"
            )
        if not param.is_contiguous() and not _is_dense(param):
            raise ValueError(f"params[{i}] must be dense, got {_layout(param)}")
        kind = (param.shape, param.stride(), param.dtype, param.device)
        for name, tensors in alike.items():
            tensor = tensors[i]
            if (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) != kind:
                raise ValueError(f"{name}[{i}] must be like params[{i}], {_layout(param)}, got {_layout(tensor)}")
        if steps[i].ndim != 0 or not steps[i].is_floating_point():
            raise ValueError(f"steps[{i}] must be [] float, got {describe(steps[i])}")
        shadow = shadows[i]
        if shadow is not None:
            check_shadow(param, shadow, f"shadows[{i}]")


def _layout(tensor: Tensor) -> str:
    return f"{describe(tensor)} with strides {tensor.stride()}"


def check_shadow(param: Tensor, shadow: Tensor, name: str) -> None:
    """Refuse a tensor that cannot hold the parameter's values.

    Raises:
        ValueError: naming it.
    """
    check_dtype(**{name: shadow})
    if shadow.shape != param.shape or shadow.device != param.device:
        raise ValueError(f"{name} must be {list(param.shape)} on {param.device}, got {describe(shadow)}")
    if shadow.requires_grad:
        raise ValueError(f"{name} must not require a gradient")


def _check_scaling(
    device: torch.device, steps: Sequence[Tensor], *, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    for name, tensor in {"grad_scale": grad_scale, "found_inf": found_inf}.items():
        if tensor is not None and (tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device != device):
            raise ValueError(f"{name} must be [] or [1] torch.float32 on {device}, got {describe(tensor)}")
    if found_inf is not None and any(step.device != device for step in steps):
        raise ValueError(f"steps must be on {device} like params where found_inf is given")


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of storage without gaps, in any order of its dimensions."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 == tensor.numel()
