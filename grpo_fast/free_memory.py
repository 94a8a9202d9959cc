"""How much more memory this process can take: on its accelerator, or on a Linux CPU within its control groups."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# files of a control group: limit, usage, and the key in memory.stat of the file pages that go when memory is short
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that new tensors on `device` can take, or None where nothing says.

    On an accelerator what the driver has left, and what torch's allocator holds without using it, fragments included.
    Nothing waits for the device. On a CPU what the system could give without swapping, no more than what is left of any
    limit on the control groups that the process is in; and what the C library keeps of memory that was freed, without
    which a process would seem to lose what its last step took.
    """
    if device.type == "cpu":
        return _free_host_bytes()
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def _free_host_bytes() -> int | None:
    available = _bytes_in(MEMINFO, "MemAvailable")
    return None if available is None else min([available, *_left_of_limits()]) + _kept_by_c_library()


def _bytes_in(file: Path, name: str) -> int | None:
    """A field in kB of a file of /proc."""
    try:
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _left_of_limits() -> list[int]:
    """What is left of the limit of each control group around this process."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUPS / "memory", VERSION_1) if controllers else (CGROUPS, VERSION_2)
        group = root / path.lstrip("/")
        # a container may see its own group mounted as the root, under which the path outside does not exist
        for folder in {group, *group.parents, root}:
            if folder.is_relative_to(root):
                left += _left_of_limit(folder, *names)
    return left


def _left_of_limit(folder: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    try:
        bound, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    # "max": none; version 1 has a number larger than any memory
    return [] if bound == "max" else [max(0, int(bound) - used + int(stat.get(reclaimable, 0)))]


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@functools.cache
def _mallinfo() -> Callable[[], Any] | None:
    """What glibc counts of its memory, since 2.33; None elsewhere. Other allocators leave it at nothing."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Mallinfo
    return function


def _kept_by_c_library() -> int:
    """Bytes that are free and still resident: pages that `malloc_trim` gave back count as free blocks, too."""
    count, resident = _mallinfo(), _bytes_in(STATUS, "RssAnon")
    if count is None or resident is None:
        return 0
    info = count()
    return max(0, min(info.fordblks, resident - info.uordblks - info.hblkhd))
