"""Cutting rows of tokens into packs without padding.

Letters: B rows (one prompt with one completion), T packed tokens, N scored tokens, S attention segments.

A row's last completion token predicts nothing, so it is scored but never run. Rows with the same prompt may share its
tokens: the prompt is then a segment of its own, and each completion a segment that reads the prompt's keys and its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from grpo_fast.batch import Layout, Pack

# sharing must save this part of a group's tokens: below it the repeated prompt is cheaper than its extra key gather
MIN_SAVING = 0.1


def default_max_tokens(device: torch.device) -> int:
    """The budget of a pack when the user gives none: 16384 tokens on an accelerator, 2048 on a CPU.

    An accelerator needs some thousands of tokens to fill its matrix units. A CPU is full at a few hundred, and its
    activations compete for the cache.
    """
    return 2048 if device.type == "cpu" else 16384


@dataclass(frozen=True)
class _Unit:
    """Rows that go into one pack together: rows that share their prompt's tokens, or one row alone."""

    rows: tuple[int, ...]
    cost: int


def pack_rows(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    max_tokens: int | None,
    share_prompts: bool | Literal["auto"] = "auto",
    keep: Sequence[bool] | None = None,
) -> list[Pack]:
    """Lay rows into the fewest packs a first-fit-decreasing search finds, evenly filled.

    Rows with an empty completion and rows with `keep` False have nothing to score and take no space.

    Args:
        prompt_ids: B lists of token ids, none empty where the row is scored.
        completion_ids: B lists of token ids, possibly empty.
        max_tokens: Most tokens of a pack, None for no bound. A row longer than this makes a pack of its own.
        share_prompts: True lets rows with identical prompts share its tokens, "auto" only where that saves at least a
            tenth of the group's tokens. A group that exceeds the budget is split, and each part repeats the prompt.
        keep: B flags, None for all rows.

    Returns:
        The packs, on the host, by their first row. Every token of a kept completion is scored in exactly one.

    Raises:
        ValueError: If lengths differ, `max_tokens` is not positive, or a scored row has an empty prompt.
    """
    rows = rows_to_score(prompt_ids, completion_ids, max_tokens=max_tokens, keep=keep)
    if share_prompts not in (True, False, "auto"):
        raise ValueError(f"share_prompts must be True, False or 'auto', got {share_prompts!r}")
    units = _units(rows, prompt_ids, completion_ids, max_tokens, share_prompts)
    bins = _fill([unit.cost for unit in units], max_tokens)
    packs = [[units[i] for i in members] for members in bins]
    packs = [sorted(pack, key=lambda unit: unit.rows) for pack in packs]
    packs.sort(key=lambda pack: pack[0].rows)
    return [_build(pack, prompt_ids, completion_ids) for pack in packs]


def rows_to_score(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    max_tokens: int | None,
    keep: Sequence[bool] | None,
) -> list[int]:
    """The rows that `keep` keeps and that have a completion; the arguments are `pack_rows`'s, and checked."""
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(
            f"completion_ids must have one list for each of the {len(prompt_ids)} prompt_ids, got {len(completion_ids)}"
        )
    if keep is not None and len(keep) != len(prompt_ids):
        raise ValueError(f"keep must have one flag for each of the {len(prompt_ids)} rows, got {len(keep)}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1 or None, got {max_tokens}")
    rows = [i for i, completion in enumerate(completion_ids) if completion and (keep is None or keep[i])]
    for row in rows:
        if not prompt_ids[row]:
            raise ValueError(f"prompt_ids[{row}] must hold at least one token: nothing predicts its completion's first")
    return rows


