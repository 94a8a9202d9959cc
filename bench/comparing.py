"""Ours beside the others: tables and ratios from the entries of pytest-benchmark's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# of the training step: ours may take at most these shares of a peer's time and memory
TARGETS = {
    ("trl", "cpu"): (0.35, 0.12),
    ("trl", "cuda"): (0.8, 1.0),
    ("liger", "cpu"): (1.0, None),
    ("liger", "cuda"): (0.8, 1.0),
}


@dataclass(frozen=True)
class Entry:
    """One provider's figures in one case; the other attributes are `running.extra_info`'s, in `info`."""

    label: str
    median: float
    spread: tuple[float, float]
    info: dict[str, Any]

    @property
    def case(self) -> tuple[str, str, str, str]:
        """What makes entries comparable."""
        return self.info["op"], self.info["shape"], self.info["dtype"], self.info["data"]


def read_json(path: Path) -> dict[str, Any]:
    """What `--benchmark-json` or `--benchmark-save` wrote; the kernel benches add `machine`."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def entries_of(benchmarks: Iterable[dict[str, Any]]) -> list[Entry]:
    """From benchmarks as pytest-benchmark writes them; others than the kernel benches' are left out."""
    return [
        Entry(
            label=each["extra_info"]["label"],
            median=each["stats"]["median"],
            spread=(each["stats"]["q1"], each["stats"]["q3"]),
            info=each["extra_info"],
        )
        for each in benchmarks
        if "share_of_floor" in each["extra_info"]
    ]


def by_case(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that share their inputs, in the order in which cases first come."""
    cases: dict[tuple[str, str, str, str], list[Entry]] = {}
    for entry in entries:
        cases.setdefault(entry.case, []).append(entry)
    return list(cases.values())


def table(entries: Sequence[Entry]) -> list[str]:
    """The lines of one case: time with its quartiles, against ours, against the floor, memory, errors."""
    info = entries[0].info
    op, shape, dtype, data = entries[0].case
    ours = next((entry for entry in entries if entry.label == "ours"), None)
    lines = [
        f"{op} {shape} {dtype} {data}; {info['clock']}; floor {_ms(info['floor_seconds'])} ms "
        f"({info['flop_convention']}; {info['peak_source']}); at least {info['memory_lower_bound_mib']:.1f} MiB",
        f"  {'':18} {'ms':>9} {'quartiles':>19} {'/ ours':>7} {'of floor':>8} {'TFLOP/s':>8} {'GB/s':>7} "
        f"{'peak MiB':>9}  largest error",
    ]
    for entry in entries:
        found = entry.info
        quartiles = f"{_ms(entry.spread[0])} - {_ms(entry.spread[1])}"
        ratio = "" if ours is None else f"{entry.median / ours.median:.2f}"
        worst = max(found["errors"].items(), key=lambda item: item[1], default=None)
        lines.append(
            f"  {entry.label:18} {_ms(entry.median):>9} {quartiles:>19} {ratio:>7} "
            f"{100 * found['share_of_floor']:>6.0f} % {found['tflops']:>8.3g} {found['gbps']:>7.3g} "
            f"{found['peak_mib']:>9.1f}  {'' if worst is None else f'{worst[0]} {worst[1]:.1e}'}"
        )
    lines += [f"  {label} failed: {reason}" for label, reason in info["failed"].items()]
    return lines


def absent_lines(absent: Mapping[str, str]) -> list[str]:
    """What did not run, by label, grouped by the reason."""
    reasons: dict[str, list[str]] = {}
    for label, reason in absent.items():
        reasons.setdefault(reason, []).append(label)
    return [f"{', '.join(labels)} ({reason})" for reason, labels in reasons.items()]


def speed_ups(entries: Sequence[Entry]) -> list[str]:
    """One line for each peer of one case, and whether the targets of a training step are met."""
    op, shape, dtype, data = entries[0].case
    ours = next((entry for entry in entries if entry.label == "ours"), None)
    if ours is None:
        return []
    device = "cpu" if ours.info["clock"].startswith("CPU") else "cuda"
    lines = []
    for entry in entries:
        if entry.info["is_ours"] or entry.label == "floor":
            continue
        time_limit, memory_limit = TARGETS.get((entry.label, device), (None, None)) if op == "training" else (None,) * 2
        line = f"{op} {shape} {dtype} {data}: {entry.label} / ours = {entry.median / ours.median:.2f} x the time"
        line += _verdict(ours.median / entry.median, time_limit)
        if ours.info["peak_mib"] > 0:
            line += f", {entry.info['peak_mib'] / ours.info['peak_mib']:.2f} x the memory"
            line += _verdict(ours.info["peak_mib"] / max(entry.info["peak_mib"], 1e-9), memory_limit)
        lines.append(line)
    return lines


def _verdict(ratio: float, limit: float | None) -> str:
    if limit is None:
        return ""
    return f" (target: ours at most {limit} of it, {'met' if ratio <= limit else f'missed with {ratio:.2f}'})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"
