from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from grpo_fast.batch import Pack
from grpo_fast.packing import default_max_tokens, pack_rows
from grpo_fast.prefix_tree import MIN_PREFIX


def draw(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, 90) for _ in range(length)]


def ragged_rows(seed: int, num_groups: int = 5, group_size: int = 4) -> tuple[list[list[int]], list[list[int]]]:
    rng = random.Random(seed)
    prompts = [draw(rng, rng.randint(1, 12)) for _ in range(num_groups)]
    prompt_ids = [prompt for prompt in prompts for _ in range(group_size)]
    completion_ids = [draw(rng, rng.choice([0, 1, 2, 7, 15])) for _ in prompt_ids]
    return prompt_ids, completion_ids


def turns(seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that begin alike, and completions that part only after some turns."""
    rng = random.Random(seed)
    system, turn = draw(rng, 20), [draw(rng, 18) for _ in range(3)]
    prompt_ids, completion_ids = [], []
    for question in (draw(rng, 5), draw(rng, 9)):
        for taken in ([], [0], [0], [0, 1], [0, 1], [0, 2], [2]):
            prompt_ids.append(system + question)
            completion_ids.append([token for i in taken for token in turn[i]] + draw(rng, rng.randint(0, 4)))
    # one row twice, and one that ends where others go on
    return [*prompt_ids, prompt_ids[3]], [*completion_ids, completion_ids[3]]


def visible_tokens(pack: Pack, position: int) -> list[int]:
    """The tokens a packed position sees under the pack's layout, in key order."""
    layout, ids = pack.layout, pack.input_ids[0].tolist()
    for segment, (low, high) in enumerate(pairwise(layout.cu_queries.tolist())):
        if low <= position < high:
            keys = list(range(low, high))
            if layout.key_index is not None:
                key_low, key_high = layout.cu_keys[segment : segment + 2].tolist()
                keys = layout.key_index[key_low:key_high].tolist()
            return [ids[key] for key in keys[: len(keys) - (high - 1 - position)]]
    raise AssertionError(f"{position} is in no segment")


@pytest.mark.parametrize("rows", [ragged_rows, turns])
@pytest.mark.parametrize("share", [True, False, "auto"])
@pytest.mark.parametrize("max_tokens", [1, 20, 64, None])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_scored_token_is_predicted_once_from_exactly_its_row_so_far(
    rows: Callable[[int], tuple[list[list[int]], list[list[int]]]], share: bool | str, max_tokens: int | None, seed: int
) -> None:
    prompt_ids, completion_ids = rows(seed)
    seen = []
    for pack in pack_rows(prompt_ids, completion_ids, max_tokens=max_tokens, share_prompts=share):
        tokens = list(zip(pack.rows.tolist(), pack.columns.tolist(), strict=True))
        assert tokens == sorted(tokens)
        assert pack.row_ids == tuple(sorted(set(pack.rows.tolist())))
        for (row, column), position, target in zip(tokens, pack.predict.tolist(), pack.targets.tolist(), strict=True):
            context = prompt_ids[row] + completion_ids[row][:column]
            assert target == completion_ids[row][column]
            assert visible_tokens(pack, position) == context
            assert pack.position_ids[0, position] == len(context) - 1
        seen += tokens
        assert (
            pack.num_row_tokens
            == pack.token_rows.sum()
            == sum(len(prompt_ids[row]) + len(completion_ids[row]) - 1 for row in pack.row_ids)
        )
    assert sorted(seen) == [(row, c) for row, ids in enumerate(completion_ids) for c in range(len(ids))]


def test_turns_are_shared_at_any_depth() -> None:
    """As many tokens are run as there are different beginnings, but for turns too short for a segment of their own."""
    prompt_ids, completion_ids = turns(0)
    (pack,) = pack_rows(prompt_ids, completion_ids, max_tokens=None, share_prompts=True)
    beginnings = {
        tuple((prompt + completion[:-1])[:end])
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        if completion
        for end in range(1, len(prompt) + len(completion))
    }
    repeated = pack.width - len(beginnings)
    assert 0 <= repeated < MIN_PREFIX
    # system, question, turn and turn, before its own tokens
    assert max(pack.layout.key_lengths) > 20 + 5 + 2 * 18
    assert pack.token_rows.max() == len([completion for completion in completion_ids if completion])


def test_everything_runs_where_tokens_are_counted() -> None:
    prompt_ids, completion_ids = [[1, 2], [1, 2], [3]], [[4, 5], [6], []]
    (pack,) = pack_rows(prompt_ids, completion_ids, max_tokens=None, share_prompts=True, runs_everything=True)
    assert sorted(pack.input_ids[0].tolist()) == [1, 2, 3, 4, 5, 6]
    weights = dict(zip(pack.input_ids[0].tolist(), pack.token_rows[0].tolist(), strict=True))
    assert weights == {1: 2, 2: 2, 3: 1, 4: 1, 5: 1, 6: 1}
    assert (pack.targets.tolist(), pack.row_ids, pack.row_lengths) == ([4, 5, 6], (0, 1), (2, 1))


def test_packs_cost_alike_where_attention_is_dear() -> None:
    """A long row costs its square: the short ones go together, though their tokens are more."""
    lengths = [64, *[16] * 8]
    rows = [[1]] * 9, [[2 + i] * length for i, length in enumerate(lengths)]

    def sizes(hidden_size: int | None) -> list[int]:
        packs = pack_rows(*rows, max_tokens=128, share_prompts=False, hidden_size=hidden_size)
        return [pack.width for pack in packs]

    assert sizes(None) == [96, 96]
    # 64 * 65 / 2 pairs against 136 a short row
    assert sizes(1) == [64, 128]


@pytest.mark.parametrize("share", [True, False])
def test_the_layout_s_host_lengths_and_tensors_agree(share: bool) -> None:
    prompt_ids, completion_ids = ragged_rows(3)
    for pack in pack_rows(prompt_ids, completion_ids, max_tokens=50, share_prompts=share):
        layout = pack.layout
        assert layout.cu_queries.dtype == layout.cu_keys.dtype == torch.int32
        assert layout.cu_queries.diff().tolist() == list(layout.query_lengths)
        assert layout.cu_keys.diff().tolist() == list(layout.key_lengths)
        assert pack.input_ids.shape == pack.position_ids.shape == (1, sum(layout.query_lengths))
        if layout.key_index is not None:
            assert len(layout.key_index) == sum(layout.key_lengths)
        assert min(layout.query_lengths) > 0


@pytest.mark.parametrize("share", [True, False, "auto"])
@pytest.mark.parametrize("max_tokens", [20, 33, 64])
def test_packs_keep_the_budget_and_only_a_longer_row_exceeds_it_alone(share: bool | str, max_tokens: int) -> None:
    prompt_ids, completion_ids = ragged_rows(5)
    prompt_ids.append(list(range(1, 71)))
    completion_ids.append([5, 6, 7])
    packs = pack_rows(prompt_ids, completion_ids, max_tokens=max_tokens, share_prompts=share)
    over = [pack.row_ids for pack in packs if pack.input_ids.numel() > max_tokens]
    assert sorted(over) == [
        (row,)
        for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True))
        if completion and len(prompt) + len(completion) - 1 > max_tokens
    ]


