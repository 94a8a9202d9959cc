"""Group-relative advantages against the formula written out, and against TRL's where the two meet."""

import math

import pytest
import torch

from grpo_fast.advantages import group_advantages, nanstd

NAN = math.nan


def advantages(rewards, weights=None, **kwargs):
    rewards = torch.tensor(rewards)
    weights = torch.ones(rewards.shape[1]) if weights is None else torch.tensor(weights)
    settings = {"num_generations": 2, "scale_rewards": "group", "aggregation": "sum_then_normalize"} | kwargs
    return group_advantages(rewards, weights, **settings)


def test_group_scaling():
    result = advantages([[1.0], [0.0], [3.0], [3.0]])
    # std of (1, 0) with Bessel's correction is sqrt(0.5)
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(result.advantages, torch.tensor([expected, -expected, 0.0, 0.0]))
    assert result.is_std_zero.tolist() == [False, False, True, True]


def test_batch_scaling_and_none():
    rewards = [[1.0], [0.0], [3.0], [5.0]]
    std = torch.tensor(rewards).std().item()
    result = advantages(rewards, scale_rewards="batch")
    torch.testing.assert_close(result.advantages, torch.tensor([0.5, -0.5, -1.0, 1.0]) / (std + 1e-4))
    result = advantages(rewards, scale_rewards="none")
    torch.testing.assert_close(result.advantages, torch.tensor([0.5, -0.5, -1.0, 1.0]))


def test_weights_and_missing_rewards():
    result = advantages([[1.0, NAN], [NAN, 1.0], [NAN, NAN], [2.0, 0.0]], weights=[2.0, 1.0], scale_rewards="none")
    assert result.rewards[:2].tolist() == [2.0, 1.0]
    assert math.isnan(result.rewards[2])
    # the unscored row neither moves its group's mean nor gets an advantage
    assert result.advantages.tolist() == [0.5, -0.5, 0.0, 0.0]


def test_normalize_then_sum_weighs_functions_of_different_size_alike():
    result = advantages([[1.0, 100.0], [0.0, 0.0], [0.0, 100.0], [1.0, 0.0]], aggregation="normalize_then_sum")
    assert result.advantages[0] > 0 > result.advantages[1]
    # the two functions disagree in the second group, and cancel
    torch.testing.assert_close(result.advantages[2:], torch.zeros(2), atol=1e-3, rtol=0)


def test_single_generation_in_evaluation():
    result = advantages([[1.0], [0.0]], num_generations=1)
    assert result.advantages.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_nanstd_ignores_nan(dim):
    values = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, 9.0], [2.0, 3.0, 5.0]])
    if dim is None:
        expected = values[~values.isnan()].std()
    else:
        columns = values.unbind(1 - dim)
        expected = torch.stack([column[~column.isnan()].std() for column in columns])
    torch.testing.assert_close(nanstd(values, dim=dim), expected)
