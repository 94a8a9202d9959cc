"""`linear_policy_loss` against float64: values, gradients, memory of what is given, errors, determinism.

Run by Triton's interpreter the kernels do the same as torch's operations: both are tested, at different sizes.
"""

import pytest
import torch

from grpo_kernels import LinearPolicyLoss, linear_logps, linear_policy_loss, policy_loss, reference
from grpo_kernels.options import LOSS_TYPES
from grpo_kernels.policy_terms import PolicyLoss
from tests.heads import KERNEL_DEVICE, make_head, placed, relative_rms, to_float64
from tests.kernels.policy_runs import loss_and_grads, make_tokens

# fp32 sums of thousands of terms against float64
FP32_LOGPS, FP32_GRADS = 1e-5, 1e-5
# fp32-accumulated logits: only the exponentials' sum and the logits' summation order are left
HALF_LOGPS = 2e-4
# exponentials, scaled rows and the result are rounded to bf16 once each, 1.6e-3 RMS a time
HALF_GRADS = 3e-3

# MiB: one block, and several
ONE_BLOCK, BLOCKS = 640, 2

TORCH = {"impl": "torch"}
KERNELS = [{"impl": "triton", "candidate": "tile"}, {"impl": "triton", "candidate": "fused"}]
# on a GPU the fused kernel multiplies half precision only
FP32_KERNELS = KERNELS if KERNEL_DEVICE.type == "cpu" else KERNELS[:1]


def ids(options):
    return "-".join(str(value) for value in options.values())


def run(inputs, tokens, how, **options):
    """Ours where `how` runs; the results on the CPU."""
    if how["impl"] == "triton":
        inputs, tokens = placed(inputs), placed(tokens)
        options = {k: v.to(KERNEL_DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    result, grads = loss_and_grads(linear_policy_loss, inputs, tokens, **how, **options)
    terms = {k: None if v is None else v.cpu() for k, v in vars(result.terms).items()}
    values = {k: v.detach().cpu() for k, v in vars(result).items() if k != "terms"}
    return LinearPolicyLoss(**values, terms=PolicyLoss(**terms)), {k: v.cpu() for k, v in grads.items()}


def assert_matches_float64(
    inputs, tokens, *, logps, grads, upstream=1.0, workspace_mib=ONE_BLOCK, how=TORCH, **options
):
    ours, our_grads = run(inputs, tokens, how, upstream=upstream, workspace_mib=workspace_mib, **options)
    wide_tokens = {k: v if v.dtype == torch.int64 else v.double() for k, v in tokens.items()}
    exact, exact_grads = loss_and_grads(
        reference.linear_policy_loss, to_float64(inputs), wide_tokens, upstream=upstream, **options
    )
    assert (ours.logps <= 0).all()
    torch.testing.assert_close(ours.logps.double(), exact.logps, rtol=0, atol=logps)
    torch.testing.assert_close(ours.entropy.double(), exact.entropy, rtol=0, atol=max(logps, 1e-5))
    # a ratio's relative error is the log-prob's absolute one; weights sum to about a half
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=20 * logps, atol=logps)
    torch.testing.assert_close(ours.terms.ratio.double(), exact.terms.ratio, rtol=3 * logps, atol=0)
    assert torch.equal(ours.terms.is_low_clipped, exact.terms.is_low_clipped)
    assert torch.equal(ours.terms.is_high_clipped, exact.terms.is_high_clipped)
    assert ours.totals.low_clipped == exact.totals.low_clipped
    torch.testing.assert_close(ours.totals.ratio_max.double(), exact.totals.ratio_max, rtol=3 * logps, atol=0)
    for name, expected in exact_grads.items():
        assert our_grads[name].dtype == inputs[name].dtype
        assert relative_rms(our_grads[name], expected) <= grads, name


@pytest.mark.parametrize("workspace_mib", [ONE_BLOCK, BLOCKS], ids=["one block", "blocks"])
@pytest.mark.parametrize(("N", "V", "D"), [(0, 7, 64), (1, 7, 64), (13, 1000, 100), (513, 1000, 64), (700, 4097, 100)])
def test_fp32_matches_float64(N, V, D, workspace_mib):
    inputs = make_head(N, V, D, bias=D == 100)
    tokens = make_tokens(inputs, beta=0.04, with_bonus=V == 1000)
    options = {"beta": 0.04, "loss_type": "dapo", "temperature": 1.2}
    assert_matches_float64(inputs, tokens, logps=FP32_LOGPS, grads=FP32_GRADS, workspace_mib=workspace_mib, **options)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss(loss_type, level):
    inputs = make_head(300, 500, 40)
    tokens = make_tokens(inputs, beta=0.1, with_bonus=True)
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": 0.1,
        "off_policy_mask_threshold": 0.02,
    }
    for workspace_mib in (ONE_BLOCK, 1):
        assert_matches_float64(
            inputs, tokens, logps=FP32_LOGPS, grads=FP32_GRADS, workspace_mib=workspace_mib, **options
        )


