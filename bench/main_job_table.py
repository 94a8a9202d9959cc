"""Per-step records of the main job, their medians, and the Markdown table that compares the trainers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

PHASES = ("generation", "rewards", "train", "weight sync", "other")
# the first steps pay for lazy set-up and cold caches
WARMUP_STEPS = 2
# the mean reward is shown over this many steps at either end
REWARD_STEPS = 5
PEER = "trl"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step.

    Attributes:
        cpu_s: CPU seconds of the whole process by phase; the phases add up to the step.
        wall_s: Wall seconds by phase.
        tokens: Completion tokens in the step's batch.
        prompts: Digest of the prompts, to prove that the trainers saw the same ones.
        reward: Mean reward of the step's completions.
        zero_std: Share of groups whose rewards are all equal, which carry no gradient.
    """

    cpu_s: dict[str, float]
    wall_s: dict[str, float]
    tokens: int
    prompts: str
    reward: float
    zero_std: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one child process measured.

    Attributes:
        label: Trainer and engine.
        steps: All steps, warm-up included.
        peak_rss_mib: Highest resident size of the process, from its start to its end.
        loaded_rss_mib: The same before the first step: imports, model, engine.
        peak_cuda_mib: Highest size of torch's CUDA allocations, or None on a CPU.
        device: Name of the GPU, or "cpu".
        startup_s: Wall seconds from the start of the imports to the first step.
        threads: torch's intra-op threads after the last step.
        children: Processes alive under this one after the last step; their CPU seconds and memory are not counted.
    """

    label: str
    steps: list[Step]
    peak_rss_mib: float
    loaded_rss_mib: float
    peak_cuda_mib: float | None
    device: str
    startup_s: float
    threads: int
    children: int

    @property
    def measured(self) -> list[Step]:
        """The steps after the warm-up."""
        return self.steps[WARMUP_STEPS:]

    @property
    def peak_mib(self) -> float:
        """Peak memory of the device that trains."""
        return self.peak_rss_mib if self.peak_cuda_mib is None else self.peak_cuda_mib

    def seconds(self, phase: str, *, clock: str) -> list[float]:
        """Seconds of `phase`, or of the whole "step", in each measured step by `clock`, "cpu" or "wall"."""
        spent = [step.cpu_s if clock == "cpu" else step.wall_s for step in self.measured]
        return [sum(phases.values()) if phase == "step" else phases[phase] for phases in spent]

    def tokens_per_s(self, *, clock: str) -> list[float]:
        """Completion tokens per second of the whole step, in each measured step."""
        seconds = self.seconds("step", clock=clock)
        return [step.tokens / spent for step, spent in zip(self.measured, seconds, strict=True)]


def ratio_clock(run: Run) -> str:
    """CPU seconds on a CPU, where other load stretches the wall clock; wall seconds on a GPU, which CPU time misses."""
    return "cpu" if run.peak_cuda_mib is None else "wall"


# what is divided by the peer's, and the most that the quotient may be
TARGETS: dict[str, tuple[Callable[[Run], float], float]] = {
    "train phase": (lambda run: median(run.seconds("train", clock=ratio_clock(run))), 0.3),
    "whole step": (lambda run: median(run.seconds("step", clock=ratio_clock(run))), 0.3),
    "peak memory": (lambda run: run.peak_mib, 0.5),
}


def ratios(run: Run, peer: Run) -> dict[str, float]:
    """`run`'s share of `peer`'s cost, for each of `TARGETS`."""
    return {name: measure(run) / measure(peer) for name, (measure, _) in TARGETS.items()}


def same_prompts(runs: list[Run]) -> bool:
    """Whether all runs trained on the same prompts in the same order."""
    return len({tuple(step.prompts for step in run.steps) for run in runs}) == 1


def markdown(runs: list[Run]) -> str:
    """One table: a column per run, a row per quantity.

    Args:
        runs: At least one run, each longer than the warm-up. Ratios are shown if one of them is the peer's.

    Returns:
        The table; cells are "median (minimum - maximum)" over the measured steps.
    """
    rows = [["", *(run.label for run in runs)]]
    for clock in ("cpu", "wall"):
        for phase in (*PHASES, "step"):
            rows.append([f"{phase}, {clock} s", *(_spread(run.seconds(phase, clock=clock)) for run in runs)])
        rows.append([f"tokens trained / {clock} s", *(_spread(run.tokens_per_s(clock=clock)) for run in runs)])
    rows.append(["peak RSS, MiB", *(f"{run.peak_rss_mib:.0f}" for run in runs)])
    rows.append(["RSS before the first step, MiB", *(f"{run.loaded_rss_mib:.0f}" for run in runs)])
    if any(run.peak_cuda_mib is not None for run in runs):
        rows.append(["peak CUDA memory, MiB", *(f"{run.peak_cuda_mib or 0:.0f}" for run in runs)])
    rows.append([f"reward, first {REWARD_STEPS} / last {REWARD_STEPS}", *(_reward(run) for run in runs)])
    rows.append(["groups without signal", *(f"{fmean(s.zero_std for s in run.measured):.2f}" for run in runs)])
    rows += _ratio_rows(runs)
    rows.insert(1, ["---", *("---:" for _ in runs)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _ratio_rows(runs: list[Run]) -> list[list[str]]:
    peer = next((run for run in runs if run.label == PEER), None)
    if peer is None or len(runs) == 1:
        return []
    shares = [ratios(run, peer) for run in runs]
    rows = []
    for name, (_, target) in TARGETS.items():
        cells = [
            "1" if run is peer else f"{share[name]:.2f} ({'met' if share[name] <= target else 'missed'})"
            for run, share in zip(runs, shares, strict=True)
        ]
        rows.append([f"{name} / {PEER}'s, target <= {target}", *cells])
    return rows


def _spread(values: list[float]) -> str:
    # three significant digits: rewards take fractions of a millisecond, a step takes tens of seconds
    return f"{median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


def _reward(run: Run) -> str:
    rewards = [step.reward for step in run.steps]
    return f"{fmean(rewards[:REWARD_STEPS]):.2f} / {fmean(rewards[-REWARD_STEPS:]):.2f}"
