"""The parts of the LM head's sweep, each alone: products by cuBLAS, the passes between them, the fused kernel.

Answers which candidate of `grpo_kernels.launch` makes the tiles, and how many rows a block should have. One line a
measurement: operations of a product are 2 * R * D * V, bytes of a pass are what its launcher says it moves.
Shapes: R rows of a block, D hidden width, V vocabulary, C columns of a tile.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROWS = (1024, 2048, 2816, 4096)
DEPTHS = (4096, 2048, 1536)
VOCAB = 151936
COLUMNS = (4096, 8192)
# rows of a block in the passes and the fused kernel
BLOCK_ROWS = 2048
# the fused kernel must reach this rate to beat the product and its pass on an H200, by D
BREAK_EVEN = {4096: 665, 2048: 597, 1536: 559}


@dataclass(frozen=True)
class Line:
    """One measurement: `amount` is operations for "TFLOP/s" and bytes for "GB/s"."""

    what: str
    R: int
    D: int
    V: int
    C: int
    ms: float
    amount: float
    unit: str

    @property
    def rate(self) -> float:
        """`amount` a second, in `unit`."""
        return self.amount / (self.ms / 1000) / (1e12 if self.unit == "TFLOP/s" else 1e9)

    def __str__(self) -> str:
        return (
            f"{self.what:36} R={self.R:<5} D={self.D:<5} V={self.V:<7} C={self.C:<6} "
            f"{self.ms:9.3f} ms {self.rate:9.4g} {self.unit}"
        )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how the parts are timed; `dtype` is that of the operands."""

    device: torch.device
    dtype: torch.dtype
    V: int
    repeats: int

    def ms(self, step: Callable[[], object]) -> float:
        """Median milliseconds of `step`, after two that are not counted."""
        step()
        step()
        return median(self._once(step) for _ in range(self.repeats))

    def _once(self, step: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            step()
            return (time.perf_counter() - started) * 1000
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        step()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values times `scale`."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype).mul_(scale)

    def tiles(self, C: int) -> list[slice]:
        """The vocabulary in tiles of `C` columns."""
        return [slice(start, min(start + C, self.V)) for start in range(0, self.V, C)]

    @property
    def wide(self) -> dict[str, Any]:
        """What makes a product of half operands return fp32; the CPU has no such product."""
        return {"out_dtype": torch.float32} if self.device.type == "cuda" and self.dtype.itemsize == 2 else {}


def products(bench: Bench, R: int, D: int, columns: tuple[int, ...]) -> Iterator[Line]:
    """The three products of a block: logits tile by tile in both result dtypes, dH, and dW added into fp32."""
    V, operations = bench.V, 2.0 * R * D * bench.V
    hidden, weight = bench.randn(R, D), bench.randn(V, D, scale=D**-0.5)
    for C in columns:
        narrow = torch.empty(R, C, dtype=bench.dtype, device=bench.device)
        wide = torch.empty(R, C, dtype=torch.float32, device=bench.device)
        for name, buffer, how in (("operands'", narrow, {}), ("fp32", wide, bench.wide)):
            # fp32 operands have one result dtype
            out = buffer if how or buffer.dtype == bench.dtype else narrow

            def logits(out: Tensor = out, how: dict[str, Any] = how, C: int = C) -> None:
                for tile in bench.tiles(C):
                    size = tile.stop - tile.start
                    torch.mm(hidden, weight[tile].t(), out=_first_columns(out, size), **how)

            yield Line(f"logits, {name} dtype out", R, D, V, C, bench.ms(logits), operations, "TFLOP/s")
    exps = bench.randn(R, V)
    ms = bench.ms(lambda: torch.mm(exps, weight, **bench.wide))
    yield Line("dH, one product over V, fp32 out", R, D, V, V, ms, operations, "TFLOP/s")
    dweight = torch.zeros(V, D, dtype=torch.float32, device=bench.device)
    # beta 1: reads and writes the sum
    if bench.wide:
        ms = bench.ms(lambda: torch.addmm(dweight, exps.t(), hidden, out=dweight, **bench.wide))
    else:
        ms = bench.ms(lambda: dweight.addmm_(exps.t().float(), hidden.float()))
    yield Line("dW += , fp32", R, D, V, V, ms, operations, "TFLOP/s")


def _first_columns(buffer: Tensor, columns: int) -> Tensor:
    R = buffer.shape[0]
    return buffer.view(-1)[: R * columns].view(R, columns)


def _vectors(bench: Bench, R: int, *, with_entropy: bool) -> dict[str, Any]:
    def zeros() -> Tensor:
        return torch.zeros(R, device=bench.device)

    return {
        "targets_R": torch.randint(bench.V, (R,), device=bench.device),
        "inv_temperature_R": zeros() + 1,
        "offset_R": zeros(),
        "S_R": zeros(),
        "U_R": zeros() if with_entropy else None,
    }


def passes(bench: Bench, R: int, D: int, columns: tuple[int, ...]) -> Iterator[Line]:
    """`exp_tile_` on a tile that a product has just written (L2) and on tiles from memory, and the row kernels."""
    from grpo_kernels.row_kernels import finish_hidden, scale_rows, target_logits
    from grpo_kernels.tile_kernels import exp_tile_

    V = bench.V
    kept = torch.empty(R, V, dtype=bench.dtype, device=bench.device)
    for C in columns:
        # 8 tiles of 32 MB exceed any L2
        for where, num_tiles in (("one tile", 1), ("tiles from memory", 8)):
            buffers = [bench.randn(R, C, dtype=torch.float32) for _ in range(num_tiles)]
            for out, with_entropy in ((kept, True), (None, True), (kept, False)):
                vectors = _vectors(bench, R, with_entropy=with_entropy)

                def sweep(
                    C: int = C,
                    buffers: list[Tensor] = buffers,
                    out: Tensor | None = out,
                    vectors: dict[str, Any] = vectors,
                ) -> None:
                    for index, tile in enumerate(bench.tiles(C)):
                        exp_tile_(
                            _first_columns(buffers[index % len(buffers)], tile.stop - tile.start),
                            bias_C=None,
                            column_start=tile.start,
                            logit_scale=1.0,
                            softcap=None,
                            kept_RC=None if out is None else out[:, tile],
                            **vectors,
                        )

                moved = R * V * (4.0 + (0 if out is None else out.element_size()))
                name = f"exp_tile_{'' if out is None else ' kept'}{' entropy' if with_entropy else ''}, {where}"
                yield Line(name, R, D, V, C, bench.ms(sweep), moved, "GB/s")
    hidden, weight = bench.randn(R, D), bench.randn(V, D)
    targets = torch.randint(V, (R,), device=bench.device)
    ones, sums = torch.ones(R, device=bench.device), bench.randn(R, D, dtype=torch.float32)
    head: dict[str, Any] = {
        "bias_V": None,
        "inv_temperature_N": ones,
        "logit_scale": 1.0,
        "softcap": None,
        "operand": bench.dtype,
    }
    ms = bench.ms(lambda: target_logits(hidden, weight, targets, **head))
    size = hidden.element_size()
    yield Line("target_logits", R, D, V, 0, ms, 2.0 * R * D * size, "GB/s")
    ms = bench.ms(lambda: scale_rows(hidden, ones, operand=bench.dtype, dtype=bench.dtype))
    yield Line("scale_rows", R, D, V, 0, ms, 2.0 * R * D * size, "GB/s")
    rows: dict[str, Any] = {
        "weight_VD": weight,
        "targets_R": targets,
        "scale_R": ones,
        "at_target_R": ones,
        "operand": bench.dtype,
    }
    ms = bench.ms(lambda: finish_hidden(sums, out_RD=hidden, **rows))
    yield Line("finish_hidden", R, D, V, 0, ms, R * D * (4.0 + 2 * size), "GB/s")


def fused(bench: Bench, R: int, D: int, columns: tuple[int, ...]) -> Iterator[Line]:
    """`fused_exp_tile_` in every configuration of the architecture, scoring and keeping; then product and pass."""
    from grpo_kernels.fused_head import fused_exp_tile_
    from grpo_kernels.launch import FUSED, INTERPRETED, RIVALS, FusedTile, FusedTiles, architecture
    from grpo_kernels.tile_kernels import exp_tile_

    blocks: tuple[FusedTile, ...] = (INTERPRETED,)
    if bench.device.type == "cuda":
        arch = architecture(torch.cuda.get_device_capability(bench.device))
        blocks = (FUSED[arch].plain, *RIVALS[arch])
    V, operations = bench.V, 2.0 * R * D * bench.V
    hidden, weight = bench.randn(R, D), bench.randn(V, D, scale=D**-0.5)
    kept = torch.empty(R, V, dtype=bench.dtype, device=bench.device)
    vectors = _vectors(bench, R, with_entropy=True)
    head: dict[str, Any] = {"bias_C": None, "logit_scale": 1.0, "softcap": None, **vectors}
    for C in columns:
        buffer = torch.empty(R, C, dtype=torch.float32, device=bench.device)
        for out in (None, kept):
            what = "scoring" if out is None else "keeping"
            for config in (None, *blocks):

                def sweep(
                    C: int = C, buffer: Tensor = buffer, out: Tensor | None = out, config: FusedTile | None = config
                ) -> None:
                    for tile in bench.tiles(C):
                        place: dict[str, Any] = {
                            "column_start": tile.start,
                            "kept_RC": None if out is None else out[:, tile],
                        }
                        if config is None:
                            products = _first_columns(buffer, tile.stop - tile.start)
                            torch.mm(hidden, weight[tile].t(), out=products, **bench.wide)
                            exp_tile_(products, **head, **place)
                        else:
                            tiles = FusedTiles(plain=config, capped=config)
                            fused_exp_tile_(hidden, weight[tile], **head, **place, config=tiles)

                name = f"{what}: {'product + exp_tile_' if config is None else _name(asdict(config))}"
                try:
                    yield Line(name, R, D, V, C, bench.ms(sweep), operations, "TFLOP/s")
                except RuntimeError as error:
                    # a rival may need more shared memory or registers than this chip has
                    print(f"{name}: {str(error).splitlines()[0]}", flush=True)


def _name(blocks: dict[str, object]) -> str:
    short = "{rows}x{columns}x{depth} w{num_warps} s{num_stages}".format(**blocks)
    return f"F {short}{' persistent' if blocks['is_persistent'] else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("products", "passes", "fused"), nargs="+")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="of a block; default: several for products, else 2048")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="hidden widths")
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS, help="of a tile")
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON of the lines")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and args.part != ["products"]:
        # before the first import of triton
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # bf16 products are wrong in Triton's interpreter
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(device=device, dtype=dtype, V=args.vocab, repeats=args.repeats)
    parts = {"products": products, "passes": passes, "fused": fused}
    lines = []
    for part in args.part:
        for D in args.depths:
            for R in args.rows or (ROWS if part == "products" else (BLOCK_ROWS,)):
                for line in parts[part](bench, R, D, tuple(args.columns)):
                    lines.append(line)
                    print(line, flush=True)
            if part == "fused" and D in BREAK_EVEN:
                print(f"break-even of the fused kernel at D={D} on an H200, by model: {BREAK_EVEN[D]} TFLOP/s")
    if args.out:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        args.out.parent.mkdir(parents=True, exist_ok=True)
        raw = [asdict(line) | {"rate": line.rate} for line in lines]
        args.out.write_text(json.dumps({"device": name, "lines": raw}, indent=1) + "\n")


if __name__ == "__main__":
    main()
