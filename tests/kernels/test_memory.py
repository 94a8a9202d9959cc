"""What the two head ops allocate and multiply: never the logits, never beyond their workspace, no hidden product."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import linear_logps, linear_policy_loss
from tests.allocations import Allocations

MIB = 2**20
# logits of 48 MiB in fp32, of 24 MiB in bf16; a weight and its gradient of 1.5 MiB in fp32
N, D, V = 2048, 64, 6144
# bytes of [N] vectors: anchors, offsets, sums, slopes, the loss's terms, what of them is joined, the sorted targets
VECTORS = 30 * 8


def make_head(rows=N, width=D, vocab=V, *, is_frozen=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_(not is_frozen)
    return hidden, weight, torch.randint(vocab, (rows,), generator=g)


def make_tokens(rows, *, with_bonus=False, sequence=None):
    g = torch.Generator().manual_seed(1)
    tokens = {"weights": torch.rand(rows, generator=g) / rows}
    if with_bonus:
        tokens["entropy_weights"] = torch.rand(rows, generator=g) / rows
    if sequence is not None:
        tokens["sequence_ids"] = torch.arange(rows) // sequence
        tokens["importance_sampling_level"] = "sequence"
    return torch.randn(rows, generator=g), tokens


def autocast(is_on):
    return torch.autocast("cpu", torch.bfloat16, enabled=is_on)


def run_logps(hidden, weight, targets, *, is_autocast=False, through=("logps",), **options):
    """`linear_logps` and its backward."""
    with autocast(is_autocast):
        outputs = linear_logps(hidden, weight, targets, return_entropy=True, **options)
    wanted = [out.sum() for name, out in zip(("logps", "entropy"), outputs, strict=True) if name in through]
    if wanted:
        sum(wanted).backward()


def run_loss(hidden, weight, targets, *, is_autocast=False, with_bonus=False, sequence=None, **options):
    """`linear_policy_loss` and, if it has one, its backward."""
    advantages, tokens = make_tokens(len(targets), with_bonus=with_bonus, sequence=sequence)
    with autocast(is_autocast):
        loss = linear_policy_loss(hidden, weight, targets, advantages, **tokens, **options).loss
    if loss.requires_grad:
        loss.backward()


def watch(run, head, **options):
    with Allocations() as allocations:
        run(*head, **options)
    return allocations


def count(run, head, **options):
    """Floating-point operations of all matrix products, oneDNN's included, in NDV."""

    def of_linear(rows, weight, *_, **__):
        return 2 * rows[0] * rows[1] * weight[0]

    def of_addmm(_, a, b, **__):
        return 2 * a[0] * a[1] * b[1]

    # what the counter does not know
    mapping = {torch.ops.mkldnn._linear_pointwise: of_linear, torch.ops.aten.addmm_: of_addmm}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run(*head, **options)
    hidden, weight, _ = head
    return counter.get_total_flops() / (hidden.numel() * weight.shape[0])


def test_the_watch_sees_materialised_logits():
    hidden, weight, targets = make_head()
    with Allocations() as allocations:
        logps = torch.log_softmax(F.linear(hidden, weight), -1).gather(1, targets[:, None])
        forward = allocations.largest
        logps.sum().backward()
    assert forward.numel == N * V
    assert forward.bytes == 4 * N * V
    assert "log_softmax" in forward.op or "mm" in forward.op
    # the logits' gradient beside the log-probs
    assert allocations.peak_bytes >= 2 * 4 * N * V
    # the two leaves' gradients outlive everything else
    del logps
    assert allocations.live_bytes() == 4 * (N * D + V * D)


def test_the_watch_does_not_count_views_and_writes_in_place():
    base = torch.zeros(1000)
    with Allocations() as allocations:
        base[10:].view(9, 110).t().add_(1)
    assert allocations.largest.numel == 0
    assert allocations.peak_bytes == 0


def test_the_count_sees_every_kind_of_product():
    # fp32 goes through oneDNN's linear layer, bf16 and float64 through torch.mm
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        head = make_head(64, 32, 200, dtype=dtype)
        assert count(lambda hidden, weight, _: F.linear(hidden, weight), head) == 2
        assert count(run_logps, head) == 6