@pytest.mark.parametrize(
    ("how", "dtype"),
    [*((how, torch.float32) for how in FP32_KERNELS), *((how, torch.float16) for how in KERNELS)],
    ids=lambda value: ids(value) if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1, "importance_sampling_level": "sequence"},
        {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3},
        {"loss_type": "cispo", "epsilon_high": 2.0},
    ],
    ids=str,
)
def test_kernels_match_float64(how, dtype, options):
    exact = dtype == torch.float32
    for (N, V, D), workspace_mib in [((70, 300, 40), ONE_BLOCK), ((80, 200, 33), 1)]:
        inputs = make_head(N, V, D, dtype=dtype, bias=D == 33)
        tokens = make_tokens(inputs, beta=options.get("beta", 0.0), with_bonus="softcap" not in options)
        assert_matches_float64(
            inputs,
            tokens,
            logps=FP32_LOGPS if exact else HALF_LOGPS,
            grads=FP32_GRADS if exact else HALF_GRADS,
            workspace_mib=workspace_mib,
            how=how,
            **options,
        )


@pytest.mark.parametrize("how", [TORCH, *FP32_KERNELS], ids=ids)
@pytest.mark.parametrize("wanted", [("hidden_ND",), ("weight_VD",), ("bias",), ("hidden_ND", "bias")], ids="+".join)
@pytest.mark.parametrize("with_bonus", [False, True], ids=["", "bonus"])
def test_any_subset_of_gradients(how, wanted, with_bonus):
    inputs = make_head(80, 200, 24, bias=True)
    for name in set(inputs) - {"targets_N"} - set(wanted):
        inputs[name].requires_grad_(False)
    tokens = make_tokens(inputs, with_bonus=with_bonus)
    assert_matches_float64(inputs, tokens, logps=FP32_LOGPS, grads=FP32_GRADS, workspace_mib=1, how=how)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("with_bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize("workspace_mib", [ONE_BLOCK, BLOCKS], ids=["one block", "blocks"])
def test_bf16_matches_float64_of_the_same_operands(options, with_bonus, workspace_mib):
    inputs = make_head(700, 3000, 100, dtype=torch.bfloat16)
    tokens = make_tokens(inputs, with_bonus=with_bonus)
    assert_matches_float64(inputs, tokens, logps=HALF_LOGPS, grads=HALF_GRADS, workspace_mib=workspace_mib, **options)


def test_float64_operands_are_computed_in_float64():
    inputs = make_head(40, 500, 30, dtype=torch.float64)
    tokens = make_tokens(inputs, with_bonus=True)
    tokens = {k: v if v.dtype == torch.int64 else v.double() for k, v in tokens.items()}
    assert_matches_float64(inputs, tokens, logps=1e-12, grads=1e-12)


@pytest.mark.parametrize("how", [TORCH, *FP32_KERNELS], ids=ids)
def test_one_temperature_a_token(how):
    inputs = make_head(90, 150, 24)
    temperature = torch.linspace(0.5, 2.0, 90)
    tokens = make_tokens(inputs)
    for softcap in (None, 10.0):
        ours, _ = run(inputs, tokens, how, temperature=temperature, softcap=softcap)
        for row in (0, 45, 89):
            one = slice(row, row + 1)
            logps, entropy = linear_logps(
                inputs["hidden_ND"][one],
                inputs["weight_VD"],
                inputs["targets_N"][one],
                temperature=float(temperature[row]),
                softcap=softcap,
                return_entropy=True,
            )
            torch.testing.assert_close(ours.logps[one], logps.detach(), rtol=0, atol=FP32_LOGPS)
            torch.testing.assert_close(ours.entropy[one], entropy.detach(), rtol=0, atol=FP32_LOGPS)
        assert_matches_float64(
            inputs, tokens, logps=FP32_LOGPS, grads=FP32_GRADS, temperature=temperature, softcap=softcap, how=how
        )


@pytest.mark.parametrize("workspace_mib", [ONE_BLOCK, 1])
def test_entropy_quantile_keeps_the_tokens_above_it(workspace_mib):
    inputs = make_head(300, 500, 40)
    for with_bonus in (False, True):
        tokens = make_tokens(inputs, beta=0.1, with_bonus=with_bonus)
        assert_matches_float64(
            inputs,
            tokens,
            logps=FP32_LOGPS,
            grads=FP32_GRADS,
            workspace_mib=workspace_mib,
            beta=0.1,
            top_entropy_quantile=0.3,
        )


def test_a_threshold_does_what_its_quantile_does():
    inputs = make_head(100, 500, 40)
    tokens = make_tokens(inputs)
    by_share = linear_policy_loss(**inputs, **tokens, top_entropy_quantile=0.25)
    threshold = torch.quantile(by_share.entropy, 0.75)
    by_threshold = linear_policy_loss(**inputs, **tokens, entropy_threshold=threshold)
    assert torch.equal(by_share.loss, by_threshold.loss)
    assert (by_share.terms.loss != 0).sum() == 25


def test_upstream_gradient_scales_all():
    inputs = make_head(60, 300, 40, bias=True)
    assert_matches_float64(inputs, make_tokens(inputs), logps=FP32_LOGPS, grads=FP32_GRADS, upstream=0.37)


def test_equals_the_two_ops_one_after_the_other():
    inputs = make_head(300, 1000, 64, dtype=torch.bfloat16)
    tokens = make_tokens(inputs, beta=0.1)
    advantages = tokens.pop("advantages_N")
    one, grads = loss_and_grads(linear_policy_loss, inputs, {**tokens, "advantages_N": advantages}, beta=0.1)
    logps = linear_logps(**inputs)
    terms = policy_loss(logps, advantages, **tokens, beta=0.1)
    two = torch.autograd.grad(terms.loss.sum(), [inputs["hidden_ND"], inputs["weight_VD"]])
    assert torch.equal(one.logps, logps.detach())
    assert torch.equal(one.loss, terms.loss.sum())
    for name, expected in zip(("hidden_ND", "weight_VD"), two, strict=True):
        assert torch.equal(grads[name], expected), name


@pytest.mark.parametrize("how", [TORCH, *FP32_KERNELS], ids=ids)
def test_three_runs_are_bitwise_equal(how):
    inputs = make_head(70, 150, 24)
    # targets that repeat: their rows of the weight's gradient add up in a fixed order
    inputs["targets_N"] %= 5
    tokens = make_tokens(inputs)
    runs = [run(inputs, tokens, how, workspace_mib=1) for _ in range(3)]
    for result, grads in runs[1:]:
        assert torch.equal(result.loss, runs[0][0].loss)
        assert torch.equal(result.logps, runs[0][0].logps)
        assert all(torch.equal(grads[name], runs[0][1][name]) for name in grads)


@pytest.mark.parametrize("how", [TORCH, *KERNELS], ids=ids)
def test_scoring_equals_training_bitwise(how):
    inputs = make_head(80, 200, 40, dtype=torch.float16)
    with torch.no_grad():
        old = linear_logps(**(inputs if how == TORCH else placed(inputs)), workspace_mib=1, **how).cpu()
    result, _ = run(inputs, {**make_tokens(inputs), "old_logps": old}, how, workspace_mib=1)
    assert (result.terms.ratio == 1).all()


@pytest.mark.parametrize("how", [TORCH, *KERNELS], ids=ids)
def test_a_row_does_not_depend_on_its_company(how):
    inputs = {k: v.detach() for k, v in placed(make_head(100, 200, 40, dtype=torch.float16)).items()}
    full = linear_logps(**inputs, return_entropy=True, workspace_mib=1, **how)
    # the interpreter's products, numpy's, depend on a row's place in its tile of 16
    starts = (0, 16, 48) if how.get("candidate") == "fused" else (0, 3, 63)
    for start, length in zip(starts, (1, 17, 30), strict=True):
        rows = slice(start, start + length)
        part = linear_logps(
            inputs["hidden_ND"][rows],
            inputs["weight_VD"],
            inputs["targets_N"][rows],
            return_entropy=True,
            workspace_mib=1,
            **how,
        )
        assert torch.equal(part[0], full[0][rows])
        assert torch.equal(part[1], full[1][rows])


@pytest.mark.parametrize("how", [TORCH, *FP32_KERNELS], ids=ids)
def test_extremes_are_finite_and_masked_rows_cost_nothing(how):
    inputs = make_head(64, 400, 32)
    with torch.no_grad():
        # logits of +-1e4, and in one row each a target 200 nat below the best
        inputs["hidden_ND"][:8] *= 1e4 / (inputs["hidden_ND"][:8] @ inputs["weight_VD"].t()).abs().amax(1)[:, None]
        logits = inputs["hidden_ND"] @ inputs["weight_VD"].t()
        inputs["targets_N"][:16] = logits[:16].argmin(1)
    tokens = make_tokens(inputs)
    tokens["weights"][:16] = 0.0
    tokens["old_logps"][:16] = tokens["old_logps"][:16].clamp(min=-200)
    result, grads = run(inputs, tokens, how)
    assert result.loss.isfinite()
    assert result.logps.min() < -200
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["hidden_ND"][:16] == 0).all()


