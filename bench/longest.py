"""The longest sequence that fits, found in few measurements: each is a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

# lengths are multiples of this many tokens
GRANULE = 64
# a length is taken for the longest when one this much longer does not fit
PRECISION = 0.02
# guesses by a line through measured peaks, before the search only halves what is left
MAX_GUESSES = 5


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

    What lies between is tried where a line through the measured peaks meets the budget, a little below it and then a
    little above; by halves where there are no peaks. Where `start` does not fit, it is halved first.

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

    def try_length(length: int) -> bool:
        points.append(measure(length))
        return points[-1].fits

    low, high = 0, 0
    length, limit = _rounded(start), _rounded(limit)
    while True:
        if try_length(length):
            low = length
            if high or low == limit:
                break
            length = min(2 * length, limit)
        else:
            high = length
            if low or high == GRANULE:
                break
            length = max(_rounded(length / 2), GRANULE)
    if not high:
        return Found(points, is_bounded=False)
    guesses = 0
    while low and high - low > max(GRANULE, PRECISION * low):
        guess = _guess(points, low, high) if guesses < MAX_GUESSES else None
        guesses += 1
        middle = _rounded((low + high) / 2) if guess is None else guess
        if try_length(middle):
            low = middle
        else:
            high = middle
    return Found(points, is_bounded=True)


def _rounded(length: float) -> int:
    return int(length) // GRANULE * GRANULE


def _guess(points: list[Point], low: int, high: int) -> int | None:
    """A length between `low` and `high` that decides most by what the peaks of the nearest two points promise."""
    known = sorted((p.length, p.peak_mib, p.budget_mib) for p in points if p.peak_mib is not None)
    # the pair around the boundary, or the last one below it
    pairs = [(left, right) for left, right in pairwise(known) if left[0] <= low and left[0] < right[0]]
    if not pairs:
        return None
    (left, left_peak, budget), (right, right_peak, _) = pairs[-1]
    if right_peak <= left_peak:
        return None
    boundary = left + (right - left) * (budget - left_peak) / (right_peak - left_peak)
    for share in (1 - PRECISION / 3, 1 + PRECISION / 3):
        length = _rounded(boundary * share)
        if low < length < high:
            return length
    return None