def test_keeping_holds_the_exponentials_in_bf16_and_nothing_else_of_that_size():
    allocations = watch(run_logps, make_head(), is_autocast=True, workspace_mib=64)
    assert allocations.largest.numel == N * V
    assert allocations.largest.bytes == 2 * N * V
    # only one tensor of rows x vocabulary: a second one would be alive beside it
    assert allocations.peak_bytes < 2 * 2 * N * V


@pytest.mark.parametrize("run", [run_logps, run_loss])
def test_scoring_keeps_nothing(run):
    with torch.no_grad():
        allocations = watch(run, make_head(), **({"through": ()} if run is run_logps else {}))
    assert allocations.largest_numel.numel < N * V // 10
    assert allocations.live_bytes() == 0


@pytest.mark.parametrize("run", [run_logps, run_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_allocates_nothing_of_a_blocks_rows_by_the_vocabulary(run, dtype):
    rows, vocab = 256, 20_000
    allocations = watch(run, make_head(rows, 64, vocab, is_frozen=True, dtype=dtype))
    # a tile of these rows: 256 x 1024
    assert allocations.largest_numel.numel <= rows * 1024


def test_a_backward_frees_what_the_forward_kept():
    hidden, weight, targets = make_head()
    with Allocations() as allocations:
        logps = linear_logps(hidden, weight, targets)
        assert allocations.live_bytes() >= 4 * N * V
        logps.sum().backward()
        assert allocations.live_bytes() < 4 * (N * D + V * D) + 16 * N


def test_a_loss_frees_its_workspace_before_its_backward():
    hidden, weight, targets = make_head()
    advantages, tokens = make_tokens(N)
    with Allocations() as allocations:
        result = linear_policy_loss(hidden, weight, targets, advantages, **tokens)
        assert allocations.peak_bytes > 4 * 1024 * V
        # its gradients wait for the backward
        assert allocations.live_bytes() <= 4 * (N * D + V * D) + VECTORS * N
        result.loss.backward()


# fourfold each time
ROWS = (300, 1200, 4800)

# trained fp32 master weights under bf16 autocast, with and without a buffer for their gradient; fp32; bf16; frozen
SETTINGS = {
    "autocast": {"is_autocast": True},
    "autocast, buffer": {"is_autocast": True, "buffer": torch.float32},
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, fp32 buffer": {"dtype": torch.bfloat16, "buffer": torch.float32},
    "bf16, bf16 buffer": {"dtype": torch.bfloat16, "buffer": torch.bfloat16},
    "autocast, frozen": {"is_autocast": True, "is_frozen": True},
    "fp32, frozen": {"is_frozen": True},
    "bf16, frozen": {"dtype": torch.bfloat16, "is_frozen": True},
}


def extra_bytes(run, shape, *, workspace_mib, dtype=torch.float32, is_frozen=False, buffer=None, **options):
    """The most bytes alive beyond inputs and outputs, [N] vectors left out; checked against the workspace."""
    head = hidden, weight, _ = make_head(*shape, dtype=dtype, is_frozen=is_frozen)
    if buffer is not None:
        options["weight_grad"] = torch.zeros(weight.shape, dtype=buffer)
    allocations = watch(run, head, workspace_mib=workspace_mib, **options)
    outputs = hidden.nbytes + (weight.nbytes if buffer is None and not is_frozen else 0)
    if run is run_logps and is_frozen:
        # d log-prob / d hidden, documented
        outputs += hidden.nbytes
    extra = allocations.peak_bytes - outputs - VECTORS * shape[0]
    assert extra <= workspace_mib * MIB, f"{extra / MIB:.1f} MiB, the largest for {allocations.largest}"
    return extra


def bounded(run):
    return [
        pytest.param(setting, id=name)
        for name, setting in SETTINGS.items()
        if run is run_loss or "buffer" not in setting
    ]


@pytest.mark.parametrize("setting", bounded(run_loss))
def test_the_loss_stays_within_64_mib_at_any_number_of_rows(setting, plans):
    _, more, most = (extra_bytes(run_loss, (rows, 96, 34_567), workspace_mib=64, **setting) for rows in ROWS)
    if not setting.get("is_frozen"):
        # the bound binds: several blocks, which fill most of it
        assert plans[1].block < ROWS[1]
        assert more > 32 * MIB
        assert most <= more + VECTORS * ROWS[2]


@pytest.mark.parametrize("setting", bounded(run_logps))
def test_log_probs_stay_within_64_mib_at_any_number_of_rows(setting, plans):
    # 4800 rows of 2304 hidden elements do not fit one block, 300 rows keep their exponentials
    sizes = [extra_bytes(run_logps, (rows, 2304, 1501), workspace_mib=64, **setting) for rows in ROWS]
    assert plans[2].block < ROWS[2]
    if not setting.get("is_frozen"):
        assert plans[0].keep
        assert max(sizes) > 32 * MIB


@pytest.mark.parametrize("run", [run_logps, run_loss])
@pytest.mark.parametrize("name", ["autocast, frozen", "fp32, frozen", "bf16, frozen", "bf16", "autocast"])
def test_hidden_states_beyond_the_workspace_cost_nothing_more(run, name):
    # [N, D] is 64 MiB in bf16: no second copy of it, and none in fp32
    extra_bytes(run, (16_384, 2048, 65), workspace_mib=32, **SETTINGS[name])


@pytest.mark.parametrize(
    "setting", [{}, {"is_autocast": True}, {"is_autocast": True, "is_frozen": True}], ids=["fp32", "autocast", "frozen"]
)
@pytest.mark.parametrize(
    "options", [{"with_bonus": True}, {"sequence": 1500}, {"top_entropy_quantile": 0.5}, {"softcap": 20.0}], ids=str
)
def test_every_kind_of_loss_stays_within_64_mib(setting, options):
    extra_bytes(run_loss, (3000, 96, 20_001), workspace_mib=64, **setting, **options)


@pytest.mark.parametrize("run", [run_logps, run_loss])
def test_640_mib_suffice_where_they_bind(run, plans):
    options = {"with_bonus": True} if run is run_loss else {}
    extra = extra_bytes(run, (1700, 16, 140_001), workspace_mib=640, is_autocast=True, **options)
    assert plans[-1].keep
    assert extra > 400 * MIB


@pytest.mark.parametrize("workspace_mib", [4, 16])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("run", [run_logps, run_loss])
def test_small_workspaces_suffice(run, workspace_mib, is_frozen):
    extra_bytes(run, (N, D, V), workspace_mib=workspace_mib, is_frozen=is_frozen, is_autocast=True)


@pytest.mark.slow
def test_a_real_head_trains_within_0_8_gib(plans):
    rows, width, vocab = 8192, 4096, 151_936
    hidden = torch.randn(rows, width).requires_grad_()
    weight = torch.randn(vocab, width).mul_(width**-0.5).requires_grad_()
    weight.grad = torch.zeros(vocab, width)
    head = hidden, weight, torch.randint(vocab, (rows,))
    allocations = watch(run_loss, head, is_autocast=True, weight_grad=weight.grad)
    # everything counts: the hidden gradient of 128 MiB and the [N] vectors too
    # 0.48 GiB measured
    assert plans[0].block < rows
    assert allocations.peak_bytes <= 0.8 * 2**30
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("is_frozen", "workspace_mib", "through", "ndv"),
    [
        (False, 640, ("logps",), 6),
        (False, 4, ("logps",), 8),
        (True, 640, ("logps",), 4),
        (True, 4, ("logps",), 4),
        (False, 640, ("entropy",), 8),
        (False, 4, ("logps", "entropy"), 8),
        # the log-probs' hidden gradient comes with the forward, before it is known that the entropy has one
        (True, 640, ("entropy",), 8),
        (False, 640, (), 2),
        (False, 4, (), 2),
    ],
)
@pytest.mark.parametrize("is_autocast", [False, True], ids=["fp32", "autocast"])
def test_products_of_log_probs(is_frozen, workspace_mib, through, ndv, is_autocast):
    head = make_head(is_frozen=is_frozen)
    options = {"workspace_mib": workspace_mib, "through": through, "is_autocast": is_autocast}
    if through:
        assert count(run_logps, head, **options) == ndv
    else:
        with torch.no_grad():
            assert count(run_logps, head, **options) == ndv


@pytest.mark.parametrize(
    ("is_frozen", "options", "ndv"),
    [
        (False, {}, 6),
        (True, {}, 4),
        (False, {"with_bonus": True}, 6),
        (True, {"with_bonus": True}, 4),
        # 64 rows fit every block here
        (False, {"sequence": 64}, 6),
        (True, {"sequence": 64}, 4),
        # and all rows none: logits once more
        (False, {"sequence": N}, 8),
        (True, {"sequence": N}, 4),
        (False, {"softcap": 20.0}, 6),
        # exponentials times the cap's slope have no exponents to take back
        (False, {"softcap": 20.0, "with_bonus": True}, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize(("workspace_mib", "is_autocast"), [(640, False), (64, True), (4, True)])
def test_products_of_a_loss(is_frozen, options, ndv, workspace_mib, is_autocast, plans):
    head = make_head(is_frozen=is_frozen)
    assert count(run_loss, head, is_autocast=is_autocast, workspace_mib=workspace_mib, **options) == ndv
    if options == {"with_bonus": True} or not is_frozen:
        assert plans[0].block < N or not plans[0].keep
    if workspace_mib == 4 and plans[0].keep:
        assert plans[0].block <= N // 8


def test_products_of_a_loss_over_entropies_of_all_rows():
    head = make_head()
    assert count(run_loss, head, top_entropy_quantile=0.5) == 8
    # in one block they are all there before the first gradient
    assert count(run_loss, make_head(512), top_entropy_quantile=0.5) == 6


def test_sequences_that_do_not_fit_a_block_are_paid_for_alone(plans):
    # 700 rows in sequences of 300, 100, 300, at blocks of about 100 rows
    head = make_head(700, D, 20_000)
    advantages, tokens = make_tokens(700)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([300, 100, 300]))

    def run(hidden, weight, targets):
        options = {**tokens, "sequence_ids": ids, "importance_sampling_level": "sequence", "workspace_mib": 20}
        linear_policy_loss(hidden, weight, targets, advantages, **options).loss.backward()

    counted = count(run, head)
    assert 100 <= plans[0].block < 300
    assert counted == pytest.approx((8 * 600 + 6 * 100) / 700, rel=1e-12)


@pytest.mark.parametrize("buffer", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "sums_weight"), [(16, True), (256, False)])
def test_products_of_a_bf16_weight_over_several_blocks(width, sums_weight, buffer, plans):
    # 4VD is 2.4 or 39 MiB of 64
    head = make_head(1100, width, 40_000, dtype=torch.bfloat16)
    given = {} if buffer is None else {"weight_grad": torch.zeros(40_000, width, dtype=buffer)}
    # an fp32 buffer is its own sum
    ndv = 6 if sums_weight or buffer == torch.float32 else 8
    assert count(run_loss, head, workspace_mib=64, **given) == ndv
    assert plans[0].block < 1100


@pytest.mark.parametrize(("vocab", "ndv"), [(65, 8), (4096, 10)])
def test_products_of_log_probs_of_a_bf16_weight_over_several_blocks(vocab, ndv, plans):
    # 4VD is 0.1 or 4 MiB of 4: it fits, or the weight's gradient takes a sweep, and logits, of its own
    head = make_head(1600, 256, vocab, dtype=torch.bfloat16)
    assert count(run_logps, head, workspace_mib=4) == ndv
    assert plans[0].block < 1600


@pytest.mark.parametrize("workspace_mib", [640, 4])
@pytest.mark.parametrize("run", [run_logps, run_loss])
def test_products_without_a_gradient(run, workspace_mib):
    options = {"through": ()} if run is run_logps else {"with_bonus": True}
    with torch.no_grad():
        assert count(run, make_head(), workspace_mib=workspace_mib, **options) == 2
