"""Which of the two candidates makes a head's tiles on a GPU, and the blocks of the fused one.

The candidates: "tile", a cuBLAS product followed by `tile_kernels.exp_tile_`, and "fused", the kernel of `fused_head`.
A table's entry must not differ between calls that score and calls that train the same weights: the log-probs of both
are then bitwise equal, and their ratio is exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Candidate = Literal["tile", "fused"]

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class FusedTile:
    """The blocks of one fused product.

    Attributes:
        rows: Rows of a program's tile.
        columns: Columns of it.
        depth: Hidden elements of one step along the product.
        num_warps: Warps of a program.
        num_stages: Steps that are loaded ahead.
        has_descriptors: Load and store by descriptors (TMA) where the tensors' alignment allows it, else by pointers.
        is_persistent: One program an SM walks over tiles and loads the next while it finishes one.
        group: Row tiles that are swept together over the columns, so that a weight tile is read from L2.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    has_descriptors: bool = True
    is_persistent: bool = False
    group: int = 8


@dataclass(frozen=True)
class FusedTiles:
    """The fused candidate's blocks on one architecture: with a soft cap the epilogue needs more registers."""

    plain: FusedTile
    capped: FusedTile


@dataclass(frozen=True)
class Launch:
    """What makes a head's tiles, and how."""

    candidate: Candidate
    fused: FusedTiles


# By `python -m grpo_kernels.offline` with Triton 3.9 and 3.6 none of these spills, with or without bias, entropy and
# kept exponentials. A 128 x 256 tile takes half of all registers for its sums: that leaves too few for the soft cap's
# slope, and on sm_100 too few for an entropy or a bias.
FUSED = {
    80: FusedTiles(
        # 128 x 256 x 32 fits with Triton 3.9, and spills an entropy's sums with 3.6
        plain=FusedTile(128, 128, 64, num_warps=8, num_stages=3, has_descriptors=False),
        # 178 to 255 registers, 1 program an SM
        capped=FusedTile(128, 128, 64, num_warps=8, num_stages=3, has_descriptors=False),
    ),
    90: FusedTiles(
        # 210 to 255 registers, 1 program
        plain=FusedTile(128, 256, 64, num_warps=8, num_stages=3),
        # 103 to 210 registers, 2 programs if nothing is kept and there is no bias, else 1
        capped=FusedTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
    100: FusedTiles(
        # 99 to 156 registers, 2 programs but for most variants with an entropy
        plain=FusedTile(128, 128, 64, num_warps=8, num_stages=3),
        # 149 to 198 registers, 1 program
        capped=FusedTile(128, 128, 64, num_warps=8, num_stages=3),
    ),
}

# small, so that tests cross every border
INTERPRETED = FusedTile(16, 32, 16, num_warps=4, num_stages=1)

# what a measurement compares besides `FUSED`; `python -m grpo_kernels.offline --full` says which of them spill
RIVALS = {
    80: (
        FusedTile(128, 256, 32, num_warps=8, num_stages=4, has_descriptors=False),
        FusedTile(128, 128, 32, num_warps=4, num_stages=4, has_descriptors=False),
        FusedTile(128, 256, 64, num_warps=8, num_stages=3, has_descriptors=False),
    ),
    90: (
        FusedTile(128, 256, 64, num_warps=8, num_stages=3, is_persistent=True),
        FusedTile(128, 256, 64, num_warps=8, num_stages=4),
        FusedTile(128, 128, 64, num_warps=4, num_stages=3),
        FusedTile(128, 128, 64, num_warps=4, num_stages=4, is_persistent=True),
    ),
    100: (
        FusedTile(128, 256, 64, num_warps=8, num_stages=3),
        FusedTile(128, 128, 64, num_warps=4, num_stages=4),
    ),
}

# upper ends of the classes of D; by arithmetic, nothing measured, "fused" wins on an H200 above 559, 597 and 665
# TFLOP/s at D = 1536, 2048 and 4096
D_CLASSES = {"narrow": 1792, "middle": 3072, "wide": 1 << 30}

# "tile" until both are measured
CANDIDATES: dict[tuple[int, str], Candidate] = {(arch, d_class): "tile" for arch in ARCHS for d_class in D_CLASSES}


def architecture(device_capability: tuple[int, int]) -> int:
    """The member of `ARCHS` whose instructions a device has: Hopper, data-center Blackwell, or the common ground."""
    major, _ = device_capability
    return {9: 90, 10: 100}.get(major, 80)


def choose(device_capability: tuple[int, int] | None, D: int, *, candidate: str | None = None) -> Launch:
    """The launch for a head of width D; the same whether exponentials are kept or not.

    Args:
        device_capability: (major, minor) of the GPU; None means the interpreter.
        D: Hidden width.
        candidate: Takes this candidate whatever the table says.

    Raises:
        ValueError: If `candidate` is unknown.
    """
    forced: dict[str | None, Candidate | None] = {None: None, "tile": "tile", "fused": "fused"}
    if candidate not in forced:
        raise ValueError(f"candidate must be 'tile', 'fused' or None, got {candidate!r}")
    if device_capability is None:
        return Launch(candidate=forced[candidate] or "tile", fused=FusedTiles(plain=INTERPRETED, capped=INTERPRETED))
    arch = architecture(device_capability)
    d_class = next(name for name, end in D_CLASSES.items() if end > D)
    return Launch(candidate=forced[candidate] or CANDIDATES[arch, d_class], fused=FUSED[arch])
