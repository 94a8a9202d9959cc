"""The training phase of one optimizer step on five length profiles, by TRL 1.16 and by grpo_fast: tokens and seconds.

Tokens are what the policy's input embedding gets, counted over a whole step at the profile's true lengths. Seconds are
measured in a fresh process per trainer and profile, at lengths that a CPU can run. Writes the raw numbers with the
commit, the machine and the versions as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.bench_main_job import child_environment
from bench.models import CONFIGS, num_layers
from bench.profile_rows import PROFILES
from bench.profiles_table import Measured, same_rows, seconds_table, tokens_table
from bench.provenance import provenance

LABELS = ("trl", "grpo-fast")
ROOT = Path(__file__).resolve().parents[1]


def run_child(label: str, profiles: list[str], *options: str, threads: int) -> list[Measured]:
    """Measure one trainer in a fresh process, whose output goes to this one's standard error."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "bench.profiles_child", label, *profiles, *options, "--out", str(out)]
        subprocess.run(command, env=child_environment(label, threads), cwd=ROOT, stdout=sys.stderr, check=True)
        return [Measured(**fields) for fields in json.loads(out.read_text())]


def timing_options(label: str, profile: str, args: argparse.Namespace) -> list[str]:
    """The child's options where seconds are measured; ours always runs the whole step, whose packs differ."""
    lengths = PROFILES[profile]
    scale = lengths.timed_scale if args.scale is None else args.scale
    options = ["--model", args.model, "--layers", str(args.layers), "--scale", str(scale)]
    if label == "trl" and not args.whole_step:
        options += ["--micro-batches", str(lengths.timed_micro_batches)]
    return options


def settings(label: str, args: argparse.Namespace) -> list[str]:
    """The fields of the configuration that the command line sets."""
    fields: dict[str, object] = {"gradient_checkpointing": args.gradient_checkpointing}
    if label != "trl" and args.max_tokens_per_pack is not None:
        fields["max_tokens_per_pack"] = args.max_tokens_per_pack
    return ["--settings", json.dumps(fields), "--seed", str(args.seed)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, action="append", help="one of them; may be given again")
    parser.add_argument("--scale", type=float, help="of the timed lengths; default: the profile's own")
    parser.add_argument("--model", choices=CONFIGS, default="SmolLM2-135M", help="its shape, with random weights")
    parser.add_argument("--layers", type=int, default=3, help="of the model's, with that part of its vocabulary")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each child")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole-step", action="store_true", help="run all of TRL's micro-batches, which are alike")
    parser.add_argument("--tokens-only", action="store_true", help="count tokens, measure no seconds")
    parser.add_argument("--max-tokens-per-pack", type=int, help="of grpo_fast; default: its own")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time, for both")
    parser.add_argument("--out", type=Path, help="JSON of the raw numbers (bench/results/NAME.json)")
    args = parser.parse_args()
    if not 1 <= args.layers <= num_layers(args.model):
        parser.error(f"--layers must be 1 to {num_layers(args.model)}, got {args.layers}")
    return args


def main() -> None:
    args = parse_args()
    profiles = args.profile or list(PROFILES)
    options = ("seed", "threads", "model", "layers", "gradient_checkpointing", "max_tokens_per_pack")
    record = provenance() | {name: getattr(args, name) for name in options}
    counted = [
        run for label in LABELS for run in run_child(label, profiles, *settings(label, args), threads=args.threads)
    ]
    timed: list[Measured] = []
    for profile in [] if args.tokens_only else profiles:
        for label in LABELS:
            child = [*settings(label, args), *timing_options(label, profile, args)]
            timed += run_child(label, [profile], *child, threads=args.threads)
    if args.out:
        runs = {"counted": [asdict(run) for run in counted], "timed": [asdict(run) for run in timed]}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record | runs, indent=1) + "\n")
    print(f"Commit {record['commit']}, {record['cpu']}, {args.threads} thread(s), seed {args.seed}.\n")
    print("Tokens of one optimizer step (64 completions) through the transformer, at true lengths:\n")
    print(tokens_table(counted))
    if timed:
        part = f"{args.layers} of {args.model}'s {num_layers(args.model)} layers and that part of its vocabulary"
        print(f"\nTraining phase of one step, {part},")
        print("random weights, no group without a signal. TRL's micro-batches have one shape: those that were not run")
        print("cost what the later of those that were cost.\n")
        print(seconds_table(timed))
    if not same_rows(counted) or not same_rows(timed):
        print("\nThe trainers did not get the same rows: the columns are not comparable.")


if __name__ == "__main__":
    main()
