"""Cutting rows of tokens into packs without padding.

Letters: B rows (one prompt with one completion), T packed tokens, N scored tokens, S attention segments.

A row's last completion token predicts nothing, so it is scored but never run. Rows that begin alike may share those
tokens (`grpo_fast.prefix_tree`): a segment then reads its own keys and those of the tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from grpo_fast.batch import Layout, Pack
from grpo_fast.prefix_tree import MIN_SAVING, PrefixTree, Span


def default_max_tokens(device: torch.device) -> int:
    """The budget of a pack when the user gives none: 16384 tokens on an accelerator, 8192 on a CPU.

    A group has to fit, or its parts repeat the prompt: with eight completions behind a prompt of some thousand tokens
    that doubles what is run. An accelerator also needs some thousands of tokens to fill its matrix units.
    """
    return 8192 if device.type == "cpu" else 16384


# smaller packs that repeat beginnings which larger ones run once may run this part more tokens
MAX_REPEATED = 0.03


@dataclass(frozen=True)
class _Unit:
    """Rows that go into one pack together: rows that share their prompt's tokens, or one row alone.

    Attributes:
        rows: Ascending.
        tokens: That are run.
        pairs: Of queries and keys, which attention costs.
    """

    rows: tuple[int, ...]
    tokens: int
    pairs: int

    @staticmethod
    def of(rows: Sequence[int], prompt: int, lengths: Sequence[int]) -> _Unit:
        """Rows that share a prompt, of so many tokens each beside it."""
        pairs = _triangle(prompt) + sum(length * prompt + _triangle(length) for length in lengths)
        return _Unit(tuple(rows), prompt + sum(lengths), pairs)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def pack_rows(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    max_tokens: int | None,
    share_prompts: bool | Literal["auto"] = "auto",
    fill_tokens: int | None = None,
    hidden_size: int | None = None,
    runs_everything: bool = False,
    keep: Sequence[bool] | None = None,
) -> list[Pack]:
    """Lay rows into the fewest packs that first-fit-decreasing finds, which cost about the same each.

    A pack's cost is that of a decoder: of its tokens in the linear layers and of its pairs of tokens in attention. Rows
    go longest processing time first to the pack that has cost the least (Graham 1969), unless that breaks the budget.

    Rows with an empty completion and rows with `keep` False have nothing to score and take no space.

    Args:
        prompt_ids: B lists of token ids, none empty where the row is scored.
        completion_ids: B lists of token ids, possibly empty.
        max_tokens: Most tokens of a pack, None for no bound. A row longer than this makes a pack of its own.
        share_prompts: True lets rows share identical prompts and other long beginnings, "auto" only where that saves at
            least 2 % of their tokens. A group that exceeds the budget is split, and each part repeats the prompt.
        fill_tokens: Most tokens of a pack of several groups, where smaller packs cost less memory and no more time and
            run at most 3 % more tokens; None for `max_tokens`. A larger group or row makes a pack of its own.
        hidden_size: D of the model, which says what attention costs beside linear layers: a token's 6 D keys cost what
            its linear layers cost (12 D^2 weights a layer). None balances tokens alone.
        runs_everything: Run the last token of a completion, and prompts without one, for losses that count tokens.
        keep: B flags, None for all rows.

    Returns:
        The packs, on the host, by their first row. Every token of a kept completion is scored in exactly one.

    Raises:
        ValueError: If lengths differ, `max_tokens` or `fill_tokens` is not positive, or a scored row has an empty
            prompt.
    """
    bodies = rows_to_run(prompt_ids, completion_ids, max_tokens=max_tokens, runs_everything=runs_everything, keep=keep)
    if share_prompts not in (True, False, "auto"):
        raise ValueError(f"share_prompts must be True, False or 'auto', got {share_prompts!r}")
    if fill_tokens is not None and fill_tokens < 1:
        raise ValueError(f"fill_tokens must be at least 1 or None, got {fill_tokens}")
    units = _units(prompt_ids, bodies, max_tokens, share_prompts)
    width = 0 if hidden_size is None else 6 * hidden_size

    def packs_of(capacity: int | None) -> list[Pack]:
        bins = _fill(units, capacity, cost=lambda unit: unit.tokens * width + unit.pairs if width else unit.tokens)
        packs = [sorted(row for unit in members for row in unit.rows) for members in bins]
        return [_build(rows, prompt_ids, completion_ids, bodies, share_prompts) for rows in sorted(packs)]

    if fill_tokens is None or (max_tokens is not None and fill_tokens >= max_tokens):
        return packs_of(max_tokens)
    small = packs_of(fill_tokens)
    if share_prompts is False or len(small) == 1:
        return small
    large = packs_of(max_tokens)
    repeats = sum(pack.num_tokens for pack in small) > (1 + MAX_REPEATED) * sum(pack.num_tokens for pack in large)
    return large if repeats else small


def rows_to_run(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    max_tokens: int | None,
    runs_everything: bool,
    keep: Sequence[bool] | None,
) -> dict[int, list[int]]:
    """What is run of each completion that is scored, by row; the arguments are `pack_rows`'s, and checked."""
    if len(prompt_ids) != len(completion_ids):
        raise ValueError(
            f"completion_ids must have one list for each of the {len(prompt_ids)} prompt_ids, got {len(completion_ids)}"
        )
    if keep is not None and len(keep) != len(prompt_ids):
        raise ValueError(f"keep must have one flag for each of the {len(prompt_ids)} rows, got {len(keep)}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1 or None, got {max_tokens}")
    unrun = 0 if runs_everything else 1
    bodies = {
        row: completion[: len(completion) - unrun]
        for row, completion in enumerate(completion_ids)
        if (completion or runs_everything) and (keep is None or keep[row])
    }
    for row in bodies:
        if not prompt_ids[row]:
            raise ValueError(f"prompt_ids[{row}] must hold at least one token: nothing predicts its completion's first")
    return bodies