def test_autocast_rounds_the_operands_and_returns_fp32_gradients():
    inputs = make_head(300, 1000, 64)
    rounded = {k: v if v.dtype == torch.int64 else v.detach().bfloat16().requires_grad_() for k, v in inputs.items()}
    tokens = make_tokens(rounded)
    with torch.autocast("cpu", torch.bfloat16):
        ours, grads = loss_and_grads(linear_policy_loss, inputs, tokens)
    wide_tokens = {k: v if v.dtype == torch.int64 else v.double() for k, v in tokens.items()}
    exact, exact_grads = loss_and_grads(reference.linear_policy_loss, to_float64(rounded), wide_tokens)
    torch.testing.assert_close(ours.logps.double(), exact.logps, rtol=0, atol=HALF_LOGPS)
    for name, expected in exact_grads.items():
        assert grads[name].dtype == torch.float32
        assert relative_rms(grads[name], expected) <= HALF_GRADS


def test_bf16_gradients_are_closer_than_those_of_materialised_logits():
    inputs = make_head(400, 2000, 100, dtype=torch.bfloat16)
    tokens = make_tokens(inputs)
    advantages = tokens.pop("advantages_N")
    logits = torch.nn.functional.linear(inputs["hidden_ND"], inputs["weight_VD"])
    eager = torch.log_softmax(logits.float(), -1).gather(1, inputs["targets_N"][:, None])[:, 0]
    names = ["hidden_ND", "weight_VD"]
    eager_loss = policy_loss(eager, advantages, **tokens).loss.sum()
    eager_grads = torch.autograd.grad(eager_loss, [inputs[k] for k in names])
    tokens["advantages_N"] = advantages
    _, grads = loss_and_grads(linear_policy_loss, inputs, tokens)
    wide_tokens = {k: v if v.dtype == torch.int64 else v.double() for k, v in tokens.items()}
    _, exact = loss_and_grads(reference.linear_policy_loss, to_float64(inputs), wide_tokens)
    for name, eager_grad in zip(names, eager_grads, strict=True):
        assert relative_rms(grads[name], exact[name]) < 0.5 * relative_rms(eager_grad, exact[name]), name


