"""`linear_logps` against float64 on hard inputs: values, every gradient, ranges, dtypes, autocast, determinism."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from grpo_kernels import linear_logps, reference
from tests.heads import make_head, relative_rms, to_float64

# none, a lone row, fewer than the CPU's smallest product, a ragged last tile of 1 row
ROWS = [0, 1, 13, 513]
# fewer columns than any tile, fewer than one CPU tile, a ragged last tile
VOCABS = [7, 1000, 4097]
WIDTHS = [64, 576, 100]

# fp32 sums of up to 4097 terms against float64
FP32_LOGPS, FP32_GRADS = 1e-5, 1e-5
# fp32-accumulated logits: only the exponentials' sum and the logits' summation order are left
HALF_LOGPS = 2e-4
# coefficients, scaled rows and the result are rounded to bf16 once each, 1.6e-3 RMS a time
HALF_GRADS = 3e-3

# the bound in MiB that makes the backward recompute, and the default that keeps
RECOMPUTE, KEEP = 1, 640


def upstream(N, *, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, generator=g), torch.randn(N, generator=g)


def outputs_and_grads(op, inputs, *, through=("logps", "entropy"), **options):
    """Both outputs, and the gradient of every input that wants one, for fixed upstream gradients."""
    logps, entropy = op(**inputs, return_entropy=True, **options)
    dlogps, dentropy = upstream(logps.numel())
    loss = 0.0
    if "logps" in through:
        loss = loss + (logps * dlogps.to(logps.dtype)).sum()
    if "entropy" in through:
        loss = loss + (entropy * dentropy.to(logps.dtype)).sum()
    wanted = [k for k, v in inputs.items() if v.requires_grad]
    grads = torch.autograd.grad(loss, [inputs[k] for k in wanted])
    return logps.detach(), entropy.detach(), dict(zip(wanted, grads, strict=True))


def assert_matches_float64(inputs, *, logps, grads, through=("logps", "entropy"), entropy=None, **options):
    ours = outputs_and_grads(linear_logps, inputs, through=through, **options)
    options.pop("workspace_mib", None)
    exact = outputs_and_grads(reference.linear_logps, to_float64(inputs), through=through, **options)
    assert ours[0].dtype == torch.promote_types(inputs["hidden_ND"].dtype, torch.float32)
    assert (ours[0] <= 0).all()
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=logps)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=0, atol=entropy or logps)
    for name, expected in exact[2].items():
        assert ours[2][name].dtype == inputs[name].dtype
        assert ours[2][name].shape == inputs[name].shape
        assert relative_rms(ours[2][name], expected) <= grads, name


@pytest.mark.parametrize("workspace_mib", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("N", "V", "D"), itertools.product(ROWS, VOCABS, WIDTHS))
def test_fp32_matches_float64(N, V, D, workspace_mib):
    inputs = make_head(N, V, D, bias=D == 100)
    through = ("logps",) if V == 1000 else ("logps", "entropy")
    assert_matches_float64(inputs, logps=FP32_LOGPS, grads=FP32_GRADS, through=through, workspace_mib=workspace_mib)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_mib", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("through", [("logps",), ("entropy",), ("logps", "entropy")], ids="+".join)
def test_half_operands_match_float64_of_the_same_operands(dtype, workspace_mib, through):
    for N, V, D in [(1, 7, 64), (13, 1000, 100), (513, 4097, 576)]:
        inputs = make_head(N, V, D, dtype=dtype, bias=D == 100)
        assert_matches_float64(inputs, logps=HALF_LOGPS, grads=HALF_GRADS, through=through, workspace_mib=workspace_mib)


def test_float64_operands_are_computed_in_float64():
    inputs = make_head(13, 1000, 100, dtype=torch.float64, bias=True)
    for workspace_mib in (KEEP, RECOMPUTE):
        assert_matches_float64(inputs, logps=1e-12, grads=1e-12, workspace_mib=workspace_mib)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "logit_scale": 0.25},
        {"softcap": 5.0},
        {"softcap": 30.0, "temperature": 0.6, "logit_scale": 1.7},
    ],
    ids=str,
)
def test_temperature_softcap_and_scale(dtype, options):
    inputs = make_head(40, 1000, 100, dtype=dtype, bias=True)
    exact = dtype == torch.float32
    for workspace_mib, through in [(KEEP, ("logps",)), (RECOMPUTE, ("logps", "entropy"))]:
        assert_matches_float64(
            inputs,
            logps=FP32_LOGPS if exact else HALF_LOGPS,
            grads=FP32_GRADS if exact else HALF_GRADS,
            through=through,
            workspace_mib=workspace_mib,
            **options,
        )


def far_targets(log_probs):
    """A head whose row i puts its target near `log_probs[i]` and, late in the vocabulary, one rival at about 0."""
    V, D = 4097, 64
    g = torch.Generator().manual_seed(0)
    N = len(log_probs)
    hidden = torch.eye(N, D)
    weight = torch.randn(V, D, generator=g) * 0.3
    rival = torch.arange(V - N, V)
    targets = torch.arange(N)
    hidden_rows = torch.arange(N)
    weight[rival, hidden_rows] = 20.0
    weight[targets, hidden_rows] = 20.0 + torch.tensor(log_probs)
    return {"hidden_ND": hidden.requires_grad_(), "weight_VD": weight.requires_grad_(), "targets_N": targets}


@pytest.mark.parametrize("workspace_mib", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("through", [("logps",), ("logps", "entropy")], ids="+".join)
def test_unlikely_targets_stay_exact(workspace_mib, through):
    # on both sides of the distance at which a row's offset leaves its target
    inputs = far_targets([-1.0, -29.0, -31.0, -50.0, -70.0, -90.0, -120.0, -200.0])
    # log-probs of magnitude 200 carry 24 bits; an entropy of 1e-3 beside them the same absolute error
    assert_matches_float64(
        inputs, logps=3e-5, entropy=1e-5, grads=FP32_GRADS, through=through, workspace_mib=workspace_mib
    )


def test_unlikely_targets_stay_exact_in_bf16():
    inputs = far_targets([-1.0, -29.0, -31.0, -50.0, -70.0, -90.0, -120.0, -200.0])
    inputs = {k: v if v.dtype == torch.int64 else v.detach().bfloat16().requires_grad_() for k, v in inputs.items()}
    assert_matches_float64(inputs, logps=HALF_LOGPS, grads=HALF_GRADS, through=("logps",))


def test_extreme_logits_are_finite():
    inputs = make_head(40, 1000, 64)
    inputs = {k: v if v.dtype == torch.int64 else v.detach() * 40 for k, v in inputs.items()}
    inputs["hidden_ND"].requires_grad_()
    inputs["weight_VD"].requires_grad_()
    assert (inputs["hidden_ND"] @ inputs["weight_VD"].t()).abs().max() > 1e4
    for workspace_mib in (KEEP, RECOMPUTE):
        logps, entropy, grads = outputs_and_grads(linear_logps, inputs, workspace_mib=workspace_mib)
        exact = outputs_and_grads(reference.linear_logps, to_float64(inputs))
        assert all(t.isfinite().all() for t in (logps, entropy, *grads.values()))
        # fp32 logits of 1e4 are spaced by 1e-3
        torch.testing.assert_close(logps.double(), exact[0], rtol=1e-6, atol=2e-2)


def anchored_logps(hidden_ND, weight_VD, targets_N, return_entropy):
    """The log-probs as `-log1p` of the odds against the target: in float64 too, `log_softmax` would lose them."""
    logits = hidden_ND @ weight_VD.t()
    exponents = logits - logits.gather(1, targets_N[:, None])
    odds = exponents.exp().scatter(1, targets_N[:, None], 0.0).sum(1)
    return -torch.log1p(odds), torch.zeros_like(odds)


def test_confident_log_probs_keep_their_relative_accuracy():
    inputs = make_head(64, 1000, 100)
    hidden = inputs["hidden_ND"].detach() * 0.1
    # margins of 8 to 40 nat: log-probs down to -1e-16, which `logit - logsumexp` rounds to 0
    margin = torch.linspace(8, 40, 64)[:, None]
    chosen = inputs["weight_VD"].detach()[inputs["targets_N"]]
    hidden = hidden + margin * chosen / chosen.square().sum(1, keepdim=True)
    inputs["hidden_ND"] = hidden.requires_grad_()
    logps, _, grads = outputs_and_grads(linear_logps, inputs, through=("logps",))
    exact, _, exact_grads = outputs_and_grads(anchored_logps, to_float64(inputs), through=("logps",))
    assert exact.max() > -1e-10
    # the logits' own error, 40 * 2**-24 a few times over
    torch.testing.assert_close(logps.double(), exact, rtol=2e-5, atol=0)
    row_error = (grads["hidden_ND"] - exact_grads["hidden_ND"]).norm(dim=1) / exact_grads["hidden_ND"].norm(dim=1)
    assert row_error.max() < 2e-5


@pytest.mark.parametrize("wanted", [("hidden_ND",), ("weight_VD",), ("bias",), ("hidden_ND", "bias")], ids="+".join)
@pytest.mark.parametrize("workspace_mib", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
def test_any_subset_of_gradients(wanted, workspace_mib):
    inputs = make_head(40, 1000, 64, bias=True)
    for name in set(inputs) - {"targets_N"} - set(wanted):
        inputs[name].requires_grad_(False)
    assert_matches_float64(inputs, logps=FP32_LOGPS, grads=FP32_GRADS, through=("logps",), workspace_mib=workspace_mib)


def test_tied_weight_views_and_strided_inputs():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(64, 1200, generator=g).requires_grad_()
    states = torch.randn(80, 64, 2, generator=g).requires_grad_()
    targets = torch.randint(1000, (80,), generator=g)[::2]

    def loss(op, table, states):
        hidden, weight = states[::2, :, 1], table.t()[100:1100]
        embedded = weight[targets].sum()
        return op(hidden, weight, targets).sum() + embedded.square()

    ours = torch.autograd.grad(loss(linear_logps, table, states), [table, states])
    exact_inputs = [t.detach().double().requires_grad_() for t in (table, states)]
    exact = torch.autograd.grad(loss(reference.linear_logps, *exact_inputs), exact_inputs)
    for actual, expected in zip(ours, exact, strict=True):
        assert relative_rms(actual, expected) <= FP32_GRADS


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mib", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
def test_autocast_rounds_the_operands_as_a_linear_layer_does(hidden_dtype, workspace_mib):
    inputs = make_head(40, 1000, 100, bias=True)
    inputs["hidden_ND"] = inputs["hidden_ND"].detach().to(hidden_dtype).requires_grad_()
    rounded = {k: v if v.dtype == torch.int64 else v.detach().bfloat16().requires_grad_() for k, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_grads(linear_logps, inputs, workspace_mib=workspace_mib)
        spec = outputs_and_grads(reference.linear_logps, inputs)
        linear = F.linear(*(inputs[k] for k in ("hidden_ND", "weight_VD", "bias")))
    without = outputs_and_grads(linear_logps, rounded, workspace_mib=workspace_mib)
    assert torch.equal(linear, F.linear(*(rounded[k] for k in ("hidden_ND", "weight_VD", "bias"))))
    assert torch.equal(ours[0], without[0])
    assert torch.equal(ours[1], without[1])
    torch.testing.assert_close(spec[0], ours[0], rtol=0, atol=FP32_LOGPS)
    exact = outputs_and_grads(reference.linear_logps, to_float64(rounded))[2]
    for name, expected in exact.items():
        assert ours[2][name].dtype == inputs[name].dtype
        assert relative_rms(ours[2][name], expected) <= HALF_GRADS, name


def test_bf16_gradients_are_closer_than_those_of_materialised_logits():
    inputs = make_head(300, 1000, 100, dtype=torch.bfloat16)
    dlogps = upstream(300)[0]
    logits = F.linear(inputs["hidden_ND"], inputs["weight_VD"])
    eager = torch.log_softmax(logits.float(), -1).gather(1, inputs["targets_N"][:, None])[:, 0]
    names = ["hidden_ND", "weight_VD"]
    eager_grads = torch.autograd.grad((eager * dlogps).sum(), [inputs[k] for k in names])
    ours = outputs_and_grads(linear_logps, inputs, through=("logps",))[2]
    exact = outputs_and_grads(reference.linear_logps, to_float64(inputs), through=("logps",))[2]
    for name, eager_grad in zip(names, eager_grads, strict=True):
        assert relative_rms(ours[name], exact[name]) < 0.5 * relative_rms(eager_grad, exact[name]), name


def test_weight_gradient_of_many_rows_is_summed_in_fp32():
    # 2,000 rows are four row tiles; a bf16 sum of four rounds three times more
    inputs = make_head(2000, 1000, 64)
    with torch.autocast("cpu", torch.bfloat16):
        grads = outputs_and_grads(linear_logps, inputs, through=("logps",))[2]
    assert not torch.equal(grads["weight_VD"], grads["weight_VD"].bfloat16().float())


def test_under_checkpointing_in_a_module():
    inputs = make_head(40, 1000, 64)

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(64, 1000, bias=False)
            self.head.weight.data.copy_(inputs["weight_VD"].detach())

        def forward(self, hidden):
            return linear_logps(hidden, self.head.weight, inputs["targets_N"])

    scorer = Scorer()
    results = []
    for use_reentrant in (None, False, True):
        hidden = inputs["hidden_ND"].detach().requires_grad_()
        scorer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if use_reentrant is None:
                logps = scorer(hidden)
            else:
                logps = checkpoint(scorer, hidden, use_reentrant=use_reentrant)
        logps.sum().backward()
        results.append((logps.detach(), hidden.grad, scorer.head.weight.grad))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mib", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
def test_three_runs_are_bitwise_equal(dtype, workspace_mib):
    inputs = make_head(513, 1000, 100, dtype=dtype)
    runs = [outputs_and_grads(linear_logps, inputs, through=("logps",), workspace_mib=workspace_mib) for _ in range(3)]
    for run in runs[1:]:
        assert torch.equal(run[0], runs[0][0])
        assert torch.equal(run[1], runs[0][1])
        assert all(torch.equal(run[2][name], runs[0][2][name]) for name in run[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", WIDTHS)
def test_a_row_does_not_depend_on_its_company(dtype, D):
    inputs = make_head(600, 1500, D, dtype=dtype)
    hidden, weight, targets = (inputs[k].detach() for k in ("hidden_ND", "weight_VD", "targets_N"))
    full = linear_logps(hidden, weight, targets, return_entropy=True)
    for rows in (slice(0, 1), slice(3, 5), slice(100, 117), slice(511, 513), slice(590, 600), slice(0, 200)):
        part = linear_logps(hidden[rows], weight, targets[rows], return_entropy=True)
        assert torch.equal(part[0], full[0][rows])
        assert torch.equal(part[1], full[1][rows])


def test_scoring_equals_training_bitwise():
    inputs = make_head(300, 1500, 100, dtype=torch.bfloat16)
    training = linear_logps(**inputs)
    with torch.no_grad():
        scoring = linear_logps(**inputs)
    assert training.requires_grad
    assert not scoring.requires_grad
    assert torch.equal(training.detach(), scoring)


def test_backward_twice_through_a_retained_graph():
    inputs = make_head(40, 1000, 64)
    logps = linear_logps(**inputs)
    first = torch.autograd.grad(logps.sum(), inputs["weight_VD"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(logps.sum(), inputs["weight_VD"])[0], first)


def test_double_backward_is_refused():
    inputs = make_head(4, 7, 64)
    for loss in (linear_logps(**inputs).square().sum(), linear_logps(**inputs).sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, inputs["hidden_ND"], create_graph=True)


def test_gradients_are_the_derivatives():
    inputs = make_head(5, 7, 6, dtype=torch.float64, bias=True)
    targets = inputs.pop("targets_N")
    options = {"temperature": 0.8, "logit_scale": 1.2, "return_entropy": True}
    for op, softcap in itertools.product((reference.linear_logps, linear_logps), (None, 4.0)):
        assert torch.autograd.gradcheck(
            lambda h, w, b, op=op, softcap=softcap: op(h, w, targets, bias=b, softcap=softcap, **options),
            tuple(inputs.values()),
        )


def test_nan_propagates_to_its_row_only():
    inputs = {k: v.detach() for k, v in make_head(20, 1000, 64).items()}
    inputs["hidden_ND"][3, 5] = torch.nan
    logps, entropy = linear_logps(**inputs, return_entropy=True)
    assert logps.isnan().nonzero().tolist() == [[3]]
    assert entropy.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("setting", ["ieee", "none"])
def test_the_process_precision_setting_is_left_as_it_was(setting):
    torch.backends.mkldnn.matmul.fp32_precision = setting
    linear_logps(**make_head(20, 100, 64, dtype=torch.bfloat16)).sum().backward()
    after = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert after == setting


def test_the_reference_is_reachable_by_name():
    inputs = make_head(20, 100, 64)
    assert torch.equal(linear_logps(**inputs, impl="reference"), reference.linear_logps(**inputs))
    assert torch.equal(linear_logps(**inputs, impl="auto"), linear_logps(**inputs, impl="torch"))
