"""`policy_loss` against the formula written out in Python floats, its identities, and its gradient by differences."""

import math

import pytest
import torch

from grpo_kernels import policy_loss

# the current policy against the old one: far below, at, and far above the clip range, with and without the clip
LOG_RATIOS = [-2.0, -0.5, -0.1, 0.0, 0.1, 0.2, 0.5, 1.2, 2.0]
OPTIONS = [
    {},
    {"epsilon_low": 0.1, "epsilon_high": 0.28},
    {"delta": 2.5},
    {"beta": 0.04},
    {"beta": 0.3, "bias_correction_kl": False, "delta": 1.1},
]


def make_tokens(*, with_ref):
    """Every log-ratio with an advantage of either sign and of zero; float64."""
    g = torch.Generator().manual_seed(0)
    pairs = [(x, a) for x in LOG_RATIOS for a in (1.3, -0.7, 0.0)]
    log_ratio, advantages = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    N = len(pairs)
    old, noise, weights = (torch.rand(N, generator=g, dtype=torch.float64) for _ in range(3))
    old = -3 * old
    tokens = {"logps_N": (old + log_ratio).requires_grad_(), "advantages_N": advantages, "old_logps": old}
    tokens["sampling_weights"] = 0.5 + weights
    if with_ref:
        tokens["ref_logps"] = old + noise - 0.5
    return tokens


def by_hand(
    logp,
    advantage,
    old,
    weight,
    ref,
    *,
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=math.inf,
    beta=0.0,
    bias_correction_kl=True,
):
    """One token's loss, its KL, and whether it is clipped below or above; Python floats."""
    ratio = math.exp(logp - old)
    bounded = min(ratio, delta)
    clipped = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
    loss = -min(bounded * advantage, clipped * advantage) * weight
    kl = 0.0
    if beta:
        kl = math.exp(ref - logp) - (ref - logp) - 1
        kl *= ratio if bias_correction_kl else 1.0
        loss += beta * kl
    is_low = bounded < 1 - epsilon_low and advantage < 0
    is_high = bounded > 1 + epsilon_high and advantage > 0
    return loss, kl, is_low, is_high


def rows_of(tokens):
    refs = tokens.get("ref_logps", tokens["old_logps"])
    columns = (tokens["logps_N"], tokens["advantages_N"], tokens["old_logps"], tokens["sampling_weights"], refs)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_formula(options, dtype):
    tokens = {k: v.detach().to(dtype) for k, v in make_tokens(with_ref="beta" in options).items()}
    out = policy_loss(**tokens, **options)
    loss, kl, is_low, is_high = zip(*(by_hand(*row, **options) for row in rows_of(tokens)), strict=True)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.loss, torch.tensor(loss, dtype=dtype), **tolerance)
    assert out.is_low_clipped.tolist() == list(is_low)
    assert out.is_high_clipped.tolist() == list(is_high)
    assert any(is_low)
    assert any(is_high) or options.get("delta") == 1.1
    if "beta" in options:
        torch.testing.assert_close(out.kl, torch.tensor(kl, dtype=dtype), **tolerance)
    else:
        assert out.kl is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_is_the_derivative(options):
    tokens = make_tokens(with_ref="beta" in options)
    grad = torch.autograd.grad(policy_loss(**tokens, **options).loss.sum(), tokens["logps_N"])[0]
    step = 1e-6
    for slope, (logp, *rest) in zip(grad.tolist(), rows_of(tokens), strict=True):
        up, down = (by_hand(logp + side * step, *rest, **options)[0] for side in (1, -1))
        # central differences of a smooth piece: step**2 and rounding 1e-16 / step
        assert slope == pytest.approx((up - down) / (2 * step), abs=1e-7)


def test_the_ratio_is_reported_before_any_clip():
    tokens = make_tokens(with_ref=False)
    out = policy_loss(**tokens, delta=1.05)
    torch.testing.assert_close(out.ratio.log(), tokens["logps_N"].detach() - tokens["old_logps"])
    assert not out.ratio.requires_grad


def test_on_policy_loss_is_minus_the_advantage_and_so_is_its_slope():
    tokens = make_tokens(with_ref=False)
    logps, advantages = tokens["logps_N"], tokens["advantages_N"]
    out = policy_loss(logps, advantages)
    torch.testing.assert_close(out.loss.detach(), -advantages, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), logps)[0], -advantages, rtol=0, atol=0)
    assert not (out.is_low_clipped | out.is_high_clipped).any()


def test_kl_to_itself_is_zero_and_never_negative():
    tokens = make_tokens(with_ref=True)
    logps = tokens["logps_N"].detach()
    assert (policy_loss(logps, tokens["advantages_N"], ref_logps=logps, beta=1.0).kl == 0).all()
    assert (policy_loss(**tokens, beta=1.0).kl >= 0).all()


def test_bias_corrected_kl_has_the_reverse_kl_slope_on_policy():
    tokens = make_tokens(with_ref=True)
    logps, zeros = tokens["logps_N"], torch.zeros_like(tokens["advantages_N"])
    loss = policy_loss(logps, zeros, ref_logps=tokens["ref_logps"], beta=1.0).loss
    # d/dlogp of ratio * k3 at ratio 1: k3 + 1 - exp(ref - logp) = logp - ref
    slope = torch.autograd.grad(loss.sum(), logps)[0]
    torch.testing.assert_close(slope, logps.detach() - tokens["ref_logps"])


def test_no_tokens():
    empty = torch.zeros(0)
    out = policy_loss(empty, empty, old_logps=empty, ref_logps=empty, beta=0.1)
    assert out.loss.shape == out.ratio.shape == out.kl.shape == (0,)


WRONG = {
    r"logps_N must be \[N\] float32 or float64": {"logps_N": torch.zeros(4, 1)},
    "logps_N must be .* torch.bfloat16": {"logps_N": torch.zeros(4).bfloat16()},
    "advantages_N must be like logps_N": {"advantages_N": torch.zeros(3)},
    "old_logps must be like logps_N": {"old_logps": torch.zeros(4).double()},
    "sampling_weights must be on the device": {"sampling_weights": torch.zeros(4, device="meta")},
    "beta=0.1 and ref_logps was not given": {"beta": 0.1},
    "beta=0.0 and ref_logps was given": {"ref_logps": torch.zeros(4)},
    "epsilon_low must be at least 0": {"epsilon_low": -0.1},
    "epsilon_high must be at least 0, got nan": {"epsilon_high": float("nan")},
    "delta must be finite and above 0": {"delta": 0.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message):
    tokens = {"logps_N": torch.zeros(4), "advantages_N": torch.zeros(4)}
    policy_loss(**tokens)
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**tokens, **WRONG[message]})
