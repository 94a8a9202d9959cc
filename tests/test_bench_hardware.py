"""What a bench says of its machine: published peaks by name, measured ones, and NVML's readings."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from bench import hardware
from bench.hardware import Peak, gpu_state, machine, peak, published_peak


@pytest.mark.parametrize(
    ("name", "bf16", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 2.039),
        ("NVIDIA A100-SXM4-40GB", 312, 1.555),
        ("NVIDIA A100 80GB PCIe", 312, 1.935),
        ("NVIDIA H100 80GB HBM3", 989, 3.35),
        ("NVIDIA H100 PCIe", 756, 2.0),
        ("NVIDIA H100 NVL", 835, 3.9),
        ("NVIDIA H200", 989, 4.8),
        ("NVIDIA GH200 480GB", 989, 4.0),
        ("NVIDIA B200", 2250, 8.0),
    ],
)
def test_published_peaks_go_by_the_whole_name(name, bf16, bandwidth):
    found = published_peak(name)
    assert found.flops_per_s["bf16"] == bf16 * 1e12
    assert found.bytes_per_s == pytest.approx(bandwidth * 1e12)
    assert found.source.startswith("published")


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA GeForce RTX 4090", "NVIDIA H1000"])
def test_no_peak_is_guessed(name):
    assert published_peak(name) is None


def test_a_cpus_peak_is_measured(monkeypatch):
    monkeypatch.setattr(hardware, "PRODUCT", {"cpu": 256})
    monkeypatch.setattr(hardware, "COPIED", 1 << 20)
    monkeypatch.setattr(hardware, "_seconds", lambda work, device: work() is not None and 0.5)
    hardware._measured_peak.cache_clear()
    found = peak(torch.device("cpu"))
    hardware._measured_peak.cache_clear()
    # 2 * 256^3 operations, and 4 MiB read and written, in half a second
    assert found.flops_per_s == {"fp32": 2 * 2**25, "bf16": 2 * 2**25}
    assert found.bytes_per_s == 2 * 2 * 2**22
    assert found.source.startswith("measured: torch.mm of 256^3")


class NVMLError(Exception):
    pass


def fake_nvml(**functions):
    """NVML's names and a card that knows only some of its state."""

    def missing(*args):
        raise NVMLError("Not Supported")

    names = (
        "nvmlInit", "nvmlShutdown", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName", "nvmlSystemGetDriverVersion",
        "nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo", "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetTemperature", "nvmlDeviceGetCurrentClocksThrottleReasons",
    )  # fmt: skip
    module = types.ModuleType("pynvml")
    vars(module).update(dict.fromkeys(names, missing), NVMLError=NVMLError)
    vars(module).update(NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0)
    vars(module).update(
        nvmlClocksThrottleReasonGpuIdle=1,
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonNone=0,
        nvmlClocksThrottleReasonAll=13,
    )
    vars(module).update(functions)
    return module


def test_nvmls_readings_have_units_and_names(monkeypatch):
    shut = []
    module = fake_nvml(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: shut.append(True),
        nvmlDeviceGetHandleByIndex=lambda index: f"card {index}",
        nvmlDeviceGetName=lambda card: f"the name of {card}",
        nvmlDeviceGetClockInfo=lambda card, which: {1: 1755, 2: 2619}[which],
        nvmlDeviceGetPowerUsage=lambda card: 651234,
        nvmlDeviceGetEnforcedPowerLimit=lambda card: 700000,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda card: 1 | 4,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert gpu_state() == {
        "gpu": "the name of card 0",
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2619,
        "power_w": 651.234,
        "power_limit_w": 700.0,
        "throttle_reasons": ["SwPowerCap"],
    }
    assert shut == [True]


def test_without_nvml_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert gpu_state() == {"nvml": "Not Supported"}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_state() == {"nvml": "nvidia-ml-py is not installed"}


def test_the_machine_is_provenance_and_the_gpus_state():
    found = machine()
    assert {"commit", "date", "cpu", "versions"} <= found.keys()
    assert "nvml" in found or "driver" in found


def test_peaks_are_plain_numbers():
    assert isinstance(published_peak("NVIDIA H200"), Peak)
    assert set(published_peak("NVIDIA H200").flops_per_s) == {"bf16", "tf32", "fp32"}
