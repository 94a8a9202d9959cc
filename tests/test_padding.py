from __future__ import annotations

import itertools
import random

import pytest
import torch

from grpo_fast.batch import PaddedRows
from grpo_fast.padding import pad_rows


def ragged_rows(seed: int, num_rows: int = 20) -> tuple[list[list[int]], list[list[int]]]:
    rng = random.Random(seed)

    def draw(length: int) -> list[int]:
        return [rng.randrange(1, 90) for _ in range(length)]

    return [draw(rng.randint(1, 12)) for _ in range(num_rows)], [
        draw(rng.choice([0, 1, 2, 7, 15])) for _ in range(num_rows)
    ]


def rows_of(batch: PaddedRows) -> list[int]:
    return list(dict.fromkeys(batch.rows.tolist()))


@pytest.mark.parametrize("max_tokens", [1, 20, 64, None])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_scored_token_is_predicted_once_from_exactly_its_row_so_far(max_tokens: int | None, seed: int) -> None:
    prompt_ids, completion_ids = ragged_rows(seed)
    seen = []
    for batch in pad_rows(prompt_ids, completion_ids, max_tokens=max_tokens, pad_token_id=91):
        ids, mask = batch.model_inputs["input_ids"], batch.model_inputs["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.dtype == mask.dtype == torch.int64
        assert torch.equal(ids == 91, mask == 0)
        rows = rows_of(batch)
        assert rows == sorted(rows)
        assert batch.row_lengths == tuple(len(completion_ids[row]) for row in rows)
        # the last token of a completion is not run, and nothing is padded beyond the longest row
        assert mask.sum(1).tolist() == [len(prompt_ids[row]) + len(completion_ids[row]) - 1 for row in rows]
        assert mask.sum(1).max() == batch.width
        tokens = list(zip(batch.rows.tolist(), batch.columns.tolist(), strict=True))
        assert tokens == sorted(tokens)
        for (row, column), position, target in zip(tokens, batch.predict.tolist(), batch.targets.tolist(), strict=True):
            i, last = divmod(position, batch.width)
            assert rows[i] == row
            assert target == completion_ids[row][column]
            assert ids[i, : last + 1].tolist() == prompt_ids[row] + completion_ids[row][:column]
        seen += tokens
    assert sorted(seen) == [(row, c) for row, ids in enumerate(completion_ids) for c in range(len(ids))]


@pytest.mark.parametrize("max_tokens", [20, 33, 64])
def test_batches_keep_the_budget_and_only_a_longer_row_exceeds_it_alone(max_tokens: int) -> None:
    prompt_ids, completion_ids = ragged_rows(5)
    prompt_ids.append(list(range(1, 71)))
    completion_ids.append([5, 6, 7])
    batches = pad_rows(prompt_ids, completion_ids, max_tokens=max_tokens)
    over = [rows_of(batch) for batch in batches if batch.model_inputs["input_ids"].numel() > max_tokens]
    assert sorted(over) == [
        [row]
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True))
        if completion and len(prompt) + len(completion) - 1 > max_tokens
    ]


def sizes(lengths: list[int], max_tokens: int | None) -> list[list[int]]:
    """Rows and columns of the batches that rows of these lengths make, largest first."""
    batches = pad_rows([[1]] * len(lengths), [[2] * length for length in lengths], max_tokens=max_tokens)
    return sorted((list(batch.model_inputs["input_ids"].shape) for batch in batches), key=lambda s: -s[0] * s[1])


def fewest_and_smallest(lengths: list[int], max_tokens: int) -> tuple[int, int]:
    """By trying every way of cutting the sorted rows: the fewest batches, and the smallest largest batch of as many."""
    order = sorted(lengths, reverse=True)
    best = (len(order) + 1, 0)
    for cut in itertools.product([False, True], repeat=len(order) - 1):
        starts = [0, *(i + 1 for i, is_cut in enumerate(cut) if is_cut), len(order)]
        batches = [order[low:high] for low, high in itertools.pairwise(starts)]
        if all(len(batch) == 1 or len(batch) * batch[0] <= max_tokens for batch in batches):
            best = min(best, (len(batches), max(len(batch) * batch[0] for batch in batches)))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_batches_are_as_few_as_sorted_rows_allow_and_evenly_filled(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 20) for _ in range(9)]
    for max_tokens in (15, 40, 70):
        found = sizes(lengths, max_tokens)
        number, largest = fewest_and_smallest(lengths, max_tokens)
        assert len(found) == number
        assert found[0][0] * found[0][1] == largest


def test_batches_of_sorted_rows_waste_little() -> None:
    assert sizes([9, 2, 9, 2, 9, 2], 30) == [[3, 9], [3, 2]]
    # one long row does not pad the others
    assert sizes([100] + [10] * 10, 200) == [[1, 100], [10, 10]]
    assert sizes([3, 9, 5], None) == [[3, 9]]


def test_rows_without_scored_tokens_take_no_space() -> None:
    batches = pad_rows([[1, 2], [3], [4], []], [[5], [], [6, 7], []], max_tokens=8, keep=[True, True, False, True])
    assert [rows_of(batch) for batch in batches] == [[0]]
    assert pad_rows([[1]], [[]], max_tokens=8) == []
    assert pad_rows([], [], max_tokens=8) == []
    assert pad_rows([], [], max_tokens=None) == []


def test_batches_come_by_their_first_row_and_move_to_a_device() -> None:
    batches = pad_rows([[1]] * 4, [[2] * 3, [2] * 9, [2] * 9, [2] * 3], max_tokens=18)
    assert [rows_of(batch) for batch in batches] == [[0, 3], [1, 2]]
    batch = pad_rows([[1]] * 4, [[2] * 3] * 4, max_tokens=18)[0]
    batch.model_inputs["num_images"] = [0, 1]
    moved = batch.to(torch.device("meta"))
    tensors = [moved.predict, moved.targets, moved.rows, moved.columns]
    tensors += [moved.model_inputs["input_ids"], moved.model_inputs["attention_mask"]]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.row_lengths == batch.row_lengths
    assert moved.model_inputs["num_images"] == [0, 1]
    assert not batch.predict.is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": [[1]], "completion_ids": []}, "completion_ids must have one list"),
        ({"prompt_ids": [[]], "completion_ids": [[1]]}, r"prompt_ids\[0\] must hold at least one token"),
        ({"prompt_ids": [[1]], "completion_ids": [[1]], "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt_ids": [[1]], "completion_ids": [[1]], "keep": []}, "keep must have one flag"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pad_rows(**{"max_tokens": 8, **arguments})  # type: ignore[arg-type]