def _units(
    prompt_ids: list[list[int]],
    bodies: dict[int, list[int]],
    max_tokens: int | None,
    share_prompts: bool | Literal["auto"],
) -> list[_Unit]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in bodies:
        groups.setdefault(tuple(prompt_ids[row]), []).append(row)
    units = []
    for prompt, members in groups.items():
        alone = [_Unit.of([row], len(prompt), [len(bodies[row])]) for row in members]
        if share_prompts is False or len(members) == 1:
            units += alone
            continue
        # the parts of a group, beside its prompt
        parts = _fill(
            [_Unit((row,), len(bodies[row]), 0) for row in members],
            None if max_tokens is None else max_tokens - len(prompt),
            cost=lambda unit: unit.tokens,
        )
        shared = []
        for part in parts:
            rows = sorted(row for unit in part for row in unit.rows)
            shared.append(_Unit.of(rows, len(prompt), [len(bodies[row]) for row in rows]))
        saved = sum(unit.tokens for unit in alone) - sum(unit.tokens for unit in shared)
        pays = share_prompts is True or saved >= MIN_SAVING * sum(unit.tokens for unit in alone)
        units += shared if pays else alone
    return units


def _fill(units: list[_Unit], capacity: int | None, *, cost: Callable[[_Unit], int]) -> list[list[_Unit]]:
    """Distribute units over the bins first fit decreasing needs, balanced by cost where they still fit.

    A unit larger than `capacity` gets a bin of its own.
    """
    if capacity is None:
        return [units] if units else []
    large = [[unit] for unit in units if unit.tokens > capacity]
    bins: list[list[_Unit]] = []
    loads: list[int] = []
    for unit in sorted((unit for unit in units if unit.tokens <= capacity), key=lambda unit: -unit.tokens):
        target = next((b for b, load in enumerate(loads) if load + unit.tokens <= capacity), len(bins))
        if target == len(bins):
            bins.append([])
            loads.append(0)
        bins[target].append(unit)
        loads[target] += unit.tokens
    return large + _balanced(bins, capacity, cost)


def _balanced(bins: list[list[_Unit]], capacity: int, cost: Callable[[_Unit], int]) -> list[list[_Unit]]:
    """The same units over as many bins, longest processing time first; the bins as they are if that does not fit."""
    even: list[list[_Unit]] = [[] for _ in bins]
    costs = [0] * len(bins)
    for unit in sorted((unit for members in bins for unit in members), key=lambda unit: -cost(unit)):
        target = costs.index(min(costs))
        even[target].append(unit)
        costs[target] += cost(unit)
    # a bin can stay empty only when several units cost nothing
    fits = all(members and sum(unit.tokens for unit in members) <= capacity for members in even)
    return even if fits else bins


def _build(
    rows: list[int],
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    bodies: dict[int, list[int]],
    share_prompts: bool | Literal["auto"],
) -> Pack:
    tree = PrefixTree.of(
        {row: prompt_ids[row] + bodies[row] for row in rows},
        {row: len(prompt_ids[row]) for row in rows},
        share=share_prompts,
    )
    scored = [row for row in rows if completion_ids[row]]
    lengths = [len(completion_ids[row]) for row in scored]
    predict = []
    for row, length in zip(scored, lengths, strict=True):
        # from the prompt's last token on
        first = len(prompt_ids[row]) - 1
        predict.append(_places(tree.paths[row])[first : first + length])
    key_lengths = [sum(stop - start for start, stop in spans) for spans in tree.keys]
    empty = torch.empty(0, dtype=torch.int64)
    return Pack(
        input_ids=torch.tensor([tree.ids]),
        position_ids=torch.tensor([tree.positions]),
        token_rows=torch.tensor([tree.token_rows]),
        layout=Layout(
            cu_queries=torch.tensor([0, *accumulate(tree.queries)], dtype=torch.int32),
            cu_keys=torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32),
            key_index=torch.cat([_places(spans) for spans in tree.keys]) if tree.is_shared else None,
            query_lengths=tuple(tree.queries),
            key_lengths=tuple(key_lengths),
        ),
        predict=torch.cat([*predict, empty]),
        targets=torch.tensor([token for row in scored for token in completion_ids[row]], dtype=torch.int64),
        rows=torch.repeat_interleave(torch.tensor(scored, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)),
        columns=torch.cat([*(torch.arange(length) for length in lengths), empty]),
        row_ids=tuple(scored),
        row_lengths=tuple(lengths),
        num_row_tokens=sum(tree.token_rows),
    )


def _places(spans: list[Span]) -> Tensor:
    """The packed positions of some spans, one after the other."""
    return torch.cat([torch.arange(start, stop) for start, stop in spans])
