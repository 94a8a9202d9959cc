"""Medians, ratios and the Markdown tables of `bench_head.py`, and the targets they are held against."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from bench.head_child import Run
from bench.head_providers import PROVIDERS

# what ours is divided by
PEERS = ("trl", "trl-no-entropy", "liger", "liger-tf32", "logits", "cce", "cce-exact")
# ours may take at most this share of TRL's, and less than the rest; CPU: CPU seconds, and its resident memory
CPU_TIME_TARGET, CPU_MEMORY_TARGET = 0.35, 0.12
# CUDA: TRL and Liger must take at least 1.25 times as long
CUDA_TIME_TARGET, CUDA_MEMORY_TARGET = 0.8, 1.0


@dataclass(frozen=True)
class Result:
    """All runs at one shape.

    Attributes:
        shape: N, D, V.
        dtype: A key of `head_providers.DTYPES`.
        data: One of `head_providers.DATA`.
        device: "cpu" or "cuda".
        is_frozen: Whether the weight has no gradient.
        runs: Every process's measurements in the order they ran.
        failures: What the providers that failed said last.
    """

    shape: tuple[int, int, int]
    dtype: str
    data: str
    device: str
    is_frozen: bool
    runs: list[Run]
    failures: dict[str, str]

    def labels(self, *, trains: bool) -> list[str]:
        """Providers that ran, in order."""
        seen = dict.fromkeys(run.label for run in self.runs)
        return [label for label in seen if PROVIDERS[label].trains == trains]

    def seconds_of(self, run: Run) -> list[float]:
        """CPU seconds on a CPU, where other load stretches the wall clock; wall seconds on CUDA."""
        return run.cpu_s if self.device == "cpu" else run.wall_s

    def seconds(self, label: str) -> list[float]:
        """All iterations of all processes of one provider."""
        return [seconds for run in self.runs if run.label == label for seconds in self.seconds_of(run)]

    def extra_mib(self, label: str) -> float:
        """Median over the processes."""
        return median(run.extra_mib for run in self.runs if run.label == label)

    def errors(self, label: str) -> dict[str, float]:
        """Of the one process that was asked for them."""
        return next((run.errors for run in self.runs if run.label == label and run.errors), {})

    def tera_per_s(self, label: str, multiple: int) -> float:
        """Tera floating-point operations a second if a step were `multiple` * NDV of them."""
        N, D, V = self.shape
        return multiple * N * D * V / median(self.seconds(label)) / 1e12

    def ratio(self, label: str, other: str) -> float:
        """Median time over the other's."""
        return median(self.seconds(label)) / median(self.seconds(other))


def markdown(result: Result) -> str:
    """A table of the training steps, one of scoring, and whether ours meets the targets."""
    N, D, V = result.shape
    clock = "CPU s" if result.device == "cpu" else "wall s"
    head = "frozen head, " if result.is_frozen else ""
    parts = [f"N={N}, D={D}, V={V}, {result.dtype}, {head}{result.data} hidden states, {result.device}; {clock}"]
    for trains in (True, False):
        if result.labels(trains=trains):
            parts.append(_table(result, trains=trains, clock=clock))
    parts += targets(result)
    parts += [f"{label} failed: {message}" for label, message in result.failures.items()]
    return "\n\n".join(parts)


def _table(result: Result, *, trains: bool, clock: str) -> str:
    labels = result.labels(trains=trains)
    floor = next((label for label in labels if PROVIDERS[label].is_floor), None)
    peers = [label for label in labels if label in PEERS or label == "trl-scoring"]
    # the products that the result needs, and those with the logits recomputed
    multiples = ((4, 6) if result.is_frozen else (6, 8)) if trains else (2,)
    rows = [
        [
            "forward + backward" if trains else "scoring",
            f"{clock}, median (min - max)",
            *(f"/ {peer}" for peer in peers),
            *(f"TFLOP/s of {multiple}NDV" for multiple in multiples),
            f"share of the {multiples[0]}NDV floor",
            "extra MiB",
            "log-prob error, max (mean)",
            *(("dH error", "dW error") if trains else ()),
        ]
    ]
    rows.append(["---", *("---:" for _ in rows[0][1:])])
    for label in labels:
        errors = result.errors(label)
        rows.append(
            [
                label,
                _spread(result.seconds(label)),
                *(f"{result.ratio(label, peer):.2f}" for peer in peers),
                *(f"{result.tera_per_s(label, multiple):.3g}" for multiple in multiples),
                "" if floor is None else f"{100 * result.ratio(floor, label):.0f} %",
                f"{result.extra_mib(label):.0f}",
                f"{errors['logps_max']:.1e} ({errors['logps_mean']:.1e})" if "logps_max" in errors else "",
                *((_error(errors, "dhidden"), _error(errors, "dweight")) if trains else ()),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def targets(result: Result) -> list[str]:
    """One line for each peer that ran beside ours: the ratios of time and of memory, and whether they are met."""
    labels = result.labels(trains=True)
    ours = next((label for label in ("ours", "ours-two-calls") if label in labels), None)
    if ours is None:
        return []
    on_cpu = result.device == "cpu"
    limits = {
        "trl": (CPU_TIME_TARGET, CPU_MEMORY_TARGET) if on_cpu else (CUDA_TIME_TARGET, CUDA_MEMORY_TARGET),
        "liger": (1.0, None) if on_cpu else (CUDA_TIME_TARGET, CUDA_MEMORY_TARGET),
    }
    lines = []
    for peer, (time_limit, memory_limit) in limits.items():
        if peer in labels:
            line = f"{ours} / {peer}: time {_verdict(result.ratio(ours, peer), time_limit)}"
            if memory_limit is not None:
                line += f", memory {_verdict(result.extra_mib(ours) / result.extra_mib(peer), memory_limit)}"
            lines.append(line)
    return lines


def _verdict(ratio: float, limit: float) -> str:
    return f"{ratio:.2f} (target <= {limit}: {'met' if ratio <= limit else 'missed'})"


def _spread(values: list[float]) -> str:
    return f"{median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def _error(errors: dict[str, float], name: str) -> str:
    return f"{errors[name]:.1e}" if name in errors else ""
