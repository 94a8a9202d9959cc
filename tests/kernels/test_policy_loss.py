"""`policy_loss` against the clipped formula in Python floats, its identities, gradcheck, and its errors."""

import dataclasses
import inspect
import math

import pytest
import torch

from grpo_kernels import policy_loss, reference
from grpo_kernels.options import CLIPPED_LOSSES, LEVELS, LOSS_TYPES, PolicyOptions
from tests.kernels.policy_tokens import FEATURES, as_arguments, choose
from tests.kernels.policy_tokens import make_tokens as make_ragged

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
    tokens["weights"] = 0.1 + noise
    if with_ref:
        tokens["ref_logps"] = old + noise - 0.5
    return tokens


def by_hand(
    logp,
    advantage,
    old,
    sampling_weight,
    ref,
    weight,
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
    loss = -min(bounded * advantage, clipped * advantage) * sampling_weight
    kl = 0.0
    if beta:
        kl = math.exp(ref - logp) - (ref - logp) - 1
        kl *= ratio if bias_correction_kl else 1.0
        loss += beta * kl
    is_low = bounded < 1 - epsilon_low and advantage < 0
    is_high = bounded > 1 + epsilon_high and advantage > 0
    return loss * weight, kl, is_low, is_high


def rows_of(tokens):
    refs = tokens.get("ref_logps", tokens["old_logps"])
    names = ("logps_N", "advantages_N", "old_logps", "sampling_weights")
    columns = (*(tokens[name] for name in names), refs, tokens["weights"])
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
    out = policy_loss(**tokens, **options)
    grad = torch.autograd.grad(out.loss.sum(), tokens["logps_N"])[0]
    assert torch.equal(grad, out.slope)
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
    out = policy_loss(logps, advantages, weights=torch.ones_like(logps))
    torch.testing.assert_close(out.loss.detach(), -advantages, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(out.loss.sum(), logps)[0], -advantages, rtol=0, atol=0)
    assert not (out.is_low_clipped | out.is_high_clipped).any()


def test_kl_to_itself_is_zero_and_never_negative():
    tokens = make_tokens(with_ref=True)
    logps = tokens["logps_N"].detach()
    out = policy_loss(logps, tokens["advantages_N"], weights=logps, ref_logps=logps, beta=1.0)
    assert (out.kl == 0).all()
    assert (policy_loss(**tokens, beta=1.0).kl >= 0).all()


def test_bias_corrected_kl_has_the_reverse_kl_slope_on_policy():
    tokens = make_tokens(with_ref=True)
    logps, zeros = tokens["logps_N"], torch.zeros_like(tokens["advantages_N"])
    loss = policy_loss(logps, zeros, weights=zeros + 1, ref_logps=tokens["ref_logps"], beta=1.0).loss
    # d/dlogp of ratio * k3 at ratio 1: k3 + 1 - exp(ref - logp) = logp - ref
    slope = torch.autograd.grad(loss.sum(), logps)[0]
    torch.testing.assert_close(slope, logps.detach() - tokens["ref_logps"])


def test_sequences_of_one_token_are_tokens():
    logps, tokens, _ = make_ragged()
    ids = torch.arange(logps.numel())
    for loss_type in LOSS_TYPES:
        chosen, options = choose("k3 corrected", tokens, loss_type, "token")
        arguments = as_arguments(chosen, options) | {"sequence_ids": ids}
        token = policy_loss(logps, **arguments)
        sequence = policy_loss(logps, **arguments | {"importance_sampling_level": "sequence"})
        torch.testing.assert_close(sequence.loss, token.loss)
        torch.testing.assert_close(sequence.slope, token.slope)


def test_a_sequence_has_the_geometric_mean_of_its_ratios():
    logps, old = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([-1.5, -1.8, -0.4]).double()
    ones, ids = torch.ones(3).double(), torch.tensor([2, 2, 7])
    out = policy_loss(logps, ones, weights=ones, old_logps=old, sequence_ids=ids, importance_sampling_level="sequence")
    expected = [math.exp(0.15), math.exp(0.15), math.exp(-0.1)]
    assert out.ratio.tolist() == pytest.approx(expected)
    # each of two tokens moves both tokens' ratio by half
    assert out.slope.tolist() == pytest.approx([-x for x in expected])


def test_sapo_has_the_policy_gradient_on_policy_and_is_bounded():
    advantages = torch.tensor([1.5, -0.7]).double()
    logps = torch.tensor([-0.5, -2.0]).double()
    ones = torch.ones(2).double()
    near = policy_loss(logps, advantages, weights=ones, loss_type="sapo")
    torch.testing.assert_close(near.slope, -advantages)
    far = policy_loss(logps, advantages, weights=ones, old_logps=logps - 9, loss_type="sapo")
    torch.testing.assert_close(far.loss, -4 * advantages / torch.tensor([1.0, 1.05]).double())


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    logps = torch.tensor([-0.5, -2.0]).double()
    ones = torch.ones(2).double()
    out = policy_loss(
        logps, ones, weights=ones, old_logps=logps - torch.tensor([0.1, 3.0]), loss_type="cispo", epsilon_high=5.0
    )
    assert out.slope.tolist() == pytest.approx([-math.exp(0.1), -5.0])
    assert out.is_high_clipped.tolist() == [False, True]


def test_vespo_weighs_a_sequence_by_the_product_of_its_ratios():
    logps, ids = torch.tensor([-1.0, -2.0, -0.5]).double(), torch.tensor([0, 0, 1])
    ones = torch.ones(3).double()
    out = policy_loss(
        logps,
        torch.tensor([1.0, -1.0, 1.0]).double(),
        weights=ones,
        old_logps=logps - torch.tensor([0.1, 0.2, 0.0]).double(),
        sampling_weights=torch.tensor([1.5, 1.0, 1.0]).double(),
        sequence_ids=ids,
        loss_type="vespo",
    )
    w = 1.5 * math.exp(0.3)
    phi = [math.exp(3) * w**2 * math.exp(-3 * w), math.exp(2) * w**3 * math.exp(-2 * w), 1.0]
    assert out.phi.tolist() == pytest.approx(phi)
    assert out.slope.tolist() == pytest.approx([-phi[0], phi[1], -1.0])


def test_the_off_policy_mask_drops_negative_advantages_of_far_sequences():
    logps = torch.full((4,), -1.0).double()
    ones = torch.ones(4).double()
    out = policy_loss(
        logps,
        torch.tensor([1.0, -1.0, -1.0, -1.0]).double(),
        weights=ones,
        sampling_logps=logps + torch.tensor([0.4, math.nan, 0.0, 0.0]).double(),
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        off_policy_mask_threshold=0.15,
    )
    assert out.slope.tolist() == [-1, 0, 1, 1]


def test_the_entropy_mask_spares_the_kl():
    logps = torch.full((2,), -1.0).double()
    ones = torch.ones(2).double()
    out = policy_loss(
        logps,
        ones,
        weights=ones,
        ref_logps=logps - 1,
        beta=0.5,
        entropies=torch.tensor([0.1, 0.7]).double(),
        entropy_weights=ones,
        entropy_threshold=torch.tensor(0.7).double(),
    )
    # bias-corrected k3 on policy: logp - ref
    assert out.slope.tolist() == pytest.approx([0.5, 0.5 - 1])
    assert out.entropy_slope.tolist() == [0, -1]


# what these take for a constant moves with the log-probs, unless it sits at its bound
CONSTANT = {
    "cispo": {"epsilon_high": 0.1},
    "vespo": {"vespo_k_pos": 0.0, "vespo_k_neg": 0.0},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo"])
def test_gradcheck(loss_type, level, feature):
    logps, tokens, entropies = make_ragged((1, 4, 3), seed=3)
    chosen = choose(feature, tokens, loss_type, level)
    if chosen is None:
        pytest.skip("the loss type refuses it")
    tokens, options = chosen
    if loss_type == "vespo":
        tokens = dataclasses.replace(tokens, old_logps=tokens.old_logps + 20)
        tokens = tokens if tokens.ref_logps is None else dataclasses.replace(tokens, ref_logps=logps + 0.3)
    options = dataclasses.replace(options, **CONSTANT.get(loss_type, {}))
    has_entropies = tokens.needs_entropies

    def total(logps, entropies):
        arguments = as_arguments(tokens, options) | ({"entropies": entropies} if has_entropies else {})
        return policy_loss(logps, **arguments).loss

    assert torch.autograd.gradcheck(total, (logps.requires_grad_(), entropies.requires_grad_(has_entropies)))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_slopes_do_not_need_grad_mode(loss_type):
    logps, tokens, entropies = make_ragged()
    tokens, options = choose("everything", tokens, loss_type, "sequence")
    arguments = as_arguments(tokens, options) | {"entropies": entropies}
    with torch.no_grad():
        out = policy_loss(logps, **arguments)
    assert not out.loss.requires_grad
    leaves = [logps.clone().requires_grad_(), entropies.clone().requires_grad_()]
    loss = policy_loss(leaves[0], **arguments | {"entropies": leaves[1]}).loss.sum()
    slope, entropy_slope = torch.autograd.grad(loss, leaves)
    assert torch.equal(out.slope, slope)
    assert torch.equal(out.entropy_slope, entropy_slope)


def test_totals_of_parts_add_up():
    logps, tokens, _ = make_ragged()
    tokens, options = choose("k3", tokens, "dapo", "token")
    whole = policy_loss(logps, **as_arguments(tokens, options))
    parts = [
        policy_loss(logps[rows], **as_arguments(tokens.rows(rows), options)).totals()
        for rows in (slice(0, 20), slice(20, 20), slice(20, None))
    ]
    assert 0 < whole.totals().low_clipped == whole.is_low_clipped.sum()
    assert 0 < whole.totals().high_clipped == whole.is_high_clipped.sum()
    total = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(dataclasses.astuple(total), dataclasses.astuple(whole.totals()))
    torch.testing.assert_close(whole.totals().kl, whole.kl.sum())
    assert (total.ratio_min, total.ratio_max) == (whole.ratio.min(), whole.ratio.max())


def test_op_and_reference_have_one_signature():
    op, spec = (inspect.signature(f).parameters for f in (policy_loss, reference.policy_loss))
    assert list(op.values()) == [*spec.values(), op["impl"]]
    defaults = {field.name: field.default for field in dataclasses.fields(PolicyOptions)}
    assert {name: spec[name].default for name in defaults} == defaults


def test_no_tokens():
    empty = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.int64)
    for level in LEVELS:
        out = policy_loss(
            empty,
            empty,
            weights=empty,
            old_logps=empty,
            ref_logps=empty,
            beta=0.1,
            sequence_ids=ids,
            importance_sampling_level=level,
        )
        assert out.loss.shape == out.slope.shape == out.ratio.shape == out.kl.shape == (0,)
        totals = [value.item() for value in dataclasses.astuple(out.totals())]
        assert totals == [0, 0, 0, math.inf, -math.inf]


ZEROS, IDS = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
WRONG = {
    r"logps_N must be \[N\] float32 or float64": {"logps_N": torch.zeros(4, 1)},
    "logps_N must be .* torch.bfloat16": {"logps_N": ZEROS.bfloat16()},
    "advantages_N must be like logps_N": {"advantages_N": torch.zeros(3)},
    "weights must be like logps_N": {"weights": torch.zeros(3)},
    "old_logps must be like logps_N": {"old_logps": ZEROS.double()},
    "sampling_weights must be on the device": {"sampling_weights": torch.zeros(4, device="meta")},
    "beta=0.1 and ref_logps was not given": {"beta": 0.1},
    "beta=0.0 and ref_logps was given": {"ref_logps": ZEROS},
    "beta must be finite, got nan": {"beta": float("nan")},
    "epsilon_low must be finite and at least 0": {"epsilon_low": -0.1},
    "epsilon_high must be finite and at least 0, got nan": {"epsilon_high": float("nan")},
    "delta must be finite and above 0": {"delta": 0.0},
    "delta is read only by loss_type grpo, .*, but delta=2.0 came with loss_type='sapo'": {
        "delta": 2.0,
        "loss_type": "sapo",
    },
    "loss_type must be one of grpo, .*, got 'ppo'": {"loss_type": "ppo"},
    "importance_sampling_level must be one of token, sequence, got 'word'": {"importance_sampling_level": "word"},
    "kl_estimator must be one of k1, k2, k3, got 'k4'": {"kl_estimator": "k4"},
    "sapo_temperature_pos must be finite and above 0": {"sapo_temperature_pos": 0.0},
    "vespo_lambda_neg must be finite and at least 0.0001": {"vespo_lambda_neg": 0.0},
    "vespo_k_pos must be finite": {"vespo_k_pos": float("inf")},
    "off_policy_mask_threshold must be finite": {"off_policy_mask_threshold": float("nan"), "sequence_ids": IDS},
    "sequence_ids is needed by .* importance_sampling_level='sequence'": {"importance_sampling_level": "sequence"},
    "sequence_ids is needed by loss_type='vespo'": {"loss_type": "vespo"},
    "sequence_ids is needed by .* off_policy_mask_threshold=0.1": {"off_policy_mask_threshold": 0.1},
    r"sequence_ids must be \[4\] torch.int64, got .* torch.int32": {"sequence_ids": IDS.int()},
    "sequence_ids must be non-decreasing": {"sequence_ids": torch.tensor([0, 1, 0, 1])},
    "sampling_logps is read only with off_policy_mask_threshold": {"sampling_logps": ZEROS},
    "entropies are read exactly .*, but were given with none": {"entropies": ZEROS},
    "entropies are read exactly .*, but were not given with at least one": {"entropy_weights": ZEROS},
    r"entropy_threshold must be \[\] torch.float32, got \[1\]": {
        "entropies": ZEROS,
        "entropy_threshold": torch.zeros(1),
    },
    "entropies must be like logps_N": {"entropies": torch.zeros(5), "entropy_weights": ZEROS},
    "impl must be one of auto, .*, got 'cuda'": {"impl": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message):
    tokens = {"logps_N": ZEROS, "advantages_N": ZEROS, "weights": ZEROS}
    policy_loss(**tokens)
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**tokens, **WRONG[message]})


def test_clipped_losses_differ_in_their_weights_alone():
    logps, tokens, entropies = make_ragged()
    losses = []
    for loss_type in CLIPPED_LOSSES:
        chosen, options = choose("everything", tokens, loss_type, "sequence")
        losses.append(policy_loss(logps, **as_arguments(chosen, options), entropies=entropies).loss)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_under_inference_mode():
    logps, tokens, entropies = make_ragged()
    chosen, options = choose("everything", tokens, "dapo", "sequence")
    expected = policy_loss(logps, **as_arguments(chosen, options), entropies=entropies)
    with torch.inference_mode():
        made = logps * 1.0
        out = policy_loss(made, **as_arguments(chosen, options), entropies=entropies)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.slope, expected.slope)
