"""How much more memory this process can take: on its accelerator, or on a Linux CPU within its control groups."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# files of a control group: limit, usage, and the key in memory.stat of the file pages that go when memory is short
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that new tensors on `device` can take, or None where nothing says.

    On an accelerator what the driver has left, and what torch's allocator holds without using it, fragments included.
    Nothing waits for the device. On a CPU what the system could give without swapping, and no more than what is left of
    any limit on the control groups that the process is in.
    """
    if device.type == "cpu":
        return _free_host_bytes()
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def _free_host_bytes() -> int | None:
    try:
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([available, *_left_of_limits()])


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
