"""Sizes, layouts and values at their limits, for both head ops and all that make their tiles, against float64.

Triton's kernels are run by its interpreter, at small sizes.
"""

import pytest
import torch

from grpo_kernels import linear_logps, linear_policy_loss, reference
from tests.heads import KERNEL_DEVICE, make_head, placed, relative_rms, to_float64

# fp32 sums of up to 262,144 terms, and products of up to 8,192, against float64
FP32 = 1e-5
# an fp32 logit l is spaced by 6e-8 l: a few of those steps are 1e-5 up to about 30, the most that `make_head` gives
EXACT_LOGITS = 30.0
# fp32-accumulated logits; exponentials, scaled rows and the result are rounded to 16 bits once each, by 1.6e-3 RMS in
# the mean over many rows, and by 2**-9 at the most in the few of most shapes here
HALF_LOGPS, HALF_GRADS = 2e-4, 3 * 2**-9

TORCH = {"impl": "torch"}
KERNELS = [{"impl": "triton", "candidate": "tile"}, {"impl": "triton", "candidate": "fused"}]
ALL = [TORCH, *KERNELS]


def ids(how):
    return how.get("candidate", how["impl"])


def make_tokens(N, *, seed=1):
    """Advantages of both signs, and weights; the ratios are 1."""
    g = torch.Generator().manual_seed(seed)
    return {"advantages_N": torch.randn(N, generator=g), "weights": (0.5 + torch.rand(N, generator=g)) / max(N, 1)}


def widened(tokens):
    return {k: v.double() if v.is_floating_point() else v for k, v in tokens.items()}


def at_home(how, **tensors):
    """The tensors where `how` runs, leaves again: the kernels' device for the kernels."""
    if how.get("impl") != "triton" or KERNEL_DEVICE.type == "cpu":
        return tensors.values()
    if how.get("candidate") == "fused" and tensors["inputs"]["hidden_ND"].dtype == torch.float32:
        pytest.skip("on a GPU the fused kernel multiplies half precision only")
    return [placed(group) for group in tensors.values()]


def grads_of(loss, inputs):
    wanted = [k for k, v in inputs.items() if v.requires_grad]
    grads = torch.autograd.grad(loss, [inputs[k] for k in wanted])
    return {name: grad.cpu() for name, grad in zip(wanted, grads, strict=True)}


def run_logps(inputs, *, wide=False, **options):
    """Log-probs, entropies, and the gradients of a sum of both."""
    op = reference.linear_logps if wide else linear_logps
    (inputs,) = at_home(options, inputs=inputs)
    logps, entropies = op(**inputs, return_entropy=True, **options)
    g = torch.Generator().manual_seed(2)
    slopes = torch.randn(2, logps.numel(), generator=g).to(logps)
    grads = grads_of((slopes[0] * logps + slopes[1] * entropies).sum(), inputs)
    return logps.detach().cpu(), entropies.detach().cpu(), grads


def run_loss(inputs, *, wide=False, tokens=None, **options):
    """Log-probs, entropies, and the gradients of the loss."""
    tokens = tokens or make_tokens(inputs["targets_N"].numel())
    inputs, tokens = at_home(options, inputs=inputs, tokens=tokens)
    op = reference.linear_policy_loss if wide else linear_policy_loss
    result = op(**inputs, **(widened(tokens) if wide else tokens), **options)
    assert result.loss.isfinite()
    return result.logps.cpu(), result.entropy.cpu(), grads_of(result.loss, inputs)


OPS = [run_logps, run_loss]


def largest_logit(inputs):
    if inputs["targets_N"].numel() == 0:
        return 0.0
    return float((inputs["hidden_ND"].detach() @ inputs["weight_VD"].detach().t()).abs().max())


def assert_matches_float64(run, inputs, how, **options):
    logps, entropies, grads = run(inputs, **how, **options)
    options.pop("workspace_mib", None)
    exact_logps, exact_entropies, exact_grads = run(to_float64(inputs), wide=True, **options)
    is_half = inputs["hidden_ND"].dtype.itemsize == 2
    scale = max(1.0, largest_logit(inputs) / EXACT_LOGITS)
    at_logps, at_grads = (HALF_LOGPS, HALF_GRADS) if is_half else (FP32, FP32)
    assert (logps <= 0).all()
    torch.testing.assert_close(logps.double(), exact_logps, rtol=0, atol=at_logps * scale)
    torch.testing.assert_close(entropies.double(), exact_entropies, rtol=0, atol=at_logps * scale)
    for name, expected in exact_grads.items():
        assert grads[name].shape == inputs[name].shape
        assert grads[name].dtype == inputs[name].dtype
        assert relative_rms(grads[name], expected) <= at_grads * scale, name


