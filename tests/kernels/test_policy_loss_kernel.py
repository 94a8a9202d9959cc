"""The Triton kernel against the float64 reference: every loss type, level and feature, and what slopes must do."""

import dataclasses

import pytest
import torch

from grpo_kernels import policy_loss, policy_terms
from grpo_kernels.options import LEVELS, LOSS_TYPES, PolicyOptions, Tokens
from grpo_kernels.policy_loss import run_policy_loss
from tests.heads import KERNEL_DEVICE
from tests.kernels.policy_tokens import FEATURES, as_arguments, choose, make_tokens, to_dtype

pytest.importorskip("triton")

BLOCK = 512
# one loss of each kind; the five clipped ones differ in their weights alone
KINDS = ("dapo", "cispo", "sapo", "vespo")
# a few roundings of fp32; a sequence's ratio sums up to 600 log-ratios
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def _poison():
    """Memory nobody wrote is NaN, and tensors are made where the kernels run."""
    torch.use_deterministic_algorithms(True)
    torch.set_default_device(KERNEL_DEVICE)
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


def assert_same(out, expected, **tolerance):
    for field in dataclasses.fields(out):
        value, exact = getattr(out, field.name), getattr(expected, field.name)
        assert (value is None) == (exact is None), field.name
        if value is None:
            continue
        if value.dtype == torch.bool:
            assert value.tolist() == exact.tolist(), field.name
            continue
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact.double(), msg=lambda m, f=field: f"{f.name}: {m}", **tolerance)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", KINDS)
def test_equals_the_reference(loss_type, level, feature):
    logps, tokens, entropies = make_tokens()
    chosen = choose(feature, tokens, loss_type, level)
    if chosen is None:
        pytest.skip("the loss type refuses it")
    tokens, options = chosen
    entropies = entropies if tokens.needs_entropies else None
    expected = policy_terms.run_policy_loss(logps, tokens, options, entropies=entropies)
    single = None if entropies is None else entropies.float()
    out = run_policy_loss(logps.float(), to_dtype(tokens, torch.float32), options, entropies=single, impl="triton")
    assert_same(out, expected, **CLOSE)
    if options.is_clipped and level == "token" and "delta" not in feature:
        assert out.is_low_clipped.any()
        assert out.is_high_clipped.any()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_loss_type_has_its_kernel(loss_type, level):
    logps, tokens, entropies = make_tokens((5, 12), dtype=torch.float32)
    tokens, options = choose("everything", tokens, loss_type, level)
    arguments = as_arguments(tokens, options) | {"entropies": entropies}
    assert_same(policy_loss(logps, **arguments, impl="triton"), policy_loss(logps, **arguments, impl="torch"), **CLOSE)