def test_packs_are_as_few_as_fit_and_evenly_filled() -> None:
    # rows of 10, 10, 5, 5, 5, 5 tokens: filling one pack after the other gives 25 and 15
    lengths = [10, 10, 5, 5, 5, 5]
    packs = pack_rows([[1]] * 6, [[2] * length for length in lengths], max_tokens=25, share_prompts=False)
    assert [pack.input_ids.numel() for pack in packs] == [20, 20]
    # 20 + 20 + 20 fits only as 12 + 8, 11 + 9, 10 + 10: an even spread of large rows first would need more room
    lengths = [12, 11, 10, 10, 9, 8]
    packs = pack_rows([[1]] * 6, [[2] * length for length in lengths], max_tokens=20, share_prompts=False)
    assert [pack.input_ids.numel() for pack in packs] == [20, 20, 20]


@pytest.mark.parametrize(("share", "tokens"), [(False, 3 * 8 + 8 + 6 + 1 + 4), (True, 8 + 0 + 8 + 6 + 1 + 4)])
def test_a_shared_prompt_is_run_once(share: bool, tokens: int) -> None:
    prompt = list(range(1, 9))
    prompt_ids = [prompt, prompt, prompt, [7]]
    # the last token of a completion is not run, and the one-token row adds nothing under sharing
    completion_ids = [[3] * 9, [4] * 7, [5], [6] * 5]
    (pack,) = pack_rows(prompt_ids, completion_ids, max_tokens=None, share_prompts=share)
    assert pack.input_ids.numel() == tokens
    assert (pack.layout.key_index is not None) == share
    assert len(pack.layout.query_lengths) == 4


