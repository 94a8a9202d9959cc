"""Rows laid out so that what several of them begin with is there once.

Letters: T packed tokens, S attention segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, takewhile
from typing import Literal

# sharing must save this part of the rows' tokens: below it repeating them is cheaper than gathering their keys again;
# or, on a CPU, than joining attention to shared and own keys, which costs what 2 to 4 % of the linear layers do
MIN_SAVING = 0.02
# beside a whole prompt, tokens that are worth an attention segment of their own: a turn, a system prompt
MIN_PREFIX = 16

Span = tuple[int, int]  # packed tokens, from and to


@dataclass
class PrefixTree:
    """Rows of tokens as a tree: a node is a run of tokens that all rows below it have, and an attention segment.

    Attributes:
        ids: [T] tokens, a node's after its parent's.
        positions: [T], each token's place in its row.
        token_rows: [T], how many rows a token belongs to.
        queries: [S], tokens of each segment.
        keys: [S], the spans that a segment's last token sees, in the order of the row; its own is the last.
        paths: Where each row's tokens lie, by row.
        is_shared: Whether any token belongs to several rows.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_rows: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    keys: list[list[Span]] = field(default_factory=list)
    paths: dict[int, list[Span]] = field(default_factory=dict)
    is_shared: bool = False

    @staticmethod
    def of(
        sequences: dict[int, list[int]], prompt_lengths: dict[int, int], *, share: bool | Literal["auto"]
    ) -> PrefixTree:
        """The tree of some rows.

        Args:
            sequences: The tokens of each row that are run.
            prompt_lengths: Of each row. Rows with one prompt share it; they and others share longer beginnings, too,
                if these have `MIN_PREFIX` tokens.
            share: True, False, or "auto" where that saves `MIN_SAVING` of the tokens below the node.
        """
        tree = PrefixTree()
        if share is False:
            for row in sequences:
                tree._leaf(sequences, row, 0, [])
        elif sequences:
            rows = sorted(sequences, key=lambda row: sequences[row])
            tree._grow(sequences, prompt_lengths, rows, 0, [], share)
        return tree

    def _grow(
        self,
        sequences: dict[int, list[int]],
        prompt_lengths: dict[int, int],
        rows: list[int],
        depth: int,
        path: list[Span],
        share: bool | str,
    ) -> None:
        """Lay out `rows`, in lexicographic order and alike up to `depth`, of which `path` says where it lies."""
        if len(rows) == 1:
            self._leaf(sequences, rows[0], depth, path)
            return
        end = common_length(sequences[rows[0]], sequences[rows[-1]], depth)
        if _pays(sequences, prompt_lengths, rows, depth, end, share):
            path, depth = self._segment(sequences[rows[0]], depth, end, path, num_rows=len(rows)), end
        ended = [row for row in rows if len(sequences[row]) == end]
        for row in ended:
            self._leaf(sequences, row, depth, path)
        for _, part in groupby(rows[len(ended) :], key=lambda row: sequences[row][end]):
            self._grow(sequences, prompt_lengths, list(part), depth, path, share)

    def _leaf(self, sequences: dict[int, list[int]], row: int, depth: int, path: list[Span]) -> None:
        """The rest of a row; nothing, if it ends where its path does."""
        tokens = sequences[row]
        self.paths[row] = self._segment(tokens, depth, len(tokens), path, num_rows=1) if depth < len(tokens) else path

    def _segment(self, tokens: list[int], depth: int, end: int, path: list[Span], *, num_rows: int) -> list[Span]:
        start, length = len(self.ids), end - depth
        self.ids += tokens[depth:end]
        self.positions += range(depth, end)
        self.token_rows += [num_rows] * length
        self.is_shared |= num_rows > 1
        path = [*path, (start, start + length)]
        self.queries.append(length)
        self.keys.append(path)
        return path


def _pays(
    sequences: dict[int, list[int]],
    prompt_lengths: dict[int, int],
    rows: list[int],
    depth: int,
    end: int,
    share: bool | str,
) -> bool:
    length = end - depth
    # or what is left of a prompt that begins as others do
    is_prompt = depth < max(prompt_lengths[row] for row in rows) <= end
    if not is_prompt and length < MIN_PREFIX:
        return False
    saved = length * (len(rows) - 1)
    return share is True or saved >= MIN_SAVING * sum(len(sequences[row]) - depth for row in rows)


def common_length(first: list[int], second: list[int], start: int = 0) -> int:
    """How many tokens two rows begin with alike, which are known to be alike up to `start`."""
    low, high = start, min(len(first), len(second))
    if first[start:high] == second[start:high]:
        return high
    pairs = zip(first[low:high], second[low:high], strict=True)
    return low + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