@pytest.mark.parametrize("lengths", [(), (1,), (BLOCK,), (BLOCK + 1,), (3, BLOCK + 1, 40)], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_lengths_around_a_block(loss_type, level, lengths):
    logps, tokens, entropies = make_tokens(lengths)
    tokens, options = choose("everything", tokens, loss_type, level)
    expected = policy_terms.run_policy_loss(logps, tokens, options, entropies=entropies)
    out = run_policy_loss(
        logps.float(), to_dtype(tokens, torch.float32), options, entropies=entropies.float(), impl="triton"
    )
    assert_same(out, expected, **CLOSE)


@pytest.mark.parametrize("feature", ["bare", "everything"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", KINDS)
def test_any_upstream_gradient(loss_type, level, feature):
    logps, tokens, entropies = make_tokens()
    tokens, options = choose(feature, tokens, loss_type, level)
    upstream = torch.linspace(-2, 2, logps.numel())

    def gradients(dtype, impl):
        leaves = [logps.to(dtype).requires_grad_(), entropies.to(dtype).requires_grad_()]
        arguments = as_arguments(to_dtype(tokens, dtype), options) | {"impl": impl}
        if tokens.needs_entropies:
            arguments["entropies"] = leaves[1]
        else:
            leaves.pop()
        return torch.autograd.grad(policy_loss(leaves[0], **arguments).loss, leaves, upstream.to(dtype))

    exact = gradients(torch.float64, "torch")
    for gradient, expected in zip(gradients(torch.float32, "triton"), exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, **CLOSE)


def test_double_backward_is_refused():
    logps, tokens, _ = make_tokens((4,), dtype=torch.float32)
    logps.requires_grad_()
    loss = policy_loss(logps, tokens.advantages, weights=tokens.weights, impl="triton").loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss.sum(), logps, create_graph=True)


def test_only_the_loss_carries_a_gradient():
    logps, tokens, entropies = make_tokens((4, 3), dtype=torch.float32)
    tokens, options = choose("everything", tokens, "vespo", "sequence")
    arguments = as_arguments(tokens, options)
    out = policy_loss(logps.requires_grad_(), **arguments, entropies=entropies, impl="triton")
    assert out.loss.requires_grad
    rest = [getattr(out, field.name) for field in dataclasses.fields(out)][1:]
    assert not any(tensor.requires_grad for tensor in rest)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("feature", ["bare", "everything"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", KINDS)
def test_extremes_are_finite_where_the_reference_is(loss_type, level, feature):
    values = [(r, a) for r in (-100.0, -80.0, 0.0, 80.0, 100.0, float("nan"), float("inf")) for a in (1.5, -1.5, 0.0)]
    log_ratio, advantages = torch.tensor(values).T.contiguous()
    N = len(values)
    logps, ones = torch.linspace(-9, -1, N), torch.ones(N)
    tokens = Tokens(
        advantages=advantages,
        weights=ones,
        old_logps=logps - log_ratio,
        ref_logps=logps + torch.linspace(-100, 100, N).flip(0),
        sampling_weights=torch.arange(N) % 3 * 1.0,
        sampling_logps=logps - log_ratio,
        sequence_ids=torch.arange(N),
        entropy_threshold=torch.tensor(0.5),
        entropy_weights=ones,
    )
    tokens, options = choose(feature, tokens, loss_type, level)
    entropies = torch.arange(N) % 2 * 1.0
    out = run_policy_loss(logps, tokens, options, entropies=entropies, impl="triton")
    expected = policy_terms.run_policy_loss(logps, tokens, options, entropies=entropies)
    assert out.slope[expected.slope.isfinite()].isfinite().all()
    if feature == "everything":
        # the bias-corrected k3's slope cancels in the reference
        expected = dataclasses.replace(expected, slope=out.slope)
    assert_same(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
def test_ratios_at_the_clip_keep_their_slope(level):
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0])
    zeros, ones = torch.zeros(4), torch.ones(4)
    tokens = Tokens(advantages=advantages, weights=ones, old_logps=zeros, sequence_ids=torch.arange(4))
    for bounds in ({"epsilon_low": 0.0, "epsilon_high": 0.0}, {"epsilon_high": 0.0, "delta": 1.0}):
        options = PolicyOptions(importance_sampling_level=level, **bounds)
        out = run_policy_loss(zeros, tokens, options, impl="triton")
        assert_same(out, policy_terms.run_policy_loss(zeros, tokens, options), rtol=0, atol=0)
        assert out.slope.tolist() == [-1, 1, 0, -2]


def test_runs_are_bitwise_equal_and_sequences_independent():
    logps, tokens, entropies = make_tokens((30, BLOCK + 9, 6), dtype=torch.float32)
    for loss_type in ("dapo", "vespo"):
        chosen, options = choose("everything", tokens, loss_type, "sequence")
        whole = run_policy_loss(logps, chosen, options, entropies=entropies, impl="triton")
        again = run_policy_loss(logps, chosen, options, entropies=entropies, impl="triton")
        rows = slice(30, 30 + BLOCK + 9)
        alone = run_policy_loss(logps[rows], chosen.rows(rows), options, entropies=entropies[rows], impl="triton")
        for name in ("loss", "slope", "ratio"):
            assert torch.equal(getattr(whole, name), getattr(again, name))
            assert torch.equal(getattr(whole, name)[rows], getattr(alone, name))


def test_strided_inputs():
    logps, tokens, _ = make_tokens((9, 5), dtype=torch.float32)
    wide = torch.stack([logps, tokens.advantages, tokens.weights], dim=1)
    strided, plain = wide.unbind(1), [column.contiguous() for column in wide.unbind(1)]
    loss, expected = (
        policy_loss(a, b, weights=w, old_logps=a * 0.9, impl="triton").loss for a, b, w in (strided, plain)
    )
    assert torch.equal(loss, expected)


def test_float64_is_refused():
    x = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        policy_loss(x, x, weights=x, impl="triton")
