"""The most memory that a stretch of a run needs: of the CUDA allocator and device, or of the process on a Linux CPU."""

from __future__ import annotations

import os
import sys
from typing import Protocol

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

MIB = 2**20
STATUS, CLEAR_REFS = "/proc/self/status", "/proc/self/clear_refs"
# to CLEAR_REFS: the peak resident set starts again from the present one (man 5 proc); costs no walk over pages
RESET_PEAK = b"5"
# larger than STATUS
STATUS_BYTES = 16384


class MemoryMeter(Protocol):
    """Says what a stretch needed at its end."""

    def take(self) -> dict[str, float]:
        """MiB by name since the last call; starts again from what is in use."""
        ...


class CudaMeter:
    """Peaks of one CUDA device, without synchronising it.

    `peak_mib` is what this process's tensors took at most, by torch's allocator. That statistic goes on counting what
    vLLM's sleep mode has unmapped, so `device_mib` says what was taken on the device, by whatever process, at the
    stretch's beginning or at its end, whichever is more.

    Each reading starts `torch.cuda.max_memory_allocated` again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used = 0

    def take(self) -> dict[str, float]:
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        before, self._used = self._used, total - free
        return {"peak_mib": peak / MIB, "device_mib": max(before, self._used) / MIB}


class ResidentMeter:
    """`peak_mib`, the peak resident set of this process: weights, activations, an engine in it, whatever it holds.

    Each reading starts `ru_maxrss` of getrusage again; `highest_mib` is what it would have been.
    """

    def __init__(self) -> None:
        """Begin where the process is.

        Raises:
            OSError: Where Linux's /proc is not there, or not writable.
        """
        # opened and not written to: the peak before the first stretch stays
        os.close(os.open(CLEAR_REFS, os.O_WRONLY))
        self._highest_mib = _peak_rss_mib()

    @property
    def highest_mib(self) -> float:
        """The peak resident set since the process began."""
        return max(self._highest_mib, _peak_rss_mib())

    def take(self) -> dict[str, float]:
        peak = _peak_rss_mib()
        self._highest_mib = max(self._highest_mib, peak)
        file = os.open(CLEAR_REFS, os.O_WRONLY)
        os.write(file, RESET_PEAK)
        os.close(file)
        return {"peak_mib": peak}


def _peak_rss_mib() -> float:
    """Since the last reset."""
    file = os.open(STATUS, os.O_RDONLY)
    status = os.read(file, STATUS_BYTES)
    os.close(file)
    _, _, rest = status.partition(b"VmHWM:")
    return int(rest[: rest.index(b"kB")]) / 1024


def make_meter(device: torch.device) -> MemoryMeter | None:
    """The meter of what the model runs on; None, which is logged, where there is none."""
    reason = f"nothing reads the peaks of {device.type}"
    if device.type == "cuda":
        return CudaMeter(device)
    if device.type == "cpu":
        try:
            return ResidentMeter()
        except OSError as error:
            reason = str(error)
    logger.warning("log_memory=True has no effect: %s", reason)
    return None


def peak_rss_mib(meter: MemoryMeter | None) -> float:
    """The most memory this process has held since it began, whatever `meter` started again."""
    if isinstance(meter, ResidentMeter):
        return meter.highest_mib
    # not on Windows
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # KiB on Linux, bytes on macOS
    return peak / (MIB if sys.platform == "darwin" else 1024)
