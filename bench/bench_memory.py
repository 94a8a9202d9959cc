"""The longest sequence that one training step fits into a memory budget: ours and TRL 1.16, a fresh process per length.

On CUDA the budget is of the whole device, whose rest is occupied meanwhile. On a CPU it is what a step of a tiny model
may add to the process. Weights are bf16, layers recompute, a micro-batch is one sequence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from bench.bench_main_job import child_environment
from bench.children import CHILD_CLOCK, LABELS, absent_peers, make_room, record
from bench.longest import Point, find_longest
from bench.models import num_layers

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what it must fit into, and the lengths to try: by label the first, which only decides how many are."""

    model: str
    budget_mib: float
    start: dict[str, int]
    limit: int

    @property
    def shape(self) -> str:
        return f"{self.model}, {self.budget_mib:g} MiB"


CUDA_CASE = Case(model="Gemma-3-1B", budget_mib=79 * 1024, start=dict.fromkeys(LABELS, 65_536), limit=524_288)
CPU_CASE = Case(model="tiny", budget_mib=96, start={"grpo-fast": 4096, "trl": 256}, limit=16_384)
# TRL's own figure for CUDA_CASE: GRPO without generation, bf16, batch size 1, gradient checkpointing, sdpa
PUBLISHED = {
    "label": "TRL 1.15",
    "tokens": 114_688,
    "source": "https://github.com/huggingface/trl/releases/tag/v1.15.0",
}


def measure(label: str, case: Case, length: int) -> Point:
    """One length in a fresh process, whose output goes to this one's standard error."""
    # all layers recompute, as in TRL: fewer, where the memory is free, would not tell how much is needed
    fixed = {} if label == "trl" else {"checkpointed_layers": num_layers(case.model)}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "point.json"
        command = [sys.executable, "-m", "bench.memory_child", label, "--model", case.model, "--length", str(length)]
        command += ["--budget-mib", str(case.budget_mib), "--settings", json.dumps(fixed), "--out", str(out)]
        subprocess.run(command, env=child_environment(label, 1), cwd=ROOT, stdout=sys.stderr, check=True)
        return Point(**json.loads(out.read_text()))


@pytest.mark.benchmark(group="longest sequence", timer=CHILD_CLOCK)
@pytest.mark.parametrize("label", LABELS)
def bench_longest_sequence(benchmark: Any, capfd: Any, label: str) -> None:
    if label in absent_peers():
        pytest.skip(f"{label}: {absent_peers()[label]}")
    case = CUDA_CASE if torch.cuda.is_available() else CPU_CASE
    make_room()
    found = find_longest(lambda length: measure(label, case, length), start=case.start[label], limit=case.limit)
    longest = found.longest
    assert longest is not None, f"nothing fits into {case.budget_mib:g} MiB"
    record(
        benchmark,
        label=label,
        seconds=longest.seconds,
        op="longest sequence",
        shape=case.shape,
        dtype="bf16",
        data="random",
        clock="wall",
        # seconds are of a step at each one's own length
        compared="tokens",
        tokens=longest.length,
        is_bounded=found.is_bounded,
        budget_mib=longest.budget_mib,
        peak_mib=longest.peak_mib,
        published=PUBLISHED if case is CUDA_CASE else None,
        points=[asdict(point) for point in found.points],
    )
    with capfd.disabled():
        most = "" if found.is_bounded else " or more"
        print(f"\n{case.shape}: {label} {longest.length}{most} tokens, {longest.peak_mib:.0f} MiB at its peak")
