"""The cut of the [N, V] plane keeps to the workspace and does not depend on how many rows there are."""

import itertools

import pytest
import torch

from grpo_kernels.tiles import Kept, Request, make_plan

SHAPES = [(384, 576, 49152), (8192, 4096, 151936), (100_000, 896, 7)]


def request(*, mib, device="cpu", keeps="all", rounds=False):
    return Request(
        operand=torch.bfloat16,
        device=torch.device(device),
        keeps=keeps,
        casts_weight=True,
        rounds_weight_grad=rounds,
        uses_kernels=device != "cpu",
        workspace=mib << 20,
    )


@pytest.mark.parametrize("keeps", ["none", "all", "block"])
@pytest.mark.parametrize("rounds", [False, True], ids=["fp32 gradient", "bf16 gradient"])
def test_tiles_blocks_and_what_is_kept_fit_the_workspace(keeps, rounds):
    for mib, device, (N, D, V) in itertools.product((64, 640, 4096), ("cpu", "cuda"), SHAPES):
        plan = make_plan(N, D, V, request(mib=mib, device=device, keeps=keeps, rounds=rounds))
        R, C, B = plan.rows, plan.columns, plan.block
        tile = 14 * (R * C + C * D + R * D) if device == "cpu" else 4 * R * C + 2 * C * D
        kept = B * (2 * plan.kept_width + 4 * plan.num_vocab_tiles) if plan.keep else 0
        total = 4 * V * D if rounds and plan.sums_weight and B < N else 0
        # 64 more columns where rows start at a multiple of 64
        assert tile + 8 * B * D + kept + total <= (mib << 20) + 2 * 64 * B
        assert min(R, B) >= min(N, 64)
        assert R <= B
        assert plan.keep or keeps != "block"


def test_columns_do_not_depend_on_the_number_of_rows():
    for N, D, V in SHAPES:
        few, many = (make_plan(n, D, V, request(mib=64)) for n in (9, N))
        assert few.columns == many.columns


def test_groups_are_whole_sequences_that_fit_a_block_or_one_that_does_not():
    plan = make_plan(10_000, 64, 50_000, request(mib=64, keeps="block"))
    assert plan.block < 600
    lengths = [3, plan.block - 3, 1, 5 * plan.block, plan.block - 1, 2]
    sizes = [group.stop - group.start for group in plan.groups(lengths)]
    assert sizes == [plan.block, 1, 5 * plan.block, plan.block - 1, 2]
    assert [group.stop for group in plan.groups(None)][-1] == plan.N


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kept_tiles_do_not_overlap(device):
    plan = make_plan(130, 64, 1100, request(mib=64, keeps="block", device=device))
    plan = type(plan)(**{**vars(plan), "block": 130, "rows": 64, "columns": 256})
    kept = Kept(plan, torch.zeros(130 * plan.kept_width), torch.zeros(plan.num_vocab_tiles, 130))
    for rows, columns in itertools.product(plan.row_tiles(slice(0, 130)), plan.vocab_tiles()):
        tile = kept.tile(rows, columns)
        assert tile.shape == (rows.stop - rows.start, columns.stop - columns.start)
        tile += 1
    assert kept.values.sum() == 130 * 1100
    assert kept.values.max() == 1