def _units(
    rows: list[int],
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    max_tokens: int | None,
    share_prompts: bool | str,
) -> list[_Unit]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(prompt_ids[row]), []).append(row)
    units = []
    for prompt, members in groups.items():
        # the last token of a completion is not run
        queries = [len(completion_ids[row]) - 1 for row in members]
        alone = [_Unit((row,), len(prompt) + count) for row, count in zip(members, queries, strict=True)]
        if share_prompts is False or len(members) == 1:
            units += alone
            continue
        room = None if max_tokens is None else max_tokens - len(prompt)
        shared = [
            _Unit(tuple(sorted(members[i] for i in part)), len(prompt) + sum(queries[i] for i in part))
            for part in _fill(queries, room)
        ]
        cost_alone = sum(unit.cost for unit in alone)
        cost_shared = sum(unit.cost for unit in shared)
        pays = share_prompts is True or cost_shared <= (1 - MIN_SAVING) * cost_alone
        units += shared if pays else alone
    return units


def _fill(costs: list[int], capacity: int | None) -> list[list[int]]:
    """Distribute items over the bins first-fit decreasing needs, then spread them evenly where they still fit.

    An item larger than `capacity` gets a bin of its own.
    """
    if capacity is None:
        return [list(range(len(costs)))] if costs else []
    large = [[i] for i, cost in enumerate(costs) if cost > capacity]
    order = sorted((i for i, cost in enumerate(costs) if cost <= capacity), key=lambda i: -costs[i])
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in order:
        target = next((b for b, load in enumerate(loads) if load + costs[i] <= capacity), None)
        if target is None:
            bins.append([i])
            loads.append(costs[i])
        else:
            bins[target].append(i)
            loads[target] += costs[i]
    even: list[list[int]] = [[] for _ in bins]
    even_loads = [0] * len(bins)
    for i in order:
        target = even_loads.index(min(even_loads))
        even[target].append(i)
        even_loads[target] += costs[i]
    # a bin can stay empty only when several items cost nothing
    if even and max(even_loads) <= capacity and all(even):
        bins = even
    return large + bins


def _build(units: list[_Unit], prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    queries: list[int] = []
    keys: list[Tensor] = []
    # per row: the packed position before its first completion token's successor, see below
    first_predict: dict[int, int] = {}
    body_start: dict[int, int] = {}
    for unit in units:
        prompt = prompt_ids[unit.rows[0]]
        prompt_start = len(ids)
        shared = len(unit.rows) > 1
        ids += prompt
        positions += range(len(prompt))
        if shared:
            queries.append(len(prompt))
            keys.append(torch.arange(prompt_start, len(ids)))
        for row in unit.rows:
            body = completion_ids[row][:-1]
            first_predict[row] = prompt_start + len(prompt) - 1
            body_start[row] = len(ids)
            ids += body
            positions += range(len(prompt), len(prompt) + len(body))
            own = torch.arange(body_start[row], len(ids))
            if not shared:
                queries.append(len(prompt) + len(body))
                keys.append(torch.arange(prompt_start, len(ids)))
            elif body:
                queries.append(len(body))
                keys.append(torch.cat([torch.arange(prompt_start, prompt_start + len(prompt)), own]))
    row_ids = sorted(first_predict)
    lengths = [len(completion_ids[row]) for row in row_ids]
    predict: list[int] = []
    for row, length in zip(row_ids, lengths, strict=True):
        predict += [first_predict[row], *range(body_start[row], body_start[row] + length - 1)]
    key_lengths = [len(key) for key in keys]
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        layout=Layout(
            cu_queries=torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
            cu_keys=torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32),
            key_index=torch.cat(keys) if any(len(unit.rows) > 1 for unit in units) else None,
            query_lengths=tuple(queries),
            key_lengths=tuple(key_lengths),
        ),
        predict=torch.tensor(predict),
        targets=torch.tensor([token for row in row_ids for token in completion_ids[row]]),
        rows=torch.repeat_interleave(torch.tensor(row_ids), torch.tensor(lengths)),
        columns=torch.cat([torch.arange(length) for length in lengths]),
        row_ids=tuple(row_ids),
        row_lengths=tuple(lengths),
    )
