# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""AdamW with shadows in one launch for all tensors of a kind: each element is read once and written once.

Shapes: P tensors, cut into blocks of `BLOCK` elements; a program updates one.
Source: kernels/README.md, "AdamW with shadows".
Spec: `grpo_kernels.reference.adamw_step`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.adamw import AdamWOptions, Update
from grpo_kernels.row_kernels import TRITON_DTYPES
from grpo_kernels.specimen import Specimen, specimen_of

# 8 elements a thread: two 16-byte loads in flight for each of four fp32 tensors
BLOCK = 2048
NUM_WARPS = 8
# bytes: what a thread's loads and stores are wide
ALIGNMENT = 16
# columns of the table
COLUMNS = 7


@triton.jit
def _adamw_kernel(
    # [P, 7] int64: addresses of parameter, gradient, both moments, shadow; number of elements; first program
    table_ptr,
    # [P, 2] fp32: lr / (1 - beta1^t), sqrt(1 - beta2^t)
    corrections_ptr,
    # [programs] int64: whose elements a program updates
    owners_ptr,
    # one fp32 each
    grad_scale_ptr,
    found_inf_ptr,
    # lr * weight_decay
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    DTYPE: tl.constexpr,
    SHADOW_DTYPE: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one `if` would load from a pointer that is not there
    if HAS_FOUND_INF:  # noqa: SIM102
        if tl.load(found_inf_ptr) == 1:
            return
    owner = tl.load(owners_ptr + tl.program_id(0))
    row_ptr = table_ptr + owner * COLUMNS
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE))
    grad_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(DTYPE))
    exp_avg_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(DTYPE))
    exp_avg_sq_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(DTYPE))
    shadow_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(SHADOW_DTYPE))
    num_elements = tl.load(row_ptr + 5)
    if IS_ALIGNED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
        shadow_ptr = tl.multiple_of(shadow_ptr, 16)
        num_elements = tl.multiple_of(num_elements, 16)
    block = tl.program_id(0) - tl.load(row_ptr + 6)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    step_size = tl.load(corrections_ptr + owner * 2)
    root_correction = tl.load(corrections_ptr + owner * 2 + 1)

    # all in fp32
    param = tl.load(param_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_GRAD_SCALE:
        grad = grad / tl.load(grad_scale_ptr)
        tl.store(grad_ptr + offs, grad.to(DTYPE), mask=mask)
    if MAXIMIZE:
        grad = -grad
    # 1 - decay in fp32 would round a small decay away; an infinite parameter without decay stays infinite
    param = tl.where(decay == 0, param, param - param * decay)
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    denominator = tl.sqrt_rn(exp_avg_sq) / root_correction + eps
    param -= step_size * (exp_avg / denominator)

    stored = param.to(DTYPE)
    tl.store(param_ptr + offs, stored, mask=mask)
    tl.store(exp_avg_ptr + offs, exp_avg.to(DTYPE), mask=mask)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq.to(DTYPE), mask=mask)
    if HAS_SHADOW:
        tl.store(shadow_ptr + offs, stored.to(SHADOW_DTYPE), mask=mask)


def launch_adamw(
    updates: Sequence[Update],
    options: AdamWOptions,
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    block: int = BLOCK,
    num_warps: int = NUM_WARPS,
) -> None:
    """One launch for each dtype of shadows, and for tensors whose bytes do not align; steps count this one."""
    kinds: dict[tuple[torch.dtype | None, bool], list[Update]] = defaultdict(list)
    for update in updates:
        kinds[None if update.shadow is None else update.shadow.dtype, _is_aligned(update)].append(update)
    lr, (beta1, beta2) = options.lr, options.betas
    for (shadow_dtype, is_aligned), members in kinds.items():
        device, dtype = members[0].param.device, members[0].param.dtype
        counts = [triton.cdiv(update.param.numel(), block) for update in members]
        programs = sum(counts)
        table = _to_device([_row(u, sum(counts[:i])) for i, u in enumerate(members)], device)
        owners = torch.repeat_interleave(_to_device(counts, device), output_size=programs)
        _adamw_kernel[(programs,)](
            table,
            _corrections([update.step for update in members], options, device),
            owners,
            grad_scale,
            found_inf,
            lr * options.weight_decay,
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            options.eps,
            DTYPE=TRITON_DTYPES[dtype],
            SHADOW_DTYPE=tl.float32 if shadow_dtype is None else TRITON_DTYPES[shadow_dtype],
            HAS_SHADOW=shadow_dtype is not None,
            HAS_GRAD_SCALE=grad_scale is not None,
            HAS_FOUND_INF=found_inf is not None,
            MAXIMIZE=options.maximize,
            IS_ALIGNED=is_aligned,
            COLUMNS=COLUMNS,
            BLOCK=block,
            num_warps=num_warps,
        )


def _tensors(update: Update) -> list[Tensor]:
    tensors = [update.param, update.grad, update.exp_avg, update.exp_avg_sq]
    return tensors if update.shadow is None else [*tensors, update.shadow]


def _is_aligned(update: Update) -> bool:
    return update.param.numel() % ALIGNMENT == 0 and all(t.data_ptr() % ALIGNMENT == 0 for t in _tensors(update))


def _row(update: Update, first_program: int) -> list[int]:
    addresses = [tensor.data_ptr() for tensor in _tensors(update)]
    return [*addresses, *([0] if update.shadow is None else []), update.param.numel(), first_program]


def _to_device(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """int64, copied without waiting for what the device has still to do."""
    is_cuda = device.type == "cuda"
    return torch.tensor(values, dtype=torch.int64, pin_memory=is_cuda).to(device, non_blocking=True)


def _corrections(steps: list[Tensor], options: AdamWOptions, device: torch.device) -> Tensor:
    """[P, 2] fp32, from powers in float64: in fp32 1 - 0.999 is off by 1e-5."""
    counts = torch.stack(steps).to(device, torch.float64)
    step_size = options.lr / (1 - options.betas[0] ** counts)
    root_correction = (1 - options.betas[1] ** counts).sqrt()
    return torch.stack([step_size, root_correction], dim=1).float()


def specimens() -> Iterator[Specimen]:
    """What the offline compiler builds of this file: a plain step, and one that scales and maximises besides."""
    names = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    for dtype, shadow, is_aligned in (
        ("fp32", "bf16", True), ("fp32", "bf16", False), ("fp32", "fp16", True), ("fp32", None, True),
        ("bf16", None, True), ("fp16", None, True), ("bf16", "fp16", True),
    ):  # fmt: skip
        for has_all in (False, True):
            suffix = f"{'' if is_aligned else ' unaligned'}{' with all' if has_all else ''}"
            yield specimen_of(
                f"adamw {dtype} shadow {shadow}{suffix}",
                _adamw_kernel,
                pointers={
                    "table_ptr": "i64",
                    "corrections_ptr": "fp32",
                    "owners_ptr": "i64",
                    "grad_scale_ptr": "fp32" if has_all else None,
                    "found_inf_ptr": "fp32" if has_all else None,
                },
                floats=("decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps"),
                constexprs={
                    "DTYPE": names[dtype],
                    "SHADOW_DTYPE": names[shadow or "fp32"],
                    "HAS_SHADOW": shadow is not None,
                    "HAS_GRAD_SCALE": has_all,
                    "HAS_FOUND_INF": has_all,
                    "MAXIMIZE": has_all,
                    "IS_ALIGNED": is_aligned,
                    "COLUMNS": COLUMNS,
                    "BLOCK": BLOCK,
                },
                num_warps=NUM_WARPS,
            )
