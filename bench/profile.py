"""A profile of one variant of one op: torch's trace with named ranges, the costliest kernels, and ncu's counters.

    python -m bench.profile OP [--shape NAME] [--dtype D] [--data D] [--variant ours] [--out DIR]

The ncu command is printed always, and run where ncu and a CUDA device exist. Open the trace in ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.ops import OPS, Case, Op
from bench.running import OpSteps

ROOT = Path(__file__).resolve().parents[1]
WARMUPS, STEPS, TOP = 2, 3, 15
# shares of the tensor pipe's, the memory's and the L2 cache's peaks, hits in L2, warps that are resident, and the time
METRICS = (
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


@contextmanager
def named_range(name: str, device: torch.device) -> Iterator[None]:
    """A range of this name in torch's trace and, on CUDA, in NVTX, which ncu and Nsight Systems read."""
    # not one that is pushed and popped: that is its thread's, and backward passes run in another
    handle = torch.cuda.nvtx.range_start(name) if device.type == "cuda" else None
    try:
        with record_function(name):
            yield
    finally:
        if handle is not None:
            torch.cuda.nvtx.range_end(handle)


def range_name(op: Op, label: str) -> str:
    """Of a step; ncu's filters give meanings to most signs."""
    return f"{op.name}-{label}".replace("-", "_")


def run_steps(op: Op, case: Case, label: str, device: torch.device, *, steps: int) -> Iterator[int]:
    """Warm up, then yield before each step that is to be profiled, and once after the last."""
    inputs = OpSteps(op, case, [label], device)
    step, before = inputs.steps[label], inputs.before.get(label)
    for done in range(-WARMUPS, steps):
        if before is not None:
            before()
        if done >= 0:
            _synchronize(device)
            yield done
            with named_range(range_name(op, label), device):
                step()
                # kernels still running would fall out of the range
                _synchronize(device)
        else:
            step()
    yield steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trace(op: Op, case: Case, label: str, device: torch.device, out: Path) -> tuple[Path, str]:
    """Write the Chrome trace of some steps, without the warm-up; returns it and the table of the costliest kernels."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    running = run_steps(op, case, label, device, steps=STEPS)
    next(running)
    with profile(activities=activities, record_shapes=True) as found:
        for _ in running:
            pass
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{op.name}-{str(case).replace('/', '-')}-{label}.json"
    found.export_chrome_trace(str(file))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return file, found.key_averages().table(sort_by=order, row_limit=TOP, max_name_column_width=60)


def ncu_command(op: Op, case: Case, label: str, ncu: str = "ncu") -> list[str]:
    """Counters of the kernels of one warm step, a line a kernel."""
    # without a slash behind it the name is of a started and ended range
    options = ["--clock-control", "none", "--nvtx", "--nvtx-include", range_name(op, label)]
    options += ["--metrics", ",".join(METRICS), "--print-summary", "per-kernel"]
    child = [sys.executable, "-m", "bench.profile", op.name, "--shape", case.shape, "--dtype", case.dtype]
    child += ["--data", case.data, "--variant", label, "--bare"]
    return [ncu, *options, *child]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--shape", help="as in pytest bench/ --shape; default: the first of the op's on this device")
    parser.add_argument("--dtype", help="default: that shape's")
    parser.add_argument("--data", help="default: that shape's")
    parser.add_argument("--variant", default="ours", help="default: ours")
    parser.add_argument("--out", type=Path, default=Path("bench/results/profiles"))
    parser.add_argument("--bare", action="store_true", help="run the step once, warm, in its range: what ncu watches")
    args = parser.parse_args(argv)
    op, on_cuda = OPS[args.op], torch.cuda.is_available()
    default = op.cases(on_cuda=on_cuda)[0]
    try:
        args.case = op.case(args.shape or default.shape, args.dtype or default.dtype, args.data or default.data)
    except ValueError as error:
        parser.error(f"--{error}")
    if args.variant not in op.providers:
        parser.error(f"--variant must be one of {', '.join(op.providers)}, got {args.variant}")
    reason = op.why_not(args.variant, on_cuda=on_cuda, asked=[args.variant])
    if reason is not None:
        parser.error(f"--variant {args.variant} cannot run here: {reason}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    op, device = OPS[args.op], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.bare:
        for _ in run_steps(op, args.case, args.variant, device, steps=1):
            pass
        return
    file, kernels = trace(op, args.case, args.variant, device, args.out)
    print(kernels)
    print(f"Trace of {STEPS} steps of {args.variant}, {op.name} {args.case} on {device.type}: {file}")
    ncu = shutil.which("ncu")
    command = ncu_command(op, args.case, args.variant, ncu or "ncu")
    print(f"Counters: {shlex.join(command)}", flush=True)
    if ncu is None or device.type != "cuda":
        print(f"Not run: {'ncu is not on the PATH' if ncu is None else 'needs a CUDA device'}.")
        return
    subprocess.run(command, cwd=ROOT, check=False)


if __name__ == "__main__":
    main()
