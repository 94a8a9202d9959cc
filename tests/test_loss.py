"""A micro-batch's loss and metric sums from its packs, against the padded formula in float64."""

import math

import pytest
import torch

from grpo_fast.importance import Correction, mismatch_metrics
from grpo_fast.loss import Bonus, Objective, RowsLoss, base_stats, row_weights
from grpo_fast.metrics import Stats, has_samplers, loss_metrics, ratio_metrics
from grpo_kernels.options import PolicyOptions

B, C = 4, 5
LENGTHS = [5, 3, 0, 4]
# the same few sums in fp32 and in float64
RTOL, ATOL = 1e-5, 1e-6


def make_inputs(**extra):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(C) < torch.tensor(LENGTHS)[:, None]
    inputs = {
        "completion_mask": mask.long(),
        "advantages": torch.tensor([1.0, -0.5, 2.0, 0.3]),
        "old_per_token_logps": -torch.rand(B, C, generator=g) * 2,
        "ref_per_token_logps": -torch.rand(B, C, generator=g) * 2,
        "sampling_per_token_logps": -torch.rand(B, C, generator=g) * 2,
        "num_items_in_batch": torch.tensor(30),
    }
    logps = (-torch.rand(B, C, generator=g) * 2).requires_grad_()
    return inputs | extra, logps, mask


def make_objective(*, correction=None, max_completion_length=8, **changes):
    options = {"loss_type": "grpo", "epsilon_high": 0.3, "beta": 0.1}
    return Objective(
        options=PolicyOptions(**options | changes),
        correction=correction or Correction(mode="sequence_truncate", clip_min=None, clip_max=2.0),
        max_completion_length=max_completion_length,
    )


def make_parts(rows, columns, inputs, weights, objective):
    lengths = tuple(torch.unique_consecutive(rows, return_counts=True)[1].tolist())
    return RowsLoss(rows, columns, lengths, inputs, weights_B=weights, objective=objective, bonus=Bonus())


def metrics_of(stats, objective):
    vector = stats.vector()[None]
    metrics = loss_metrics(vector, objective.options, has_bonus=False, has_aux_loss=False, policy_scale=1.0)
    log_ratios = torch.cat([vector[0, :0], *stats.log_ratios])
    return metrics | ratio_metrics(vector[None]) | mismatch_metrics(log_ratios[None])


def packed(inputs, logps, mask, objective, splits=((0, 1), (2, 3))):
    """The loss over packs of rows, and the metrics."""
    weights = row_weights(
        inputs["completion_mask"].sum(1),
        objective=objective,
        num_items_per_process=inputs["num_items_in_batch"],
        accumulation=2,
        windows=2 / 4,
    )
    total, stats = 0.0, base_stats(objective, inputs, mask)
    for split in splits:
        kept = mask.clone()
        kept[[i for i in range(B) if i not in split]] = False
        rows, columns = kept.nonzero(as_tuple=True)
        entropies = torch.full((len(rows),), 0.5)
        parts = make_parts(rows, columns, inputs, weights, objective)
        terms = parts.differentiable(logps[rows, columns], entropies)
        loss, pack_stats = terms.loss.sum(), parts.stats(logps[rows, columns], entropies, terms)
        total, stats = total + loss, stats + pack_stats
    return total, metrics_of(stats, objective)


def padded(inputs, logps, mask, objective):
    """TRL 1.16's padded maths, section by section, in float64."""
    mask = mask.double()
    exact = {k: v.double() for k, v in inputs.items()}
    logps, old = logps.double(), exact["old_per_token_logps"]
    advantages = exact["advantages"] if exact["advantages"].dim() == 2 else exact["advantages"][:, None]
    ratio = (logps - old).exp()
    clipped = ratio.clamp(1 - objective.options.epsilon_low, 1 + objective.options.epsilon_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    weights = exact.get("importance_sampling_ratio")
    if weights is None:
        difference = (old - exact["sampling_per_token_logps"]) * mask
        weights = difference.sum(1, keepdim=True).exp().clamp(max=objective.correction.clip_max)
    loss = loss * weights
    delta = exact["ref_per_token_logps"] - logps
    kl = (delta.exp() - delta - 1) * ratio
    loss = (loss + objective.options.beta * kl) * mask
    lengths = mask.sum(1).clamp(min=1)
    per_loss_type = {
        "grpo": (loss.sum(1) / lengths).mean() / 2,
        "bnpo": loss.sum() / mask.sum() / 2,
        "dr_grpo": loss.sum() / (B * objective.max_completion_length) / 2,
        "dapo": loss.sum() / (30 * 2 / 4),
    }
    return per_loss_type[objective.options.loss_type], (kl * mask).sum() / mask.sum(), weights


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"advantages": torch.linspace(-1, 1, B * C).view(B, C)},
        {"importance_sampling_ratio": torch.linspace(0.5, 2, B)[:, None]},
        {"importance_sampling_ratio": torch.linspace(0.5, 2, B * C).view(B, C)},
    ],
    ids=["row advantages", "token advantages", "given row weights", "given token weights"],
)
def test_packs_add_up_to_the_padded_loss(loss_type, extra):
    inputs, logps, mask = make_inputs(**extra)
    objective = make_objective(loss_type=loss_type)
    loss, metrics = packed(inputs, logps, mask, objective)
    expected, kl, _ = padded(inputs, logps, mask, objective)
    torch.testing.assert_close(loss.double(), expected, rtol=RTOL, atol=ATOL)
    assert metrics["kl"] == pytest.approx(kl.item(), rel=RTOL)

    (gradient,) = torch.autograd.grad(loss, logps)
    (gradient_expected,) = torch.autograd.grad(expected, logps)
    torch.testing.assert_close(gradient, gradient_expected, rtol=RTOL, atol=ATOL)


