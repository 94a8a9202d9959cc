"""The LM head with the GRPO loss, forward and backward: ours against TRL, Liger and plain logits, in one run.

Every provider runs in fresh processes, in turn, so that load and clocks drift under all of them alike. One product of
the head costs 2NDV floating-point operations: a training step needs three (6NDV), one that recomputes its logits four.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.head_child import Run
from bench.head_providers import DATA, DTYPES, PROVIDERS, why_not
from bench.head_table import Result, markdown
from bench.provenance import provenance
from grpo_fast.cli import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
CPU_SHAPES = ((4096, 576, 49152),)
# Qwen3-8B, Qwen3-1.7B, Qwen2.5-1.5B, Llama-3.1-8B
CUDA_SHAPES = ((8192, 4096, 151936), (16384, 2048, 151936), (32768, 1536, 151936), (8192, 4096, 128256))


def child_environment(label: str, threads: int) -> dict[str, str]:
    """What a child reads when it imports torch: all that our command line sets, for peers its OpenMP part."""
    is_ours = label.startswith("ours")
    settings = {name: value for name, value in ENVIRONMENT.items() if is_ours or name.startswith(("OMP_", "GOMP_"))}
    environment = os.environ | settings | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    # Triton's interpreter is for tests
    environment.pop("TRITON_INTERPRET", None)
    return environment


def run_child(label: str, *options: str, threads: int) -> Run | str:
    """Measure one provider in a fresh process; returns the last line of its standard error if it failed."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, "-m", "bench.head_child", label, *options, "--out", str(out)]
        done = subprocess.run(
            command, env=child_environment(label, threads), cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            return lines[-1] if lines else f"exit code {done.returncode}"
        return Run(**json.loads(out.read_text()))


def measure(
    labels: list[str],
    *,
    shape: tuple[int, int, int],
    dtype: str,
    data: str,
    device: str,
    is_frozen: bool,
    repeats: int,
    iterations: int,
    threads: int,
) -> Result:
    """All providers in turn, `repeats` times; a provider that fails is not started again."""
    result = Result(shape=shape, dtype=dtype, data=data, device=device, is_frozen=is_frozen, runs=[], failures={})
    N, D, V = (str(size) for size in shape)
    options = ["-N", N, "-D", D, "-V", V, "--dtype", dtype, "--data", data, "--device", device]
    options += ["--iterations", str(iterations), *(["--frozen"] if is_frozen else [])]
    for repeat in range(repeats):
        for label in labels:
            if label in result.failures:
                continue
            check = ["--check"] if repeat == 0 else []
            outcome = run_child(label, *options, *check, threads=threads)
            if isinstance(outcome, str):
                result.failures[label] = outcome
            else:
                result.runs.append(outcome)
                spent = ", ".join(f"{seconds:.3g}" for seconds in result.seconds_of(outcome))
                print(f"{shape} {dtype} {data} {label}: {spent} s, {outcome.extra_mib:.0f} MiB", file=sys.stderr)
    return result


def parse_shape(text: str) -> tuple[int, int, int]:
    """`N,D,V` as three numbers."""
    N, D, V = (int(size) for size in text.split(","))
    return N, D, V


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="N,D,V", help="may be repeated")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be repeated; default: bf16 and fp32 on CPU"
    )
    parser.add_argument("--data", choices=DATA, action="append", help="may be repeated; default: peaked")
    parser.add_argument("--frozen", action="store_true", help="no gradient of the weight, as with LoRA")
    parser.add_argument("--only", choices=PROVIDERS, action="append", help="may be repeated; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each provider")
    parser.add_argument("--iterations", type=int, help="timed iterations of a process; default: 1 on CPU, 5 on CUDA")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each child")
    parser.add_argument("--out", type=Path, help="JSON of the raw numbers (bench/results/NAME.json)")
    args = parser.parse_args()
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    has_cuda = subprocess.run([sys.executable, "-c", HAS_CUDA], check=False).returncode == 0
    args.device = args.device or ("cuda" if has_cuda else "cpu")
    if args.device == "cuda" and not has_cuda:
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    on_cuda = args.device == "cuda"
    args.shape = args.shape or list(CUDA_SHAPES if on_cuda else CPU_SHAPES)
    args.dtype = args.dtype or (["bf16"] if on_cuda else ["bf16", "fp32"])
    args.data = args.data or ["peaked"]
    args.iterations = args.iterations or (5 if on_cuda else 1)
    return args


# in a child: this process must not hold a CUDA context while others measure memory
HAS_CUDA = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def main() -> None:
    args = parse_args()
    chosen = args.only or list(PROVIDERS)
    on_cuda = args.device == "cuda"
    absent = {label: why_not(PROVIDERS[label], has_cuda=on_cuda, is_frozen=args.frozen) for label in chosen}
    labels = [label for label in chosen if absent[label] is None]
    record = provenance() | {key: getattr(args, key) for key in ("threads", "repeats", "iterations", "device")}
    results: list[Result] = []
    print(f"Commit {record['commit']}, {record['cpu']}, {args.threads} thread(s).")
    for shape in args.shape:
        for dtype in args.dtype:
            for data in args.data:
                result = measure(
                    labels,
                    shape=shape,
                    dtype=dtype,
                    data=data,
                    device=args.device,
                    is_frozen=args.frozen,
                    repeats=args.repeats,
                    iterations=args.iterations,
                    threads=args.threads,
                )
                results.append(result)
                print(f"\n{markdown(result)}", flush=True)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    raw = {"absent": absent, "results": [asdict(result) for result in results]}
                    args.out.write_text(json.dumps(record | raw, indent=1) + "\n")
    for label, reason in absent.items():
        if reason is not None:
            print(f"\nNot run: {label} ({reason}).")


if __name__ == "__main__":
    main()
