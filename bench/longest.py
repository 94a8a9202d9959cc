"""The longest sequence that fits, found in few measurements: each is a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# lengths are multiples of this many tokens
GRANULE = 64
# a length is taken for the longest when one this much longer does not fit
PRECISION = 0.02
# lengths that a line through measured peaks may choose, before the search only doubles and halves
MAX_GUESSES = 7
# the least ratio of two lengths through whose peaks it is drawn
APART = 1.2


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured length.

    Attributes:
        length: Tokens of the sequence.
        fits: Whether a step on it stayed within the budget.
        budget_mib: What it had to stay within.
        peak_mib: What the step took at most; None where it ran out.
        seconds: Wall seconds of a step, or None.
    """

    length: int
    fits: bool
    budget_mib: float
    peak_mib: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Found:
    """The points in the order they were measured.

    Attributes:
        points: At least one.
        is_bounded: Whether a length was found that does not fit; else the search ended at its limit.
    """

    points: list[Point]
    is_bounded: bool

    @property
    def longest(self) -> Point | None:
        """The longest that fits, or None where not even the shortest does."""
        return max((point for point in self.points if point.fits), key=lambda point: point.length, default=None)


def find_longest(measure: Callable[[int], Point], *, start: int, limit: int) -> Found:
    """Double from `start` until a length does not fit, then close in on the boundary to `PRECISION`.

    Where a line through the measured peaks meets the budget, what is tried lies a little below that and then a little
    above; where there are no peaks, in the middle. Where `start` does not fit, it is halved first.

    Args:
        measure: One length, a multiple of `GRANULE`.
        start: The first length.
        limit: No longer one is tried.

    Raises:
        ValueError: If `start` is not between `GRANULE` and `limit`.
    """
    if not GRANULE <= start <= limit:
        raise ValueError(f"start must be between {GRANULE} and limit={limit}, got {start}")
    points: list[Point] = []
    # the longest that fits and the shortest that does not, 0 for none yet
    low, high, length, limit = 0, 0, _down(start), _down(limit)
    while True:
        points.append(measure(length))
        if points[-1].fits:
            low = length
        else:
            high = length
        if low == limit or high == GRANULE:
            break
        if low and high and high - low <= max(GRANULE, PRECISION * low):
            break
        length = _next_length(points, low=low, high=high, limit=limit)
    return Found(points, is_bounded=high > 0)


def _next_length(points: list[Point], *, low: int, high: int, limit: int) -> int:
    if not low:
        return max(_down(high / 2), GRANULE)
    boundary = _boundary(points) if len(points) <= MAX_GUESSES else None
    above = high or min(2 * low, limit) + GRANULE
    if boundary is not None:
        for guess in (_down(boundary * (1 - PRECISION / 3)), _up(boundary * (1 + PRECISION / 3))):
            if low < guess < above:
                return guess
    return _down((low + high) / 2) if high else min(2 * low, limit)


def _boundary(points: list[Point]) -> float | None:
    """The length that takes the budget, by a line through the peak nearest to it and the next one of another length."""
    known = sorted((abs(p.peak_mib - p.budget_mib), p.length, p.peak_mib) for p in points if p.peak_mib is not None)
    if not known:
        return None
    _, near, near_peak = known[0]
    # peaks scatter: those of much the same length make no line
    others = [(length, peak) for _, length, peak in known if max(near, length) >= APART * min(near, length)]
    if not others:
        return None
    other, other_peak = others[0]
    slope = (other_peak - near_peak) / (other - near)
    return near + (points[0].budget_mib - near_peak) / slope if slope > 0 else None


def _down(length: float) -> int:
    return int(length) // GRANULE * GRANULE


def _up(length: float) -> int:
    return -(-int(length) // GRANULE) * GRANULE
