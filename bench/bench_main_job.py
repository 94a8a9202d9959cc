"""The main job with TRL and with grpo_fast, each in a fresh process: one table of time, memory and reward.

Writes the steps' raw numbers with the commit, the machine and the versions as JSON.
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

from bench.main_job_table import WARMUP_STEPS, Run, Step, markdown, same_prompts
from bench.provenance import provenance
from grpo_fast.cli import ENVIRONMENT

LABELS = ("trl", "grpo-fast-vllm", "grpo-fast-transformers")
ROOT = Path(__file__).resolve().parents[1]


def child_environment(label: str, threads: int) -> dict[str, str]:
    """The environment of a child, read when torch is imported: what our command line sets, for TRL its OpenMP part."""
    openmp = {name: value for name, value in ENVIRONMENT.items() if name.startswith(("OMP_", "GOMP_"))}
    settings = openmp if label == "trl" else ENVIRONMENT
    return (
        os.environ
        | settings
        | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    )


def run_child(label: str, *options: str, threads: int) -> Run:
    """Measure one trainer in a fresh process, whose output goes to this one's standard error."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [sys.executable, "-m", "bench.main_job_child", label, *options, "--out", str(out)]
        subprocess.run(command, env=child_environment(label, threads), cwd=ROOT, stdout=sys.stderr, check=True)
        fields = json.loads(out.read_text())
    return Run(**fields | {"steps": [Step(**step) for step in fields["steps"]]})


def model_folder() -> str:
    """Folder of the packaged model; made in a child, since a process inherits its parent's peak memory."""
    code = "from grpo_fast.recipes.smollm2 import load_smollm2; print(load_smollm2())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=12, help=f"optimizer steps; the first {WARMUP_STEPS} are not counted"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each child")
    parser.add_argument("--out", type=Path, help="JSON of the raw numbers (bench/results/NAME.json)")
    parser.add_argument("--only", choices=LABELS, help="run one trainer; no ratios")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time, for all trainers"
    )
    args = parser.parse_args()
    if args.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than the {WARMUP_STEPS} warm-up steps, got {args.steps}")

    record = provenance() | {key: getattr(args, key) for key in ("seed", "threads", "gradient_checkpointing")}
    options = ["--model", model_folder(), "--steps", str(args.steps), "--seed", str(args.seed)]
    if args.gradient_checkpointing:
        options.append("--gradient-checkpointing")
    labels = (args.only,) if args.only else LABELS
    runs = [run_child(label, *options, threads=args.threads) for label in labels]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record | {"runs": [asdict(run) for run in runs]}, indent=1) + "\n")
    print(f"Commit {record['commit']}, {record['cpu']}, {args.threads} thread(s), seed {args.seed}.")
    print(f"Median (minimum - maximum) of steps {WARMUP_STEPS + 1} to {args.steps}.\n")
    print(markdown(runs))
    if not same_prompts(runs):
        print("\nThe trainers did not see the same prompts: the columns are not comparable step by step.")


if __name__ == "__main__":
    main()