# many columns, wide rows, one of either; 50260 is no multiple of 8
SHAPES = [
    (3, 7, 64),
    (2, 7, 1),
    (1, 1, 5),
    (33, 1000, 576),
    (5, 1000, 8192),
    (17, 1000, 4096),
    (17, 49152, 64),
    (3, 50260, 100),
    (2, 128256, 100),
    (2, 151936, 64),
    (1, 262144, 64),
    (40, 1000, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("run", OPS)
def test_shapes(run, shape, dtype):
    assert_matches_float64(run, make_head(*shape, dtype=dtype, bias=shape[2] == 100), TORCH, temperature=1.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "shape", [(3, 7, 64), (2, 7, 1), (1, 1, 5), (17, 65, 100), (2, 70, 4096), (3, 33, 8192)], ids=str
)
@pytest.mark.parametrize("how", KERNELS, ids=ids)
@pytest.mark.parametrize("run", OPS)
def test_shapes_of_the_kernels(run, how, shape, dtype):
    assert_matches_float64(run, make_head(*shape, dtype=dtype, bias=shape[2] == 100), how, temperature=1.3)


@pytest.mark.parametrize("how", [KERNELS[0], pytest.param(KERNELS[1], marks=pytest.mark.slow)], ids=ids)
def test_the_kernels_at_a_real_vocabulary(how):
    assert_matches_float64(run_loss, make_head(2, 49152, 64), how)


@pytest.mark.parametrize("how", ALL, ids=ids)
@pytest.mark.parametrize("run", OPS)
def test_no_rows(run, how):
    inputs = make_head(0, 5003, 24, bias=True)
    logps, entropies, grads = run(inputs, **how)
    assert logps.shape == entropies.shape == (0,)
    assert grads["hidden_ND"].shape == (0, 24)
    assert (grads["weight_VD"] == 0).all()
    assert (grads["bias"] == 0).all()


@pytest.mark.parametrize("how", ALL, ids=ids)
@pytest.mark.parametrize("run", OPS)
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
def test_rows_around_a_block(run, how, is_frozen, plans):
    """One block, one row more, and two blocks and a few rows, at blocks of the smallest workspace."""

    def inputs(N):
        head = make_head(N, 70, 1500)
        head["weight_VD"].requires_grad_(not is_frozen)
        return head

    run(inputs(400), **TORCH, workspace_mib=1)
    block = plans[-1].block
    assert block == 64
    # the interpreter takes seconds for each
    for N in (block, block + 1, 2 * block + 3) if how is TORCH else (block + 1,):
        temperature = torch.linspace(1.0, 2.0, N)
        assert_matches_float64(run, inputs(N), how, workspace_mib=1, temperature=temperature)
        assert plans[-1].block == block


@pytest.mark.parametrize("how", ALL, ids=ids)
@pytest.mark.parametrize("run", OPS)
@pytest.mark.parametrize("workspace_mib", [640, 1])
def test_targets_at_the_borders_of_tiles(run, how, workspace_mib, plans):
    V = 1100 if how is TORCH else 300
    run(make_head(20, V, 20), **TORCH, workspace_mib=workspace_mib)
    edges = {edge for side in (16, 32, plans[-1].columns) for edge in range(0, V, side)}
    borders = sorted({column for edge in edges for column in (edge - 1, edge) if column >= 0} | {0, V - 1})
    targets = torch.tensor(borders)[torch.randperm(len(borders), generator=torch.Generator().manual_seed(3))[:60]]
    targets = torch.cat([torch.tensor([0, V - 1, min(plans[-1].columns, V) - 1]), targets])
    inputs = {**make_head(len(targets), V, 20), "targets_N": targets}
    assert_matches_float64(run, inputs, how, workspace_mib=workspace_mib)


def strided(tensor):
    """The same values in memory where no two lie side by side."""
    wide = torch.full([2 * size for size in tensor.shape], torch.nan, dtype=torch.float64).to(tensor.dtype)
    out = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return out.copy_(tensor)


def transposed(tensor):
    return tensor.t().clone().t()


def expanded(tensor):
    """The first row again and again, in the memory of one."""
    return tensor[:1].expand_as(tensor)


LAYOUTS = [
    *((name, strided) for name in ("hidden_ND", "weight_VD", "targets_N", "bias", "all")),
    ("all", transposed),
    ("all", expanded),
    ("weight_VD", expanded),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@pytest.mark.parametrize("how", ALL, ids=ids)
@pytest.mark.parametrize("run", OPS)
def test_layouts(run, how, name, layout):
    base = {k: v.detach() for k, v in make_head(20, 70, 24, bias=True).items()}
    chosen = [k for k in base if name in (k, "all") and not (layout is transposed and base[k].ndim == 1)]
    if layout is expanded and name == "all":
        # a bias tells the columns apart
        chosen.remove("bias")
    laid_out = {k: layout(v) if k in chosen else v for k, v in base.items()}
    dense = {k: v.contiguous().clone() for k, v in laid_out.items()}
    ours, expected = (
        run({k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}, **how)
        for inputs in (laid_out, dense)
    )
    # a product's order of sums may depend on the layout
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=FP32)
    torch.testing.assert_close(ours[1], expected[1], rtol=0, atol=FP32)
    for key, grad in expected[2].items():
        assert relative_rms(ours[2][key], grad.double()) <= FP32, key


@pytest.mark.parametrize("layout", [strided, expanded])
@pytest.mark.parametrize("how", ALL, ids=ids)
def test_layouts_of_tokens(how, layout):
    inputs = make_head(40, 70, 24)
    g = torch.Generator().manual_seed(4)
    tokens = make_tokens(40)
    for name in ("old_logps", "ref_logps", "sampling_weights", "entropy_weights", "temperature"):
        tokens[name] = 0.5 + torch.rand(40, generator=g)
    tokens["old_logps"], tokens["ref_logps"] = -tokens["old_logps"], -tokens["ref_logps"]
    laid_out = {k: layout(v) for k, v in tokens.items()}
    for level in ("token", "sequence"):
        options = {"importance_sampling_level": level, "beta": 0.1}
        sequences = torch.arange(40) // 7
        laid_out["sequence_ids"] = layout(sequences)
        dense = {k: v.contiguous().clone() for k, v in laid_out.items()}
        ours, expected = (run_loss(inputs, tokens=given, **how, **options) for given in (laid_out, dense))
        assert torch.equal(ours[0], expected[0])
        for key, grad in expected[2].items():
            assert torch.equal(ours[2][key], grad), key


@pytest.mark.parametrize("how", ALL, ids=ids)
@pytest.mark.parametrize("run", OPS)
def test_logits_of_ten_thousand(run, how):
    inputs = make_head(24, 200, 32)
    with torch.no_grad():
        inputs["hidden_ND"] *= 1e4 / largest_logit(inputs)
    logits = inputs["hidden_ND"].detach() @ inputs["weight_VD"].detach().t()
    assert logits.max() > 5e3
    assert logits.min() < -5e3
    # the best column in every other row; random ones are thousands of nat below it
    inputs["targets_N"][::2] = logits[::2].argmax(1)
    assert_matches_float64(run, inputs, how)


def unlikely_targets(log_probs, V, D=24):
    """A head whose row i puts its target near `log_probs[i]` and one rival, in the last columns, at about 0."""
    N, g = len(log_probs), torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) * 0.3
    rows = torch.arange(N)
    weight[V - N + rows, rows] = 20.0
    weight[rows, rows] = 20.0 + torch.tensor(log_probs)
    return {"hidden_ND": torch.eye(N, D).requires_grad_(), "weight_VD": weight.requires_grad_(), "targets_N": rows}


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("workspace_mib", [640, 1])
@pytest.mark.parametrize("how", ALL, ids=ids)
def test_targets_down_to_200_nat_below_the_best(how, workspace_mib, is_frozen):
    # on both sides of the 30 nat at which a row's offset leaves its target
    inputs = unlikely_targets([-1.0, -29.5, -30.5, -50.0, -90.0, -120.0, -200.0], V=1500 if how is TORCH else 150)
    inputs["weight_VD"].requires_grad_(not is_frozen)
    with torch.no_grad():
        exact = reference.linear_logps(**to_float64(inputs))
    assert exact.min() < -199
    tokens = {**make_tokens(7), "old_logps": exact.float()}
    for run, options in ((run_logps, {}), (run_loss, {"tokens": tokens})):
        assert_matches_float64(run, inputs, how, workspace_mib=workspace_mib, **options)


def anchored(hidden_ND, weight_VD, targets_N):
    """The log-probs as `-log1p` of the odds against the target: in float64 too, `log_softmax` would lose them."""
    logits = hidden_ND @ weight_VD.t()
    exponents = logits - logits.gather(1, targets_N[:, None])
    return -torch.log1p(exponents.exp().scatter(1, targets_N[:, None], 0.0).sum(1))


@pytest.mark.parametrize("how", ALL, ids=ids)
def test_confident_tokens_keep_their_relative_accuracy(how):
    inputs = {k: v.detach() for k, v in make_head(32, 200, 40).items()}
    chosen = inputs["weight_VD"][inputs["targets_N"]]
    # margins of 8 to 40 nat: log-probs down to -1e-16, which `logit - logsumexp` rounds to 0
    margin = torch.linspace(8, 40, 32)[:, None]
    inputs["hidden_ND"] = 0.1 * inputs["hidden_ND"] + margin * chosen / chosen.square().sum(1, keepdim=True)
    inputs["hidden_ND"].requires_grad_()
    wide = to_float64(inputs)
    tokens = make_tokens(32)
    exact = anchored(**wide)
    assert exact.max() > -1e-10
    logps, _, grads = run_loss(inputs, tokens=tokens, **how)
    # the logits' own error, 40 * 2**-24 a few times over
    torch.testing.assert_close(logps.double(), exact.detach(), rtol=2e-5, atol=0)
    # on the old policy's own log-probs the slope is -advantage * weight
    slopes = -(tokens["advantages_N"] * tokens["weights"]).double()
    (expected,) = torch.autograd.grad((slopes * exact).sum(), wide["hidden_ND"])
    error = (grads["hidden_ND"] - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 2e-5


@pytest.mark.parametrize(("workspace_mib", "bad"), [(640, torch.inf), (1, torch.nan)])
@pytest.mark.parametrize("how", ALL, ids=ids)
def test_a_bad_hidden_row_spoils_its_row_and_the_weights_gradient(how, workspace_mib, bad):
    inputs = make_head(70, 150, 24, bias=True)
    with torch.no_grad():
        inputs["hidden_ND"][3, 5] = bad
    logps, entropies = linear_logps(**inputs, return_entropy=True, workspace_mib=workspace_mib, **how)
    result = linear_policy_loss(**inputs, **make_tokens(70), workspace_mib=workspace_mib, **how)
    only = torch.arange(70) == 3
    for values in (logps, entropies, result.logps, result.entropy, result.terms.loss):
        assert torch.equal(values.isnan(), only)
    for loss in (logps.sum(), result.loss):
        assert loss.isnan()
        grads = grads_of(loss, inputs)
        assert torch.equal(grads["hidden_ND"].isnan().any(1), only)
        assert not grads["weight_VD"].isfinite().all()


@pytest.mark.parametrize("how", ALL, ids=ids)
@pytest.mark.parametrize("run", OPS)
def test_nan_in_the_weight_reaches_every_row_and_nothing_hangs(run, how):
    inputs = make_head(20, 70, 24)
    with torch.no_grad():
        inputs["weight_VD"][40, 3] = torch.nan
        logps = linear_logps(**inputs, **how)
    assert logps.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("is_frozen", [None, True], ids=["scored", "frozen"])
@pytest.mark.parametrize("run", OPS)
def test_more_logits_than_32_bits_count(run, is_frozen):
    N, V, D = 20_000, 151_936, 4
    assert N * V > 2**31
    inputs = make_head(N, V, D)
    inputs["weight_VD"].requires_grad_(False)
    inputs["hidden_ND"].requires_grad_(bool(is_frozen))
    inputs["targets_N"][-3:] = torch.tensor([0, V - 1, 5])
    tokens = {**make_tokens(N), "weights": torch.ones(N)}
    few = slice(N - 50, N)

    def at(rows):
        own = {**inputs, **{k: inputs[k][rows].detach() for k in ("hidden_ND", "targets_N")}}
        own["hidden_ND"].requires_grad_(bool(is_frozen))
        if run is run_logps:
            logps, entropies = linear_logps(**own, return_entropy=True)
            loss = logps.sum()
        else:
            result = linear_policy_loss(**own, **{k: v[rows] for k, v in tokens.items()})
            logps, entropies, loss = result.logps, result.entropy, result.loss
        return logps.detach(), entropies.detach(), grads_of(loss, own) if is_frozen else {}

    everything, alone = at(slice(0, N)), at(few)
    assert torch.equal(everything[0][few], alone[0])
    assert torch.equal(everything[1][few], alone[1])
    if is_frozen:
        # a product's order of sums may depend on the rows beside
        error = relative_rms(everything[2]["hidden_ND"][few], alone[2]["hidden_ND"].double())
        assert error <= FP32
