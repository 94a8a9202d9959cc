"""The fused product against float64, and against the sums that the torch path makes of the same tiles."""

import dataclasses
import itertools
import math

import pytest
import torch

from grpo_kernels.fused_head import fused_exp_tile_
from grpo_kernels.head import RowSums
from grpo_kernels.launch import FusedTiles, choose

# the interpreter multiplies 0 by infinity where the kernel then selects 0
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# the interpreter multiplies bf16 wrongly, and a GPU has no exact fp32 product
OPERANDS = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.float16]

# exponents of a few tens in fp32, whose exponentials are off by as many times 1e-7
SUMS_RTOL = 1e-5
# the interpreter cuts bf16 off after 8 bits, twice where a row's offset moves within the tile
KEPT_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-6}

CAPABILITY = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None
TILES = choose(CAPABILITY, 64).fused


def all_with(**changes):
    return FusedTiles(*(dataclasses.replace(blocks, **changes) for blocks in (TILES.plain, TILES.capped)))


WALKS = {
    "descriptors": TILES,
    "pointers": all_with(has_descriptors=False),
    "persistent": all_with(is_persistent=True, group=2),
}
R0, C0 = TILES.plain.rows, TILES.plain.columns


@dataclasses.dataclass
class Case:
    """Operands of a whole head of V columns and the temperature of each row, all on the device."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    inv_temperature: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, columns=slice(None)):
        """In float64, of exactly these operands."""
        x = self.hidden.double() @ self.weight[columns].double().t()
        if self.bias is not None:
            x += self.bias[columns].double()
        x *= self.logit_scale
        if self.softcap is not None:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x * self.inv_temperature.double()[:, None]

    def anchors(self):
        return self.logits().gather(1, self.targets[:, None])[:, 0]

    def sums(self, *, entropy, dtype=torch.float32):
        return RowSums.empty(self.anchors().to(dtype), with_entropy=entropy)

    def fold_(self, sums, columns, kept=None, tiles=TILES, rows=slice(None)):
        """What the driver does with one tile, for some of the rows."""
        fused_exp_tile_(
            self.hidden[rows].contiguous(),
            self.weight[columns].contiguous(),
            bias_C=None if self.bias is None else self.bias[columns],
            targets_R=self.targets[rows],
            column_start=columns.start,
            inv_temperature_R=self.inv_temperature[rows],
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            offset_R=sums.offset,
            S_R=sums.S,
            U_R=sums.U,
            kept_RC=kept,
            config=tiles,
        )


def make_case(R, V, D, operand=OPERANDS[0], *, scale=1.0, bias=False, **options):
    """Logits of standard deviation `scale`; every row has its own temperature."""
    g = torch.Generator().manual_seed(R * 10007 + V * 101 + D)
    hidden = torch.randn(R, D, generator=g) * scale / math.sqrt(D)
    case = Case(
        hidden=hidden.to(operand),
        weight=torch.randn(V, D, generator=g).to(operand),
        targets=torch.randint(V, (R,), generator=g),
        inv_temperature=1 / (0.5 + torch.rand(R, generator=g)),
        bias=torch.randn(V, generator=g).to(operand) if bias else None,
        **options,
    )
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if isinstance(value, torch.Tensor):
            setattr(case, field.name, value.to(DEVICE))
    return case


def check_sums(case, sums, columns, *, rtol=SUMS_RTOL):
    """S and U are those of the exact logits of these columns, relative to the offset that came out."""
    logits = case.logits(columns)
    exponents = logits - sums.offset.double()[:, None]
    e = exponents.exp()
    index = torch.arange(columns.start, columns.stop, device=DEVICE)
    e[case.targets[:, None] == index] = 0
    assert (e <= math.exp(30 + 1e-3)).all()
    torch.testing.assert_close(sums.S.double(), e.sum(1), rtol=rtol, atol=1e-30)
    if sums.U is not None:
        # both signs cancel in U, so its error is that of its terms
        slack = rtol * (e * (exponents.abs() + 1)).sum(1) + 1e-30
        assert ((sums.U.double() - (e * exponents).sum(1)).abs() <= slack).all()
    return e


SHAPES = [
    (1, 1, 7),
    (R0, C0, 64),
    (R0 + 1, C0 + 1, 200),
    (2 * R0 + 5, 3 * C0 - 3, 100),
    (5, 2 * C0, 8),
    (3 * R0, 5, 33),
]


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("operand", OPERANDS, ids=str)
@pytest.mark.parametrize(("R", "C", "D"), SHAPES)
def test_one_tile_matches_float64(R, C, D, operand, walk):
    case = make_case(R, C, D, operand, scale=3.0)
    columns = slice(0, C)
    sums = case.sums(entropy=True)
    # the exponentials of rows that start far below move within the tile
    sums.offset[::3] -= 40
    kept = torch.full((R, C), math.nan, device=DEVICE)
    case.fold_(sums, columns, kept, WALKS[walk])
    e = check_sums(case, sums, columns)
    torch.testing.assert_close(kept.double(), e, rtol=KEPT_RTOL[kept.dtype], atol=1e-30)


OPTIONS = {
    "bias": {"bias": True},
    "logit scale": {"logit_scale": 0.3},
    "soft cap": {"softcap": 5.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 20.0},
}


@pytest.mark.parametrize("walk", ["descriptors", "pointers"])
@pytest.mark.parametrize("kept_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_match_float64(options, kept_dtype, walk):
    case = make_case(R0 + 3, 2 * C0 + 8, 72, scale=6.0, **OPTIONS[options])
    columns = slice(0, 2 * C0 + 8)
    sums = case.sums(entropy=True)
    kept = torch.full((R0 + 3, columns.stop), math.nan, device=DEVICE, dtype=kept_dtype)
    case.fold_(sums, columns, kept, WALKS[walk])
    # a soft cap's tanh is good to 1e-6 of the cap
    rtol = SUMS_RTOL if case.softcap is None else 2e-6 * case.softcap * case.inv_temperature.max().item()
    e = check_sums(case, sums, columns, rtol=rtol)
    if case.softcap is not None:
        tanh = case.logits() / (case.softcap * case.inv_temperature.double()[:, None])
        e = e * (1 - tanh**2)
    atol = 0.0 if case.softcap is None else 2e-6 * e.max().item()
    torch.testing.assert_close(kept.double(), e, rtol=KEPT_RTOL[kept_dtype] + rtol, atol=atol)


@pytest.mark.parametrize("walk", WALKS)
def test_tiles_in_sequence_make_the_sums_of_the_torch_path(walk):
    """Logits that grow from tile to tile move the offsets again and again."""
    R, D, edges = R0 + 5, 48, [0, C0 - 2, 2 * C0, 2 * C0 + 1, 4 * C0 + 7]
    V = edges[-1]
    case = make_case(R, V, D, scale=8.0)
    case.weight *= torch.linspace(0.2, 5.0, V, device=DEVICE)[:, None].to(case.weight.dtype)
    sums, exact = case.sums(entropy=True), case.sums(entropy=True, dtype=torch.float64)
    moves = 0
    for start, stop in itertools.pairwise(edges):
        columns = slice(start, stop)
        before = sums.offset.clone()
        kept = torch.full((R, stop - start), math.nan, device=DEVICE)
        case.fold_(sums, columns, kept, WALKS[walk])
        e = torch.empty(R, stop - start, device=DEVICE, dtype=torch.float64)
        exact.add_tile(case.logits(columns), e, columns, case.targets)
        moves += int((sums.offset != before).sum())
        # the two start a rounding apart, and may differ in a row whose logit lies right at the border
        torch.testing.assert_close(sums.offset.double(), exact.offset, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(kept.double(), e, rtol=1e-4, atol=1e-12)
        check_sums(case, sums, slice(0, stop), rtol=1e-4)
    assert moves > R
    assert not (sums.offset == case.anchors().float()).all()
    truth = torch.log_softmax(case.logits(), 1).gather(1, case.targets[:, None])[:, 0]
    assert truth.min() < -100
    torch.testing.assert_close(sums.logps().double(), truth, rtol=1e-6, atol=2e-5)
    probs = torch.softmax(case.logits(), 1)
    torch.testing.assert_close(sums.entropy().double(), torch.special.entr(probs).sum(1), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("calls", [1, 2])
def test_sums_made_before_a_move_still_count(calls):
    """Rivals just below the border weigh as much as the one just above it that moves the offset."""
    case = make_case(2, 2 * C0, 8)
    case.hidden.zero_()[:, 0] = 1.0
    case.weight[:, 0] = 29.0
    case.weight[-1, 0] = 30.5
    case.weight[0, 0] = 0.0
    case.targets.zero_()
    case.inv_temperature.fill_(1.0)
    sums = case.sums(entropy=True)
    for columns in [slice(0, 2 * C0)] if calls == 1 else [slice(0, C0), slice(C0, 2 * C0)]:
        case.fold_(sums, columns)
    assert (sums.offset == 30.5).all()
    check_sums(case, sums, slice(0, 2 * C0))


def test_columns_past_the_end_do_not_count():
    """Padded columns have a logit of 0, far above all others here: they would lift the offset and drown the sum."""
    case = make_case(4, C0 + 3, 16)
    case.bias = torch.full((C0 + 3,), -300.0, device=DEVICE).to(case.hidden.dtype)
    sums = case.sums(entropy=True)
    anchors = sums.offset.clone()
    case.fold_(sums, slice(0, C0 + 3))
    assert torch.equal(sums.offset, anchors)
    check_sums(case, sums, slice(0, C0 + 3), rtol=1e-4)


@pytest.mark.parametrize("target", [-(1 << 40), -1, 77, 1 << 40])
def test_a_target_of_another_tile_leaves_nothing_out(target):
    case = make_case(3, 77, 24)
    sums = case.sums(entropy=False)
    case.targets = torch.full((3,), target, device=DEVICE)
    case.fold_(sums, slice(0, 77))
    check_sums(case, sums, slice(0, 77))


def test_a_target_is_found_in_the_numbering_of_the_vocabulary():
    case = make_case(2 * R0, 4 * C0, 32)
    # the first and the last column of a tile, and both neighbours outside
    start, stop = C0 + 5, 3 * C0
    case.targets = torch.tensor([start - 1, start, stop - 1, stop] * (R0 // 2), device=DEVICE)
    sums = case.sums(entropy=True)
    kept = torch.full((2 * R0, stop - start), math.nan, device=DEVICE)
    case.fold_(sums, slice(start, stop), kept)
    assert ((kept == 0).sum(1) == torch.tensor([0, 1, 1, 0] * (R0 // 2), device=DEVICE)).all()
    check_sums(case, sums, slice(start, stop))


@pytest.mark.parametrize("walk", WALKS)
def test_a_row_does_not_depend_on_its_company(walk):
    """Bitwise, three times; a row that comes with other rows, in another place of its tile, gives the same bits."""
    R, V = 2 * R0 + 3, 2 * C0 + 9
    case = make_case(R, V, 40, scale=20.0)
    if DEVICE.type == "cpu":
        # exact products: the interpreter's matrix product sums in an order that depends on a row's place
        case.hidden, case.weight = ((t * 8).round() / 8 for t in (case.hidden, case.weight))
    columns = slice(0, V)

    def run(rows):
        full = case.sums(entropy=True)
        sums = RowSums(*(t[rows].clone() for t in (full.anchor, full.offset, full.S, full.U)))
        kept = torch.full((sums.S.numel(), V), math.nan, device=DEVICE)
        case.fold_(sums, columns, kept, WALKS[walk], rows)
        return sums.offset, sums.S, sums.U, kept

    all_rows = run(torch.arange(R, device=DEVICE))
    for rows in (torch.arange(R), torch.arange(R).flip(0), torch.tensor([R - 1]), torch.arange(1, R, 3)):
        rows = rows.to(DEVICE)
        for mine, alone in zip(all_rows, run(rows), strict=True):
            assert torch.equal(mine[rows], alone)


def test_what_is_kept_does_not_change_the_sums():
    case = make_case(R0 + 3, 3 * C0 - 5, 56, scale=15.0)
    columns = slice(0, 3 * C0 - 5)
    scored, trained, with_entropy = (case.sums(entropy=entropy) for entropy in (False, False, True))
    case.fold_(scored, columns)
    case.fold_(trained, columns, torch.empty(R0 + 3, columns.stop, device=DEVICE))
    case.fold_(with_entropy, columns)
    for other in (trained, with_entropy):
        assert torch.equal(scored.S, other.S)
        assert torch.equal(scored.offset, other.offset)


@pytest.mark.parametrize("start", [0, 4, 5])
def test_only_the_tile_is_written(start):
    """Into the columns of a wider buffer, aligned for descriptors or not."""
    R, C = R0 + 2, C0 + 9
    case = make_case(R, C, 16)
    case.targets += 1000
    buffer = torch.full((R + 1, C + 16 - C % 4), -7.0, device=DEVICE)
    sums = RowSums.empty(torch.zeros(R, device=DEVICE), with_entropy=False)
    case.fold_(sums, slice(0, C), buffer[:R, start : start + C])
    is_written = buffer != -7.0
    assert is_written[:R, start : start + C].all()
    assert int(is_written.sum()) == R * C


def test_nan_stays_in_its_row():
    case = make_case(R0 + 4, C0 + 4, 16)
    case.hidden[3, 5] = math.nan
    sums = case.sums(entropy=True)
    kept = torch.zeros(R0 + 4, C0 + 4, device=DEVICE)
    case.fold_(sums, slice(0, C0 + 4), kept)
    is_nan = torch.arange(R0 + 4, device=DEVICE) == 3
    for result in (sums.logps(), sums.entropy(), kept.sum(1)):
        assert torch.equal(result.isnan(), is_nan)


def test_no_rows():
    case = make_case(0, 40, 16)
    sums = RowSums.empty(torch.empty(0, device=DEVICE), with_entropy=True)
    case.fold_(sums, slice(0, 40), torch.empty(0, 40, device=DEVICE))
    assert sums.S.shape == (0,)