def test_metrics():
    inputs, logps, mask = make_inputs()
    objective = make_objective(beta=0.0)
    _, metrics = packed(inputs, logps, mask, objective)
    ratio = (logps - inputs["old_per_token_logps"]).exp()
    low = ((ratio < 0.8) & (inputs["advantages"][:, None] < 0) & mask).float()
    high = ((ratio > 1.3) & (inputs["advantages"][:, None] > 0) & mask).float()
    tokens = mask.sum()
    row_share = [(part.sum(1) / mask.sum(1))[mask.any(1)] for part in (low, high)]
    _, _, weights = padded(inputs, logps, mask, make_objective())
    log_ratio = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"])[mask].double()
    difference, ratio = log_ratio.abs(), log_ratio.exp()
    row_log_ratios = torch.stack([part.sum() for part in log_ratio.split([n for n in LENGTHS if n])])
    expected = {
        "entropy": 0.5,
        "clip_ratio/low_mean": low.sum() / tokens,
        "clip_ratio/high_mean": high.sum() / tokens,
        "clip_ratio/region_mean": (low + high).sum() / tokens,
        "clip_ratio/low_min": row_share[0].min(),
        "clip_ratio/high_max": row_share[1].max(),
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
        "sampling/sampling_logp_difference/p99": difference.quantile(0.99),
        "sampling/effective_sample_size": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
        "sampling/kl_sampler_trainer": (ratio - 1 - log_ratio).mean(),
        "sampling/kl_trainer_sampler": (ratio * log_ratio - ratio + 1).mean(),
        "sampling/importance_sampling_ratio/min": weights.min(),
        "sampling/importance_sampling_ratio/mean": weights.mean(),
        "sampling/importance_sampling_ratio/max": weights.max(),
        # the row without tokens counts as 1
        "sampling/importance_sampling_ratio/unclipped_mean": (row_log_ratios.exp().sum() + 1) / B,
    }
    assert metrics == pytest.approx({k: float(v) for k, v in expected.items()}, rel=RTOL)
    assert high.sum() > 0, "nothing is clipped: the metrics would be 0 whatever they count"


def test_no_tokens_give_no_metric_but_nan():
    objective = make_objective(beta=0.0, correction=Correction(mode="token_mask", clip_min=None, clip_max=2.0))
    inputs, _, mask = make_inputs()
    metrics = metrics_of(base_stats(objective, inputs, torch.zeros_like(mask)), objective)
    assert metrics["entropy"] == 0
    assert math.isnan(metrics["clip_ratio/low_min"])
    assert metrics["sampling/importance_sampling_ratio/max"] == 0
    assert not has_samplers(Stats.empty(mask.device).vector()[None, None])


def test_advantages_of_another_dtype_are_named():
    inputs, _, mask = make_inputs(advantages=torch.zeros(B).double())
    rows, columns = mask.nonzero(as_tuple=True)
    with pytest.raises(ValueError, match="weights must be like advantages_N"):
        make_parts(rows, columns, inputs, torch.ones(B), make_objective())


@pytest.mark.parametrize("mode", ["token_mask", "sequence_truncate"])
@pytest.mark.parametrize("missing", [(), ("old_per_token_logps",)], ids=["old", "no old"])
def test_slopes_of_some_rows_are_the_gradient_of_all(mode, missing):
    inputs, logps, mask = make_inputs()
    for name in missing:
        del inputs[name]
    objective = make_objective(correction=Correction(mode=mode, clip_min=None, clip_max=2.0))
    rows, columns = mask.nonzero(as_tuple=True)
    weights = torch.rand(B, generator=torch.Generator().manual_seed(1))
    parts = make_parts(rows, columns, inputs, weights, objective)
    entropies = torch.zeros(len(rows))
    (expected,) = torch.autograd.grad(parts.differentiable(logps[rows, columns], entropies).loss.sum(), logps)
    values = logps.detach()[rows, columns]
    assert parts.needs_whole_rows == (mode == "sequence_truncate")
    for start, stop in [(0, LENGTHS[0]), (LENGTHS[0], len(rows))]:
        terms = parts.of_rows(values[start:stop], entropies[start:stop], slice(start, stop))
        assert not terms.loss.requires_grad
        torch.testing.assert_close(terms.slope, expected[rows, columns][start:stop], rtol=RTOL, atol=ATOL)
