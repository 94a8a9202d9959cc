"""One optimizer step on a length profile, its phases told apart: ours and TRL 1.16, each in a fresh process.

Nothing is generated: a rollout function hands both the same rows. On CUDA all five profiles at their true lengths on a
whole model; on a CPU two of them, shortened, on a slice of one. A CPU's figures are CPU seconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.bench_profiles import run_child
from bench.children import CHILD_CLOCK, LABELS, absent_peers, make_room, record
from bench.models import num_layers
from bench.profile_rows import PROFILES
from bench.profiles_table import Measured

# compiling kernels and products is not a step's work
WARMUP_STEPS = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run: a profile, what its lengths are multiplied by, and how many layers of a model."""

    profile: str
    scale: float
    model: str
    layers: int
    gradient_checkpointing: bool

    @property
    def shape(self) -> str:
        lengths = "" if self.scale == 1.0 else f" x {self.scale:g}"
        whole = num_layers(self.model)
        part = "" if self.layers == whole else f", {self.layers} of {whole} layers"
        return f"{self.profile}{lengths}, {self.model}{part}"


SLICE: dict[str, Any] = {"model": "SmolLM2-135M", "layers": 3, "gradient_checkpointing": False}
WHOLE: dict[str, Any] = {"model": "Qwen3-0.6B", "layers": num_layers("Qwen3-0.6B"), "gradient_checkpointing": True}
CPU_CASES = [Case(profile="math", scale=0.1, **SLICE), Case(profile="rag", scale=0.05, **SLICE)]
# TRL needs checkpointing for the longest; it is both trainers' default
CUDA_CASES = [Case(profile=profile, scale=1.0, **WHOLE) for profile in PROFILES]


def extra_info(case: Case, run: Measured) -> dict[str, Any]:
    """What the benchmark's JSON says of a step beside its seconds."""
    on_cuda = run.peak_cuda_mib is not None
    return {
        "op": "step",
        "shape": case.shape,
        "dtype": "fp32, bf16 autocast",
        "data": "random",
        "clock": "wall" if on_cuda else "CPU",
        "tokens": run.tokens,
        "true_tokens": run.true_tokens,
        "rows": run.rows,
        "phases_seconds": {name: sum(seconds) for name, seconds in run.phases.items()},
        "peak_mib": run.peak_cuda_mib if on_cuda else run.peak_rss_mib - run.loaded_rss_mib,
        "gradient_checkpointing": case.gradient_checkpointing,
    }


def line(label: str, case: Case, run: Measured) -> str:
    """The figures for whoever watches."""
    info = extra_info(case, run)
    phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in info["phases_seconds"].items() if seconds)
    return f"{case.shape}: {label} {run.tokens} tokens, {info['clock']} s: {phases}; {info['peak_mib']:.0f} MiB"


def run_case(label: str, case: Case) -> Measured:
    """The measured step of one trainer, in a fresh process."""
    settings = {"gradient_checkpointing": case.gradient_checkpointing}
    options = ["--model", case.model, "--layers", str(case.layers), "--scale", str(case.scale)]
    options += ["--settings", json.dumps(settings), "--warmup-steps", str(WARMUP_STEPS)]
    (run,) = run_child(label, [case.profile], *options, threads=1)
    return run


@pytest.mark.benchmark(group="step", timer=CHILD_CLOCK)
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("case", CUDA_CASES if torch.cuda.is_available() else CPU_CASES, ids=lambda case: case.profile)
def bench_step(benchmark: Any, capfd: Any, case: Case, label: str) -> None:
    if label in absent_peers():
        pytest.skip(f"{label}: {absent_peers()[label]}")
    make_room()
    run = run_case(label, case)
    # all but what hands out the rows
    parts = {name: sum(seconds) for name, seconds in run.phases.items() if name not in ("generation", "rewards")}
    record(benchmark, label=label, seconds=sum(parts.values()), **extra_info(case, run))
    with capfd.disabled():
        print(f"\n{line(label, case, run)}")
