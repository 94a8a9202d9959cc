"""The machine behind a figure: what it is, in what state it is, and the most it could do.

Peaks are for dense products with fp32 sums. `PUBLISHED` is from the vendor's data sheets; other devices are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch

from bench.provenance import provenance

TERA = 1e12
# side of the measured product, elements of the measured copy (128 MiB of fp32 there and back), repetitions
PRODUCT = {"cpu": 1024, "cuda": 8192}
COPIED, REPEATS = 1 << 25, 5
MEASURED = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Peak:
    """The most a device can do.

    Attributes:
        flops_per_s: By precision of the operands: "fp32" (without tf32), "bf16", and on some "tf32".
        bytes_per_s: To and from memory, both directions counted.
        source: Where the numbers are from.
    """

    flops_per_s: dict[str, float]
    bytes_per_s: float
    source: str


# (words of the device's name), bf16, tf32, fp32 in TFLOP/s, TB/s; the first row that fits counts
PUBLISHED: tuple[tuple[tuple[str, ...], float, float, float, float], ...] = (
    (("A100", "40GB"), 312, 156, 19.5, 1.555),
    (("A100", "PCIE"), 312, 156, 19.5, 1.935),
    (("A100",), 312, 156, 19.5, 2.039),
    (("H100", "PCIE"), 756, 378, 51.2, 2.0),
    (("H100", "NVL"), 835, 417, 60.0, 3.9),
    (("H100",), 989, 494, 66.9, 3.35),
    (("H200", "NVL"), 835, 417, 60.0, 4.8),
    (("GH200", "144G"), 989, 494, 66.9, 4.9),
    (("GH200",), 989, 494, 66.9, 4.0),
    (("H200",), 989, 494, 66.9, 4.8),
    (("H20",), 148, 74, 44.0, 4.0),
    (("GB200",), 2500, 1250, 80.0, 8.0),
    (("B200",), 2250, 1125, 75.0, 8.0),
    (("L40S",), 362, 183, 91.6, 0.864),
    (("L4",), 121, 60, 30.3, 0.3),
)


def peak(device: torch.device) -> Peak:
    """Published dense peaks of a known GPU; else what a product and a copy reach, per CPU second on a CPU."""
    found = None if device.type != "cuda" else published_peak(torch.cuda.get_device_name(device))
    return found or _measured_peak(device.type, torch.get_num_threads())


def published_peak(name: str) -> Peak | None:
    """By the name that the driver gives the device; None for one that is not in `PUBLISHED`."""
    words = set(name.upper().replace("-", " ").split())
    for parts, bf16, tf32, fp32, terabytes in PUBLISHED:
        if words.issuperset(parts):
            flops = {"bf16": bf16 * TERA, "tf32": tf32 * TERA, "fp32": fp32 * TERA}
            return Peak(flops, terabytes * TERA, f"published: {' '.join(parts)}")
    return None


@cache
def _measured_peak(device_type: str, threads: int) -> Peak:
    device = torch.device(device_type)
    flops = {name: _product_rate(dtype, device) for name, dtype in MEASURED.items()}
    source = torch.empty(COPIED, device=device).fill_(1.0)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), device)
    unit = f"per CPU second, {threads} thread(s)" if device_type == "cpu" else "per second"
    what = f"measured: torch.mm of {PRODUCT[device_type]}^3 and a copy of {COPIED * 4 >> 20} MiB, {unit}"
    return Peak(flops, 2 * 4 * COPIED / seconds, what)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    side = PRODUCT[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: torch.mm(left, right), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        if device.type != "cuda":
            before = time.process_time()
            work()
            return time.process_time() - before
        torch.cuda.synchronize(device)
        before = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return time.perf_counter() - before

    once()
    return median(once() for _ in range(REPEATS))


def machine() -> dict[str, object]:
    """`provenance` and, by NVML, the state of the current GPU; without one, `nvml` says why. JSON-ready."""
    return provenance() | gpu_state()


def gpu_state() -> dict[str, object]:
    """Name, driver, clocks (MHz), power (W), temperature (deg C) and throttle reasons of torch's current device.

    Without a GPU or nvidia-ml-py: `{"nvml": reason}`.
    """
    try:
        import pynvml
    except ImportError:
        return {"nvml": "nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"nvml": str(error)}
    try:
        return _state(pynvml, _handle(pynvml))
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any) -> Any:
    # NVML counts all devices, torch only the visible ones
    if torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
        if uuid is not None:
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _state(nvml: Any, handle: Any) -> dict[str, object]:
    readings: dict[str, Callable[[], object]] = {
        "gpu": lambda: nvml.nvmlDeviceGetName(handle),
        "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons": lambda: _reasons(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
    state: dict[str, object] = {}
    for name, read in readings.items():
        # a card need not report everything
        with suppress(nvml.NVMLError):
            state[name] = read()
    return state


def _reasons(nvml: Any, bits: int) -> list[str]:
    """Names of the set bits; an idle GPU's clocks are low for want of work, which limits nothing."""
    prefix = "nvmlClocksThrottleReason"
    named = {
        name.removeprefix(prefix): value
        for name, value in vars(nvml).items()
        if name.startswith(prefix) and isinstance(value, int) and value
    }
    return sorted(name for name, bit in named.items() if name not in ("All", "GpuIdle") and bits & bit == bit)
