"""Row weights against the means they stand for, and the entropy quantile against torch's."""

import math

import pytest
import torch

from grpo_kernels import entropy_quantile, row_weights
from grpo_kernels.normalisers import _quantile_by_sorting
from grpo_kernels.options import LOSS_TYPES

LENGTHS = torch.tensor([5, 0, 3])
GIVEN = {"accumulation": 2, "num_items_per_process": torch.tensor(30.0), "windows": 0.5, "max_completion_length": 8}
# the loss of tokens that are all 1, by the definition of each type; two rows are not empty
EXPECTED = {
    "grpo": 2 / 3 / 2,
    "sapo": 2 / 3 / 2,
    "bnpo": 1 / 2,
    "dr_grpo": 8 / (3 * 8) / 2,
    "luspo": 8 / 3 / 2,
    "dapo": 8 / (30 * 0.5),
    "cispo": 8 / (30 * 0.5),
    "vespo": 8 / (30 * 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_add_up_to_the_mean_of_the_type(loss_type, dtype):
    weights = row_weights(LENGTHS, loss_type=loss_type, dtype=dtype, **GIVEN)
    assert weights.shape == (3,)
    assert weights.dtype == dtype
    assert (weights * LENGTHS).sum().item() == pytest.approx(EXPECTED[loss_type], rel=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo"])
def test_rows_count_alike_whatever_their_length(loss_type):
    weights = row_weights(LENGTHS, loss_type=loss_type, **GIVEN) * LENGTHS
    assert weights.tolist() == pytest.approx([1 / 6, 0, 1 / 6])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_in_the_loss_gives_finite_weights(loss_type):
    weights = row_weights(torch.zeros(2, dtype=torch.int64), loss_type=loss_type, **GIVEN)
    assert weights.isfinite().all()
    assert row_weights(LENGTHS[:0], loss_type=loss_type, **GIVEN).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, .*, got 'ppo'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length is needed by loss_type='dr_grpo'"),
        ({"loss_type": "vespo"}, "num_items_per_process is needed by loss_type='vespo'"),
    ],
)
def test_what_is_missing_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        row_weights(LENGTHS, accumulation=1, **change)


@pytest.mark.parametrize("numel", [1, 2, 10, 1001])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 1.0])
def test_the_quantile_by_sorting_is_torchs(numel, share):
    values = torch.rand(numel, generator=torch.Generator().manual_seed(numel))
    # torch places the quantile in fp32, here it is placed in float64
    torch.testing.assert_close(_quantile_by_sorting(values, 1 - share), torch.quantile(values, 1 - share))


def test_the_share_of_kept_tokens():
    entropies = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert (entropies >= entropy_quantile(entropies.view(10, 100), 0.2)).sum() == 200
    assert (entropies >= entropy_quantile(entropies, 1.0)).all()


def test_more_entropies_than_torch_takes():
    entropies = torch.arange(17_000_001, dtype=torch.float32) / 2**20
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(entropies, 0.5)
    assert entropy_quantile(entropies, 0.5) == entropies[8_500_000]


def test_no_entropies_and_nan_keep_no_token():
    assert entropy_quantile(torch.zeros(0), 0.5) == math.inf
    nan = torch.tensor([0.1, math.nan, 0.3])
    assert entropy_quantile(nan, 0.5).isnan()
    assert _quantile_by_sorting(nan, 0.5).isnan()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, math.nan])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"top_entropy_quantile must be in \(0, 1\]"):
        entropy_quantile(torch.zeros(3), share)
