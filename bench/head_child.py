"""One provider of `bench_head.py` in a process of its own: time, extra peak memory and errors, as JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench.head_providers import DATA, DTYPES, NUM_SEQUENCES, PROVIDERS, Problem, Provider, errors, make_problem

# rows whose log-probs and gradients are compared with float64
CHECK_ROWS = 128
# on CUDA the first full-size iterations compile, tune and fill the allocator's pools
CUDA_WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process measured.

    Attributes:
        label: The provider.
        cpu_s: CPU seconds of all threads, each timed iteration.
        wall_s: Wall seconds, until the device is done.
        extra_mib: Most memory above what was held after inputs and warm-up: resident on a CPU, allocated on CUDA.
            The gradients are in it.
        errors: Against float64 on the first rows, empty if not asked for.
        device: Name of the GPU, or "cpu".
        threads: torch's intra-op threads.
    """

    label: str
    cpu_s: list[float]
    wall_s: list[float]
    extra_mib: float
    device: str
    threads: int
    errors: dict[str, float] = field(default_factory=dict)


def _status_mib(name: str) -> float:
    # unlike getrusage's, this peak is not inherited from the parent, and can be reset
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(kib) / 1024


class Memory:
    """Extra peak memory since its creation, in MiB."""

    def __init__(self, *, on_cuda: bool) -> None:
        self.on_cuda = on_cuda
        gc.collect()
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            # what was freed but not returned would hide the first megabytes
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status_mib("VmRSS")

    def extra_mib(self) -> float:
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.on_cuda else _status_mib("VmHWM")
        return peak - self.before


def _now() -> tuple[float, float]:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def _clear(problem: Problem, provider: Provider) -> None:
    problem.hidden.grad = None
    if not provider.accumulates:
        problem.weight.grad = None
    elif problem.weight.grad is None:
        problem.weight.grad = torch.zeros_like(problem.weight)
    else:
        problem.weight.grad.zero_()


def _warm_up(provider: Provider, *, D: int, dtype: str, data: str, device: str, is_frozen: bool) -> None:
    # two lengths, so that what torch.compile makes of them holds for every length
    for rows in (2, 3):
        N = rows * NUM_SEQUENCES
        problem = make_problem(N, D, 512, dtype=dtype, data=data, device=device, is_frozen=is_frozen)
        _clear(problem, provider)
        provider.step(problem)


def measure(
    label: str,
    *,
    N: int,
    D: int,
    V: int,
    dtype: str,
    data: str,
    device: str,
    frozen: bool,
    iterations: int,
    check: bool,
) -> Run:
    """Run one provider; each iteration starts without gradients, except where the provider adds to them."""
    provider, on_cuda = PROVIDERS[label], device == "cuda"
    problem = make_problem(N, D, V, dtype=dtype, data=data, device=device, is_frozen=frozen)
    _warm_up(provider, D=D, dtype=dtype, data=data, device=device, is_frozen=frozen)
    for _ in range(CUDA_WARMUP if on_cuda else 0):
        _clear(problem, provider)
        provider.step(problem)
    _clear(problem, provider)
    memory = Memory(on_cuda=on_cuda)
    cpu_s, wall_s = [], []
    for _ in range(iterations):
        _clear(problem, provider)
        cpu, wall = _now()
        provider.step(problem)
        cpu_after, wall_after = _now()
        cpu_s.append(cpu_after - cpu)
        wall_s.append(wall_after - wall)
    extra_mib = memory.extra_mib()
    found = {}
    if check and not provider.is_floor:
        small = problem.first_rows(min(CHECK_ROWS, N))
        _clear(small, provider)
        found = errors(small, provider.step(small))
    return Run(
        label=label,
        cpu_s=cpu_s,
        wall_s=wall_s,
        extra_mib=extra_mib,
        device=torch.cuda.get_device_name() if on_cuda else "cpu",
        threads=torch.get_num_threads(),
        errors=found,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=PROVIDERS)
    for name in ("-N", "-D", "-V", "--iterations"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--frozen", action="store_true", help="no gradient of the weight")
    parser.add_argument("--check", action="store_true", help="compare with float64")
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args())
    out = options.pop("out")
    out.write_text(json.dumps(asdict(measure(**options))))


if __name__ == "__main__":
    main()