def test_the_reference_is_reachable_by_name():
    inputs = make_head(20, 100, 16)
    tokens = make_tokens(inputs)
    named, grads = loss_and_grads(linear_policy_loss, inputs, tokens, impl="reference", top_entropy_quantile=0.5)
    direct, direct_grads = loss_and_grads(reference.linear_policy_loss, inputs, tokens, top_entropy_quantile=0.5)
    assert torch.equal(named.loss, direct.loss)
    assert all(torch.equal(grads[name], direct_grads[name]) for name in grads)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_reference_gradients_are_the_derivatives(level):
    inputs = make_head(12, 9, 6, dtype=torch.float64, bias=True)
    targets = inputs.pop("targets_N")
    tokens = {
        k: v if v.dtype == torch.int64 else v.double()
        for k, v in make_tokens({**inputs, "targets_N": targets}, beta=0.1, with_bonus=True).items()
    }
    tokens["sequence_ids"] = torch.arange(12) // 5
    options = {"beta": 0.1, "softcap": 4.0, "importance_sampling_level": level}
    assert torch.autograd.gradcheck(
        lambda h, w, b: reference.linear_policy_loss(h, w, targets, bias=b, **tokens, **options).loss,
        tuple(inputs.values()),
    )


def bad_calls():
    return [
        ({"advantages_N": torch.zeros(19)}, r"advantages_N must be \[20\] torch.float32 .*got \[19\]"),
        ({"advantages_N": torch.zeros(20).double()}, r"advantages_N must be .*torch.float32"),
        ({"weights": torch.zeros(20, 1)}, r"weights must be"),
        ({"sequence_ids": torch.arange(20).flip(0)}, r"sequence_ids must be non-decreasing"),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must be in \(0, 1\], got 0.0"),
        ({"top_entropy_quantile": 0.5, "entropy_threshold": torch.zeros(())}, r"exclude each other"),
        ({"weight_grad": torch.zeros(3, 16)}, r"weight_grad must be \[100, 16\]"),
        ({"weight_grad": torch.zeros(100, 16, requires_grad=True)}, r"weight_grad must not require"),
        ({"temperature": torch.zeros(20)}, r"temperature must be finite and above 0"),
        ({"temperature": torch.ones(3)}, r"temperature must be a number or \[20\]"),
        ({"temperature": 0.0}, r"temperature must be finite and above 0, got 0.0"),
        ({"loss_type": "ppo"}, r"loss_type must be one of"),
        ({"beta": 0.1}, r"ref_logps is needed exactly when beta is not 0"),
        ({"impl": "cuda"}, r"impl must be one of auto, triton, torch, reference, got 'cuda'"),
        ({"impl": "triton", "candidate": "best"}, r"candidate must be"),
        ({"candidate": "fused"}, r"candidate is read by impl='triton' only, .*came with 'torch'"),
        ({"impl": "reference", "weight_grad": torch.zeros(100, 16)}, r"weight_grad is not read by impl='reference'"),
        ({"impl": "reference", "temperature": 0.0}, r"temperature must be finite and above 0, got 0.0"),
        ({"workspace_mib": 0}, r"workspace_mib must be finite and above 0"),
        ({"hidden_ND": torch.zeros(20, 16).to(torch.float8_e4m3fn)}, r"hidden_ND must be float64, float32, bfloat16"),
    ]


@pytest.mark.parametrize(("wrong", "message"), bad_calls(), ids=[message[:40] for _, message in bad_calls()])
def test_mistakes_are_named(monkeypatch, wrong, message):
    # a candidate is looked up before anything is launched
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = make_head(20, 100, 16)
    tokens = make_tokens(inputs)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**{**inputs, **tokens, **wrong})
