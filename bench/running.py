"""Running one case: every provider checked against float64, then all of them timed in turn on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.hardware import Peak, gpu_state, peak
from bench.measuring import Measurement, Rotation, Rounds, Step, copies_needed, measure
from bench.ops import MIB, Case, Op, operand_bytes
from bench.provider import Provider


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What was found of one case.

    Attributes:
        case: The case.
        measurements: By label; without the wrong ones, and empty if nothing was timed.
        errors: Of each checked provider against float64, by label and by what was compared.
        failures: Why a provider has no figure: a wrong result, or what it died of.
        absent: Why a provider could not run here.
        peak: Of the device.
        clock: What the seconds are.
        gpu: Its state after the last round, empty without one.
    """

    case: Case
    measurements: dict[str, Measurement] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    peak: Peak | None = None
    clock: str = ""
    gpu: dict[str, object] = field(default_factory=dict)


def run_case(
    op: Op,
    case: Case,
    labels: Sequence[str],
    *,
    absent: dict[str, str],
    device: torch.device,
    rounds: Rounds,
    is_timed: bool = True,
) -> CaseResult:
    """Check and time providers of a case; a failure of one does not stop the others.

    Args:
        op: The op.
        case: A case of it.
        labels: The providers.
        absent: Why others do not run here, by label; those of `labels` that are in it are left out.
        device: Where.
        rounds: How often.
        is_timed: Or only checked.
    """
    on_cuda = device.type == "cuda"
    chosen = [label for label in labels if label not in absent]
    errors, failures = _check(op, case, chosen, device)
    result = CaseResult(case=case, errors=errors, failures=failures, absent=absent)
    if not is_timed:
        return result
    measurements = time_steps(op, case, [label for label in chosen if label not in failures], device, rounds)
    failures |= {label: found.error for label, found in measurements.items() if found.error is not None}
    return CaseResult(
        case=case,
        measurements={label: found for label, found in measurements.items() if found.error is None},
        errors=errors,
        failures=failures,
        absent=absent,
        peak=peak(device),
        clock="seconds on the device" if on_cuda else f"CPU seconds, {torch.get_num_threads()} thread(s)",
        gpu=gpu_state() if on_cuda else {},
    )


def _check(
    op: Op, case: Case, labels: Sequence[str], device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    errors: dict[str, dict[str, float]] = {}
    failures: dict[str, str] = {}
    errors_of = op.checker(case, device)
    for label in labels:
        provider = op.providers[label]
        if provider.is_floor:
            continue
        try:
            errors[label] = errors_of(provider)
            op.check(case, provider, errors[label])
        except Exception as error:
            failures[label] = f"{type(error).__name__}: {error}"
    return errors, failures


class OpSteps:
    """The steps of a case's providers on inputs that rotate past the GPU's cache.

    Attributes:
        copies: Of the inputs.
        steps: By label.
        before: What comes before each step and is not timed; empty where steps leave nothing behind.
    """

    def __init__(self, op: Op, case: Case, labels: Sequence[str], device: torch.device) -> None:
        self._first = op.make(case, device)
        self.copies = copies_needed(operand_bytes(self._first), device)
        # the first copy exists already: it says how large they are
        made = iter([self._first])
        self._rotation: Rotation[Any] = Rotation(lambda: next(made, None) or op.make(case, device), self.copies)
        self._current = self._first
        self._op = op
        providers = {label: op.providers[label] for label in labels}
        self.before: dict[str, Step] = {}
        if op.clear is not None:
            self.before = {label: self._clearing(provider) for label, provider in providers.items()}
            self.steps: dict[str, Step] = {label: self._same(provider) for label, provider in providers.items()}
        else:
            self.steps = {label: self._next(provider) for label, provider in providers.items()}

    def _clearing(self, provider: Provider) -> Step:
        def before() -> None:
            # gradients that lie beside another copy would count as memory that was held before
            clear(self._current, provider)
            self._current = self._rotation()
            clear(self._current, provider)

        clear = self._op.clear
        assert clear is not None
        return before

    def _same(self, provider: Provider) -> Step:
        return lambda: provider.step(self._current)

    def _next(self, provider: Provider) -> Step:
        return lambda: provider.step(self._rotation())


def time_steps(
    op: Op, case: Case, labels: Sequence[str], device: torch.device, rounds: Rounds
) -> dict[str, Measurement]:
    """Time the providers in turn."""
    inputs = OpSteps(op, case, labels, device)
    return measure(inputs.steps, device=device, before=inputs.before, warmups=inputs.copies, rounds=rounds)


def extra_info(op: Op, result: CaseResult, label: str) -> dict[str, object]:
    """What a figure needs beside its seconds, JSON-ready."""
    work, found, case = op.work(result.case), result.measurements[label], result.case
    assert result.peak is not None
    floor = work.floor_seconds(result.peak)
    return {
        "op": op.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "data": case.data,
        "label": label,
        "is_ours": op.providers[label].is_ours,
        "flops": work.flops,
        "flop_convention": work.convention,
        "bytes": work.num_bytes,
        "floor_seconds": floor,
        "share_of_floor": floor / found.median,
        "tflops": work.flops / found.median / 1e12,
        "gbps": work.num_bytes / found.median / 1e9,
        "peak_mib": found.peak_mib,
        "memory_lower_bound_mib": work.result_bytes / MIB,
        "errors": result.errors.get(label, {}),
        "clock": result.clock,
        "runs_per_sample": found.iterations,
        "peak_source": result.peak.source,
        "absent": result.absent,
        "failed": result.failures,
        "gpu": result.gpu,
    }
