"""What a kernel module offers the offline compiler: one kernel with everything fixed that changes its machine code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Specimen:
    """One variant of a kernel, compiled without a GPU by `python -m grpo_kernels.offline`.

    Attributes:
        name: The kernel and its variant in one line, unique.
        kernel: The `triton.jit` function.
        signature: The type of every argument in order, as Triton spells it: "*fp32" for a pointer, "i32", "i64",
            "fp32", and "constexpr" for those in `constexprs`.
        constexprs: The values of the flags and block sizes. A pointer that a flag switches off is a constexpr None.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        uses_mma: Whether the machine code must contain a matrix instruction.
        aligned: The arguments that a launch finds divisible by 16: pointers and strides of real tensors.
        chosen: Whether the launch table can pick it, so that the gates hold for it.
        archs: The compute capabilities, 10 * major + minor, it is meant for; None for all.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    uses_mma: bool = False
    aligned: tuple[str, ...] = field(default=())
    chosen: bool = True
    archs: tuple[int, ...] | None = None


def specimen_of(
    name: str,
    kernel: Any,
    *,
    pointers: Mapping[str, str | None],
    constexprs: Mapping[str, Any],
    num_warps: int,
    floats: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    num_stages: int = 1,
) -> Specimen:
    """A specimen whose signature follows from the kernel's parameters, typed as a launch on a real model's tensors.

    `pointers` names the dtype behind each pointer, None for one that is switched off; `floats` are fp32 and `flags`
    i32; the others are i32 lengths and strides. Pointers, lengths and strides are divisible by 16.
    """
    signature: dict[str, str] = {}
    for parameter in inspect.signature(kernel.fn).parameters:
        if parameter in constexprs or (parameter in pointers and pointers[parameter] is None):
            signature[parameter] = "constexpr"
        elif parameter in pointers:
            signature[parameter] = f"*{pointers[parameter]}"
        else:
            signature[parameter] = "fp32" if parameter in floats else "i32"
    return Specimen(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={**{pointer: None for pointer, dtype in pointers.items() if dtype is None}, **constexprs},
        num_warps=num_warps,
        num_stages=num_stages,
        aligned=tuple(n for n, dtype in signature.items() if dtype not in ("fp32", "constexpr") and n not in flags),
    )
