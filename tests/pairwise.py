"""A covering array: few cases in which every two levels of different factors meet at least once.

Greedy and deterministic, after AETG (Cohen et al., 1997): a case starts from a pair that has not met, and each further
factor takes the level that makes the most new pairs; of several such cases the best is kept.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

Levels = Mapping[str, Sequence[Any]]
Assignment = dict[str, Any]
# some factors, and whether levels of them, in this order, rule each other out
Constraint = tuple[tuple[str, ...], Callable[..., bool]]
Pair = frozenset[tuple[str, Any]]

# cases that compete for each place in the array
CANDIDATES = 8


def pairs_of(case: Assignment) -> Iterator[Pair]:
    """Every two of a case's (factor, level)."""
    return map(frozenset, itertools.combinations(case.items(), 2))


def covering_array(levels: Levels, constraints: Sequence[Constraint], seed: int = 0) -> list[Assignment]:
    """Cases with a level of every factor, in the order of `levels`; every pair that some case can have is in one."""
    rng = random.Random(seed)
    # dicts, unlike sets, have an order
    wanted = dict.fromkeys(possible_pairs(levels, constraints))
    cases = []
    while wanted:
        starts = [dict(rng.choice(list(wanted))) for _ in range(CANDIDATES)]
        candidates = [_filled(start, levels, constraints, wanted, rng) for start in starts]
        best = max(candidates, key=lambda case: sum(pair in wanted for pair in pairs_of(case or {})))
        assert best is not None
        for pair in pairs_of(best):
            wanted.pop(pair, None)
        cases.append({name: best[name] for name in levels})
    return cases


def possible_pairs(levels: Levels, constraints: Sequence[Constraint]) -> Iterator[Pair]:
    """Every two levels of different factors that some case can have."""
    constrained = {name: levels[name] for name in levels if any(name in names for names, _ in constraints)}
    rng = random.Random(0)
    for (name, some), (other, others) in itertools.combinations(levels.items(), 2):
        for level, other_level in itertools.product(some, others):
            case = {name: level, other: other_level}
            if _filled(case, constrained, constraints, (), rng) is not None:
                yield frozenset(case.items())


def _filled(
    case: Assignment, levels: Levels, constraints: Sequence[Constraint], wanted: Collection[Pair], rng: random.Random
) -> Assignment | None:
    """`case` with a level of every factor, in a random order and with the most wanted pairs first; None if none can."""
    missing = [name for name in levels if name not in case]
    if _is_ruled_out(case, constraints) or not all(_has_level(name, case, levels, constraints) for name in missing):
        return None
    if not missing:
        return case
    name = rng.choice(missing)

    def gain(level: Any) -> int:
        return sum(frozenset({(name, level), known}) in wanted for known in case.items())

    shuffled = rng.sample(list(levels[name]), len(levels[name]))
    for level in sorted(shuffled, key=gain, reverse=True):
        filled = _filled(case | {name: level}, levels, constraints, wanted, rng)
        if filled is not None:
            return filled
    return None


def _has_level(name: str, case: Assignment, levels: Levels, constraints: Sequence[Constraint]) -> bool:
    """Whether a missing factor has a level left."""
    near = [constraint for constraint in constraints if name in constraint[0]]
    return not near or any(not _is_ruled_out(case | {name: level}, near) for level in levels[name])


def _is_ruled_out(case: Assignment, constraints: Sequence[Constraint]) -> bool:
    known = case.keys()
    return any(known >= set(names) and is_refused(*(case[name] for name in names)) for names, is_refused in constraints)
