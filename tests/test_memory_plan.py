"""Numbers in, a budget and a number of layers out."""

import pytest

from grpo_fast.memory_plan import (
    MIN_BUDGET,
    ActivationCost,
    LayerCost,
    MemoryPlan,
    PackBudget,
    Size,
    peak_bytes,
    plan,
    plan_budget,
    plan_for,
)

L = 10
# a token holds 100 in each layer, keeps 10, and nothing else takes memory: easy to add up
LAYER = LayerCost(held=Size(per_token=100), kept=Size(per_token=10))
COST = ActivationCost(layers=(LAYER,) * L)
# gradients of the layer that the backward pass is in
GRADIENTS = 50


def least_layers(cost, tokens, usable, choices=None):
    made = plan_for(cost, tokens, usable, choices)
    assert made.fits == (peak_bytes(cost, tokens, made.checkpointed_layers) <= usable)
    return made.checkpointed_layers


def decide(usable, *, cost=COST, cap=1024, overhead=1.0, choices=None):
    made = plan(cost, usable, cap=cap, overhead_tokens=overhead, choices=choices)
    return made.max_tokens, made.checkpointed_layers, made.fits


@pytest.mark.parametrize(
    ("k", "per_token"),
    [
        # all layers hold, and the last one's gradients
        (0, 10 * 100 + GRADIENTS),
        (4, 4 * 10 + 6 * 100 + GRADIENTS),
        (9, 9 * 10 + 100 + GRADIENTS),
        # the last one runs again, beside its input: worse than if it had held
        (10, 10 * 10 + 100 + GRADIENTS),
    ],
)
def test_peak(k, per_token):
    assert peak_bytes(COST, 128, k) == 128 * per_token


def test_peak_under_the_head_and_with_rounded_weights():
    rounding = LayerCost(held=Size(fixed=1000, per_token=100), kept=Size(per_token=10), weight=7)
    cost = ActivationCost(
        layers=(rounding,) * 3, rest=Size(fixed=5, per_token=1), head=Size(fixed=10_000, per_token=40)
    )
    # the forward pass keeps three layers' rounded weights, whether they recompute or not
    assert peak_bytes(cost, 10, 2) == (5 + 10) + 2 * 100 + 1000 + 1000 + 2 * 1000 + 10_000 + 400
    # without much of a head: in the last layer's backward pass, after autocast's weights have gone
    bare = ActivationCost(layers=cost.layers)
    assert peak_bytes(bare, 10, 3) == max(3 * 100 + 3 * 1000, 3 * 100 + 1000 + 1000 + 10 * GRADIENTS + 7)


def test_a_layer_in_the_middle_may_need_most():
    large = LayerCost(held=Size(per_token=1000), kept=Size(per_token=10))
    cost = ActivationCost(layers=(LAYER, large, LAYER))
    assert peak_bytes(cost, 1, 2) == max(10 + 10 + 1000 + 500, 10 + 10 + 100 + 50)


def test_what_is_measured_twice_is_a_line():
    assert Size.through((10, 30), (150, 250)) == Size(fixed=100, per_token=5)
    # noise makes no negative sizes
    assert Size.through((10, 30), (150, 140)) == Size(fixed=150, per_token=0)
    assert Size.through((10, 30), (10, 290)) == Size(fixed=0, per_token=14)


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (10**9, 0),
        (100 * 1050, 0),
        (100 * 1050 - 1, 1),
        (100 * (5 * 10 + 5 * 100 + GRADIENTS), 5),
        (100 * (9 * 10 + 100 + GRADIENTS), 9),
        # nothing fits: what needs least
        (0, 9),
    ],
)
def test_as_few_layers_as_fit(usable, expected):
    assert least_layers(COST, 100, usable) == expected


def test_the_last_layer_recomputes_where_the_head_is_what_does_not_fit():
    cost = ActivationCost(layers=COST.layers, head=Size(fixed=100 * 400))
    assert least_layers(cost, 100, 100 * (10 * 10 + 400)) == 10
    assert least_layers(cost, 100, 100 * (9 * 10 + 100 + 400)) == 9
    assert least_layers(cost, 100, 0) == 10


def test_layers_are_chosen_from_what_is_allowed():
    assert least_layers(COST, 100, 0, [0]) == 0
    assert least_layers(COST, 100, 100 * 1050 - 1, [0, 7]) == 7


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (10**9, (1024, 0, True)),
        # half the budget rather than recomputation: a pass costs next to nothing beside its tokens here
        (1024 * 1050 - 1, (512, 0, True)),
        (128 * 1050, (128, 0, True)),
        # below that only recomputation is left
        (128 * 1050 - 1, (128, 1, True)),
        (128 * 240, (128, 9, True)),
        (128 * 240 - 1, (128, 9, False)),
        (0, (128, 9, False)),
    ],
)
def test_smaller_packs_before_recomputation(usable, expected):
    assert decide(usable) == expected
    assert MIN_BUDGET == 128


def test_larger_packs_pay_for_some_recomputation():
    # half a pack costs 400/512 - 400/1024 = 39 % more, all layers' recomputation a third
    assert decide(1024 * 1050 - 1, overhead=400) == (1024, 1, True)
    assert decide(1024 * 240, overhead=400) == (1024, 9, True)
    # 10 % against a third of 10 % a layer
    assert decide(1024 * (2 * 10 + 8 * 100 + 50), overhead=102.4) == (1024, 2, True)
    assert decide(1024 * (4 * 10 + 6 * 100 + 50), overhead=102.4) == (512, 0, True)


def test_a_cap_is_a_budget_whatever_it_is():
    assert decide(10**9, cap=1000) == (1000, 0, True)
    assert decide(10**9, cap=100) == (100, 0, True)
    assert decide(1000 * 1050 - 1, cap=1000) == (512, 0, True)


def test_layers_that_may_not_recompute():
    assert decide(512 * 1050, choices=[0]) == (512, 0, True)
    assert decide(0, choices=[0]) == (128, 0, False)
    assert decide(512 * 1050, choices=[10], overhead=400) == (1024, 10, True)


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (10**9, PackBudget(max_tokens=4096, fill_tokens=1024)),
        # the largest with nine layers recomputed
        (4096 * 240, PackBudget(max_tokens=4096, fill_tokens=512)),
        (4096 * 240 - 1, PackBudget(max_tokens=2048, fill_tokens=512)),
        (0, PackBudget(max_tokens=128, fill_tokens=128)),
    ],
)
def test_a_group_may_need_what_full_packs_do_without(usable, expected):
    assert plan_budget(COST, usable, cap=4096, fill_cap=1024, overhead_tokens=1) == expected


def test_budgets_without_recomputation():
    for usable, size in ((512 * 1050, 512), (4096 * 1050, 4096)):
        budget = plan_budget(COST, usable, cap=4096, fill_cap=1024, overhead_tokens=1, choices=[0])
        assert budget == PackBudget(max_tokens=size, fill_tokens=min(size, 1024))


def test_a_plan_says_what_it_needs():
    assert plan(COST, 10**9, cap=256, overhead_tokens=8) == MemoryPlan(
        max_tokens=256, checkpointed_layers=0, peak_bytes=256 * 1050, fits=True
    )
