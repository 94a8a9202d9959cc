"""Importance weights of the sampler, by mode, against the definition written out."""

import math

import pytest
import torch

from grpo_fast.batch import Runs
from grpo_fast.importance import Correction, sampler_weights

# trainer's minus sampler's log-prob
LOG_RATIOS = torch.tensor([0.5, 0.0, 0.0, -2.0])
RUNS = Runs.of((2, 2), LOG_RATIOS.device)


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", 0.5, 1.2, [1.2, 1.0, 1.0, 0.5]),
        ("token_mask", None, 1.2, [0.0, 1.0, 1.0, math.exp(-2)]),
        ("sequence_truncate", None, 1.2, [1.2, 1.2, math.exp(-2), math.exp(-2)]),
        ("sequence_mask", 0.5, 3.0, [math.exp(0.5), math.exp(0.5), 0.0, 0.0]),
    ],
)
def test_modes(mode, low, high, expected):
    result = sampler_weights(LOG_RATIOS, RUNS, Correction(mode=mode, clip_min=low, clip_max=high))
    torch.testing.assert_close(result.weights, torch.tensor(expected))
    assert result.ratios.numel() == result.unclipped.numel() == (2 if mode.startswith("sequence") else 4)
    assert result.unclipped[-1] == pytest.approx(math.exp(-2))


def test_unreported_token_counts_as_no_difference():
    log_ratios = LOG_RATIOS.clone()
    log_ratios[3] = torch.nan
    result = sampler_weights(log_ratios, RUNS, Correction(mode="sequence_mask", clip_min=None, clip_max=3.0))
    torch.testing.assert_close(result.weights, torch.tensor([math.exp(0.5), math.exp(0.5), 1.0, 1.0]))


def test_weights_carry_no_gradient():
    log_ratios = LOG_RATIOS.clone().requires_grad_()
    result = sampler_weights(log_ratios, RUNS, Correction(mode="token_mask", clip_min=None, clip_max=3.0))
    assert not result.weights.requires_grad
