"""What one trainer's process measured on a length profile, and the tables that compare TRL with grpo_fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from bench.profile_rows import MICRO_BATCHES, PROFILES

# CPU seconds must fall by at least this part of the token ratio
SECONDS_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The micro-batches of one optimizer step, or the first of them.

    Attributes:
        label: "trl" or "grpo-fast".
        profile: Of `profile_rows.PROFILES`.
        scale: What the profile's lengths are multiplied by.
        layers: Of the policy; None where tokens are counted only.
        vocabulary: Of the policy.
        rows: Digest of the rows, to prove that both trainers had the same.
        true_tokens: Tokens of all rows, nothing padded or shared.
        longest: Tokens of the longest prompt and of the longest completion.
        passes: Tokens of each forward pass, by micro-batch.
        cpu_s: CPU seconds of the training phase (`training_step` without the rollout), by micro-batch.
        wall_s: Wall seconds of it.
        peak_rss_mib: Highest resident size of the process.
        loaded_rss_mib: The same before the step: imports, model, trainer.
        peak_cuda_mib: Highest size of torch's CUDA allocations, or None on a CPU.
        threads: torch's intra-op threads.
        model: The policy's name.
        phases: Seconds of each phase of the step by micro-batch, by the clock that counts: CPU seconds on a CPU, wall
            seconds on a GPU.
    """

    label: str
    profile: str
    scale: float
    layers: int | None
    vocabulary: int
    rows: str
    true_tokens: int
    longest: tuple[int, int]
    passes: list[list[int]]
    cpu_s: list[float]
    wall_s: list[float]
    peak_rss_mib: float
    loaded_rss_mib: float
    peak_cuda_mib: float | None
    threads: int
    model: str = "SmolLM2-135M"
    phases: dict[str, list[float]] = field(default_factory=dict)

    @property
    def micro_batches(self) -> int:
        """How many of the step's micro-batches were run."""
        return len(self.passes)

    @property
    def tokens(self) -> int:
        """Tokens that the whole step runs through the transformer."""
        counts = [sum(passes) for passes in self.passes]
        if self.micro_batches < MICRO_BATCHES and len(set(counts)) > 1:
            raise ValueError(f"{self.label}'s micro-batches differ ({counts} tokens): run all {MICRO_BATCHES}")
        return round(window(counts))

    @property
    def seconds(self) -> float:
        """CPU seconds of the whole step's training phase; wall seconds where a GPU trains."""
        return window(self.cpu_s if self.peak_cuda_mib is None else self.wall_s)


def window(values: list[float] | list[int]) -> float:
    """The sum over the step's micro-batches. Where only the first were run, the others cost what the later of them do.

    The first pays for memory and compiled products that the others use again.
    """
    missing = MICRO_BATCHES - len(values)
    return sum(values) + missing * fmean(values[1:] or values)


def tokens_table(counted: list[Measured]) -> str:
    """A row a profile at its true lengths: what each trainer runs through the transformer."""
    head = (
        "profile",
        "longest prompt + completion",
        "true tokens",
        "TRL / true",
        "ours / true",
        "TRL",
        "ours",
        "TRL / ours",
        "target",
    )
    rows = []
    for peer, ours in _pairs(counted):
        target = PROFILES[ours.profile].target
        ratio = peer.tokens / ours.tokens
        # the targets are given to one decimal
        met = "met" if round(ratio, 1) >= target else "missed"
        rows.append(
            [
                ours.profile,
                f"{ours.longest[0]} + {ours.longest[1]}",
                f"{ours.true_tokens}",
                f"{peer.tokens / peer.true_tokens:.2f}",
                f"{ours.tokens / ours.true_tokens:.2f}",
                f"{peer.tokens}",
                f"{ours.tokens}",
                f"{ratio:.2f}",
                f"{target} ({met})",
            ]
        )
    return _markdown([list(head), *rows])


def seconds_table(timed: list[Measured]) -> str:
    """A row a profile at the lengths that were timed: seconds and memory of the training phase."""
    clock = "CPU s" if all(run.peak_cuda_mib is None for run in timed) else "wall s"
    head = (
        "profile",
        "lengths",
        "TRL tokens",
        "our tokens",
        "ratio",
        f"TRL {clock}",
        f"our {clock}",
        "ratio",
        "share of the token ratio",
        "TRL peak MiB",
        "our peak MiB",
    )
    rows = []
    for peer, ours in _pairs(timed):
        tokens, seconds = peer.tokens / ours.tokens, peer.seconds / ours.seconds
        share = seconds / tokens
        rows.append(
            [
                ours.profile,
                f"x {ours.scale:g}",
                f"{peer.tokens}",
                f"{ours.tokens}",
                f"{tokens:.2f}",
                _seconds(peer),
                _seconds(ours),
                f"{seconds:.2f}",
                f"{share:.0%} ({'met' if share >= SECONDS_SHARE else 'missed'})",
                f"{_peak_mib(peer):.0f}",
                f"{_peak_mib(ours):.0f}",
            ]
        )
    return _markdown([list(head), *rows])


def same_rows(runs: list[Measured]) -> bool:
    """Whether both trainers had the same rows in each profile."""
    return all(peer.rows == ours.rows for peer, ours in _pairs(runs))


def _pairs(runs: list[Measured]) -> list[tuple[Measured, Measured]]:
    by_profile: dict[str, dict[str, Measured]] = {}
    for run in runs:
        by_profile.setdefault(run.profile, {})[run.label] = run
    return [(pair["trl"], pair["grpo-fast"]) for pair in by_profile.values() if len(pair) == 2]


def _seconds(run: Measured) -> str:
    measured = "" if run.micro_batches == MICRO_BATCHES else f" ({run.micro_batches} of {MICRO_BATCHES} run)"
    return f"{run.seconds:.3g}{measured}"


def _peak_mib(run: Measured) -> float:
    return run.peak_rss_mib if run.peak_cuda_mib is None else run.peak_cuda_mib


def _markdown(rows: list[list[str]]) -> str:
    rows.insert(1, ["---", *("---:" for _ in rows[0][1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