def test_a_group_over_the_budget_is_split_and_each_part_repeats_the_prompt() -> None:
    prompt = list(range(1, 11))
    packs = pack_rows([prompt] * 6, [[20 + i] * 6 for i in range(6)], max_tokens=20, share_prompts=True)
    assert [pack.input_ids.numel() for pack in packs] == [20, 20, 20]
    assert all(pack.input_ids[0, :10].tolist() == prompt for pack in packs)


def test_auto_shares_where_at_least_two_percent_of_the_tokens_are_saved() -> None:
    def shares(prompt_length: int) -> bool:
        (pack,) = pack_rows([[1] * prompt_length] * 2, [[2] * 241, [3] * 241], max_tokens=None)
        return pack.layout.key_index is not None

    # two rows of P + 240 tokens share P: P >= 0.02 * (2 P + 480) from P = 10 on
    assert shares(10)
    assert not shares(9)


def test_rows_without_scored_tokens_take_no_space() -> None:
    packs = pack_rows([[1, 2], [3], [4], []], [[5], [], [6, 7], []], max_tokens=8, keep=[True, True, False, True])
    assert [pack.row_ids for pack in packs] == [(0,)]
    assert pack_rows([[1]], [[]], max_tokens=8) == []
    assert pack_rows([], [], max_tokens=8) == []


def test_a_completion_of_one_token_runs_its_prompt_only() -> None:
    (pack,) = pack_rows([[4, 5, 6]], [[9]], max_tokens=8)
    assert pack.input_ids.tolist() == [[4, 5, 6]]
    assert (pack.predict.tolist(), pack.targets.tolist()) == ([2], [9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": [[1]], "completion_ids": []}, "completion_ids must have one list"),
        ({"prompt_ids": [[]], "completion_ids": [[1]]}, r"prompt_ids\[0\] must hold at least one token"),
        ({"prompt_ids": [[1]], "completion_ids": [[1]], "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt_ids": [[1]], "completion_ids": [[1]], "fill_tokens": 0}, "fill_tokens must be at least 1"),
        ({"prompt_ids": [[1]], "completion_ids": [[1]], "keep": []}, "keep must have one flag"),
        ({"prompt_ids": [[1]], "completion_ids": [[1]], "share_prompts": "always"}, "share_prompts must be"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_rows(**{"max_tokens": 8, **arguments})  # type: ignore[arg-type]


def groups(
    num_groups: int, *, prompt: int, completion: int, common: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of four, whose prompts may begin alike; completions run one token less."""
    rng = random.Random(0)
    beginning = draw(rng, common)
    prompts = [beginning + draw(rng, prompt) for _ in range(num_groups)]
    prompt_ids = [prompt for prompt in prompts for _ in range(4)]
    return prompt_ids, [draw(rng, completion + 1) for _ in prompt_ids]


@pytest.mark.parametrize("share", [True, False, "auto"])
def test_packs_are_filled_less_than_a_group_may_need(share: bool | str) -> None:
    # 10 + 4 x 10 tokens each, or four times 20
    rows, size, total = groups(6, prompt=10, completion=10), *((20, 480) if share is False else (50, 300))

    def tokens_of(**budgets: int) -> list[int]:
        return [pack.num_tokens for pack in pack_rows(*rows, share_prompts=share, **budgets)]

    filled = tokens_of(max_tokens=500, fill_tokens=110)
    assert sum(filled) == total
    assert 110 - size < max(filled) <= 110
    # whole groups, none of which would fit
    assert tokens_of(max_tokens=500, fill_tokens=size - 1) == [size] * (total // size)
    # at most what a group may have
    assert tokens_of(max_tokens=size, fill_tokens=1000) == [size] * (total // size)
    assert tokens_of(max_tokens=500, fill_tokens=500) == [total]


def test_packs_are_filled_where_their_groups_begin_alike() -> None:
    """Smaller ones would run the common beginning again: 3.8 % more tokens, and 1.9 %."""
    for common, num_packs in ((40, 1), (20, 3)):
        rows = groups(6, prompt=300, completion=10, common=common)
        packs = pack_rows(*rows, max_tokens=3000, fill_tokens=800)
        assert [pack.num_tokens for pack in packs] == [common + 6 // num_packs * 340] * num_packs


def test_the_default_budget_is_larger_on_an_accelerator() -> None:
    assert default_max_tokens(torch.device("cpu")) == 8192
    assert default_max_tokens(torch.device("cuda")) == 16384
