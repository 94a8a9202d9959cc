"""Results as they lie in JSON files: pytest-benchmark's and the scripts' own, checked field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING = object()


class BadResult(ValueError):
    """A file that is no result; the message names it and the field."""


@dataclass(frozen=True)
class Origin:
    """Where figures are from. Only figures of one origin may stand beside each other.

    Attributes:
        commit: Of the code. One with uncommitted changes names its file, too: two of them need not be the same code.
        machine: Processor or GPU, cores, memory, driver and power limit as far as they are known.
    """

    commit: str
    machine: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One benchmark of pytest-benchmark.

    Attributes:
        median: Seconds.
        quartiles: First and third, in seconds.
        rounds: How many samples.
        info: `extra_info`.
    """

    label: str
    op: str
    shape: str
    median: float
    quartiles: tuple[float, float]
    rounds: int
    info: dict[str, Any]

    @property
    def case(self) -> tuple[str, str, str, str]:
        """Figures are compared where all of it is the same: op, shape, dtype, data."""
        return self.op, self.shape, str(self.info.get("dtype", "")), str(self.info.get("data", ""))

    @property
    def is_ours(self) -> bool:
        return bool(self.info.get("is_ours"))

    def number(self, name: str) -> float | None:
        """A number of `info`, or None where it is not there."""
        value = self.info.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """One file: one run on one machine.

    Attributes:
        path: The file.
        origin: Commit and machine.
        date: When it was written.
        kind: "pytest-benchmark", or the script that wrote it.
        versions: Of packages, those that are installed.
        figures: Of pytest-benchmark, else none.
        content: The whole JSON.
    """

    path: Path
    origin: Origin
    date: str
    kind: str
    versions: dict[str, str]
    figures: list[Figure] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)


# what tells the scripts' files apart: all of these fields are in it
KINDS = {
    "bench_main_job": ("runs", "seed"),
    "bench_profiles": ("counted", "timed"),
    "bench_tiles": ("lines",),
    "bench_adamw": ("numel", "seconds"),
}


def read_result(path: Path) -> ResultFile:
    """Read one file.

    Raises:
        BadResult: If it is no JSON, or a field is missing or of the wrong kind.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BadResult(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadResult(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadResult(f"{path}: an object was needed at the top, got {_kind_of(content)}")
    if "benchmarks" in content:
        return _pytest_benchmark(path, content)
    kind = next((kind for kind, names in KINDS.items() if all(name in content for name in names)), None)
    if kind is None:
        known = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KINDS.items())
        raise BadResult(f"{path}: field benchmarks, or those of a script ({known}), were needed, got {_names(content)}")
    return ResultFile(
        path=path, origin=_origin(path, content), date=_get(path, content, "date", str), kind=kind,
        versions=_versions(path, content), content=content,
    )  # fmt: skip


def _pytest_benchmark(path: Path, content: dict[str, Any]) -> ResultFile:
    listed = _get(path, content, "benchmarks", list)
    machine = content.get("machine")
    if machine is None:
        raise BadResult(f"{path}: field machine is missing: only what `pytest bench/` wrote can be read")
    if not isinstance(machine, dict):
        raise BadResult(f"{path}: field machine: an object was needed, got {_kind_of(machine)}")
    figures = [_figure(path, each, f"benchmarks[{i}]") for i, each in enumerate(listed)]
    return ResultFile(
        path=path, origin=_origin(path, machine, "machine."), date=_get(path, content, "datetime", str),
        kind="pytest-benchmark", versions=_versions(path, machine, "machine."), figures=figures, content=content,
    )  # fmt: skip


def _figure(path: Path, benchmark: Any, where: str) -> Figure:
    if not isinstance(benchmark, dict):
        raise BadResult(f"{path}: field {where}: an object was needed, got {_kind_of(benchmark)}")
    info = _get(path, benchmark, "extra_info", dict, f"{where}.")
    stats = _get(path, benchmark, "stats", dict, f"{where}.")
    op, shape, label = (_get(path, info, name, str, f"{where}.extra_info.") for name in ("op", "shape", "label"))
    median, first, third = (float(_get(path, stats, name, float, f"{where}.stats.")) for name in ("median", "q1", "q3"))
    rounds = _get(path, stats, "rounds", int, f"{where}.stats.")
    absent = info.get("absent", {})
    if not isinstance(absent, dict):
        raise BadResult(f"{path}: field {where}.extra_info.absent: an object was needed, got {_kind_of(absent)}")
    return Figure(
        label=label, op=op, shape=shape, median=median, quartiles=(first, third), rounds=rounds, info=info
    )  # fmt: skip


def _origin(path: Path, record: Mapping[str, Any], where: str = "") -> Origin:
    commit = _get(path, record, "commit", str | None, where) or "unknown"
    if commit == "unknown" or commit.endswith("-dirty"):
        commit += f" ({path.name})"
    gpu = record.get("gpu")
    # the scripts have all three in one field: name, driver, limit
    parts = gpu.split(",") if isinstance(gpu, str) else []
    name, driver, watts = ([part.strip() for part in parts] + ["", "", ""])[:3]
    driver = str(record.get("driver") or driver)
    watts = str(record.get("power_limit_w") or watts).removesuffix("W").strip()
    said = [
        name or _get(path, record, "cpu", str, where),
        f"{_get(path, record, 'cores', int, where)} cores",
        f"{_get(path, record, 'memory_mib', int, where)} MiB",
        *([f"driver {driver}"] if driver else []),
        *([f"{float(watts):g} W"] if watts.replace(".", "", 1).isdecimal() else []),
    ]
    return Origin(commit=commit, machine=", ".join(said))


def _versions(path: Path, record: Mapping[str, Any], where: str = "") -> dict[str, str]:
    return {name: str(found) for name, found in _get(path, record, "versions", dict, where).items() if found}


def _get(path: Path, record: Mapping[str, Any], name: str, kind: Any, where: str = "") -> Any:
    value = record.get(name, MISSING)
    if value is MISSING:
        raise BadResult(f"{path}: field {where}{name} is missing")
    accepted = int | float if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise BadResult(f"{path}: field {where}{name}: {_wanted(kind)} was needed, got {_kind_of(value)}")
    return value


WORDS = {str: "a string", int: "a whole number", float: "a number", dict: "an object", list: "an array"}


def _wanted(kind: Any) -> str:
    return WORDS.get(kind, "a string or null")


def _kind_of(value: object) -> str:
    return "null" if value is None else WORDS.get(type(value), type(value).__name__)


def _names(content: Mapping[str, Any]) -> str:
    return ", ".join(content) or "no field at all"
