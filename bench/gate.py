"""Speed-ups of the ops whose tests pass: the tests run first, and a red op has no figures.

    python -m bench.gate [OP ...] [--results FILE] [-- BENCH OPTIONS]

Runs each op's tests, then its bench, and prints ours against every peer. With `--results` the figures come from a file
that `pytest bench/ --benchmark-json` wrote at this commit, instead of from a new run. Exit code 1 if any op is red.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.comparing import Entry, by_case, entries_of, read_json, speed_ups
from bench.ops import OPS
from bench.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Verdict:
    """Of one op: what its tests said, and its figures, which a red op does not have."""

    op: str
    is_green: bool
    lines: list[str]


def tests_command(tests: Sequence[str]) -> list[str]:
    """Without the options of whoever runs the gate inside pytest."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]


def bench_command(op: str, out: Path, options: Sequence[str]) -> list[str]:
    """What measures one op and writes its JSON."""
    name = f"bench_{op.replace('-', '_')}"
    file = ROOT / "bench" / f"bench_{op.removesuffix('-frozen').replace('-', '_')}.py"
    return [sys.executable, "-m", "pytest", "-q", f"{file}::{name}", f"--benchmark-json={out}", *options]


def judge(op: str, tests: Sequence[str], *, results: Sequence[Entry] | None, options: Sequence[str]) -> Verdict:
    """Run an op's tests and, if they pass, take its figures from `results` or from a new run."""
    done = subprocess.run(tests_command(tests), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode != 0:
        return Verdict(op, False, [f"{op}: red, no figures: {summary}"])
    found = _measured(op, options) if results is None else results
    if found is None:
        return Verdict(op, False, [f"{op}: its tests pass ({summary}), but its bench failed: no figures"])
    cases = by_case([entry for entry in found if entry.info["op"] == op])
    if not cases or not all(any(entry.label == "ours" for entry in case) for case in cases):
        return Verdict(op, False, [f"{op}: its tests pass ({summary}), but ours has no figure: no speed-ups"])
    lines = [line for case in cases for line in speed_ups(case)]
    return Verdict(op, True, [f"{op}: green: {summary}", *(lines or [f"{op}: nothing ran beside ours"])])


def _measured(op: str, options: Sequence[str]) -> list[Entry] | None:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        done = subprocess.run(bench_command(op, out, options), cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        # a peer that fails makes its own test red; the figures of the others stand
        return entries_of(read_json(out)["benchmarks"]) if done.returncode in (0, 1) and out.exists() else None


def check_commit(record: Mapping[str, Any], commit: object) -> None:
    """Refuse figures of other code than the tests'.

    Raises:
        ValueError: If the commits differ, or what was changed after the commit cannot be compared.
    """
    measured = record.get("machine", {}).get("commit")
    if measured != commit or str(commit).endswith("-dirty"):
        raise ValueError(f"results must be of this commit without changes, {commit}, got {measured}")


def run(tests: Mapping[str, Sequence[str]], *, results: Sequence[Entry] | None, options: Sequence[str]) -> int:
    """Judge every op, print, and return the exit code."""
    verdicts = []
    for op, files in tests.items():
        verdicts.append(judge(op, files, results=results, options=options))
        print("\n".join(verdicts[-1].lines), flush=True)
    return 0 if all(verdict.is_green for verdict in verdicts) else 1


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    own, options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help=f"default: all ({', '.join(OPS)})")
    parser.add_argument("--results", type=Path, help="JSON of a bench of this commit")
    parser.add_argument("--dry", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(own)
    unknown = [op for op in args.op if op not in OPS]
    if unknown:
        parser.error(f"op must be one of {', '.join(OPS)}, got {', '.join(unknown)}")
    tests = {op: OPS[op].tests for op in args.op or OPS}
    if args.dry:
        for op, files in tests.items():
            print(shlex.join(tests_command(files)))
            print(shlex.join(bench_command(op, Path("RESULTS.json"), options)))
        return 0
    record = provenance()
    print(f"Commit {record['commit']}, {record['gpu'] or record['cpu']}, {record['date']}")
    results = None
    if args.results:
        written = read_json(args.results)
        try:
            check_commit(written, record["commit"])
        except ValueError as error:
            parser.error(f"--{error}")
        results = entries_of(written["benchmarks"])
    return run(tests, results=results, options=options)


if __name__ == "__main__":
    sys.exit(main())
