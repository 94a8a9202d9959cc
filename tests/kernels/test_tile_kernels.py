"""The Triton passes over tiles give what `RowSums` and `Slopes` give in float64; on a CPU in Triton's interpreter."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from grpo_kernels.head import Head, RowSums, Slopes, put_targets_

pytest.importorskip("triton")
from grpo_kernels.kept_kernels import entropy_coefficients_, rescale_
from grpo_kernels.tile_kernels import coefficient_tile_, exp_tile_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy warns of what the interpreter computes in lanes that are masked
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# a logit is the result of at most five roundings in fp32, each of half an ulp
LOGIT_ERROR = 5 * 2**-24
# the soft cap's tanh comes from an exponential
CAP_ERROR = 1e-6
# exponentials and sums of up to 4000 of them
EXP_ERROR = 3e-6
# the interpreter truncates to bf16, hardware rounds
STORED_ERROR = {torch.bfloat16: 2**-7, torch.float32: 0.0}

OPTIONS = {
    "plain": {},
    "bias": {"has_bias": True},
    "softcap": {"softcap": 20.0},
    "all": {"has_bias": True, "softcap": 5.0, "logit_scale": 0.7},
}


@dataclass
class Case:
    """Products of R rows with a vocabulary cut into tiles of C columns, and the float64 truth about their logits."""

    C: int
    products: Tensor
    targets: Tensor
    bias: Tensor | None
    inv_temperature: Tensor
    logit_scale: float
    softcap: float | None

    def tiles(self):
        V = self.products.shape[1]
        return [slice(start, min(start + self.C, V)) for start in range(0, V, self.C)]

    def arguments(self, columns: slice) -> dict:
        return {
            "bias_C": None if self.bias is None else self.bias[columns].clone(),
            "targets_R": self.targets,
            "column_start": columns.start,
            "inv_temperature_R": self.inv_temperature,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }

    def head(self) -> Head:
        return Head(torch.float64, 1.0 / self.inv_temperature.double(), self.softcap, self.logit_scale)

    def logits(self) -> Tensor:
        return self.head().logits_(self.products.double(), None if self.bias is None else self.bias.double())

    def anchor(self) -> Tensor:
        inside = self.targets.clamp(0, self.products.shape[1] - 1)
        return self.logits().gather(1, inside[:, None])[:, 0].float()

    def logit_error(self) -> Tensor:
        """[R, 1] how far a logit in fp32 can be from the truth."""
        cap = 0.0 if self.softcap is None else CAP_ERROR * self.softcap * self.inv_temperature
        return (self.logits().abs().amax(1) * LOGIT_ERROR + cap)[:, None]


def make_case(R: int, V: int, C: int, *, has_bias=False, softcap=None, logit_scale=1.0, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    products = torch.randn(R, V, generator=generator) * 4
    # targets at both edges of every tile first, then anywhere
    edges = [column for start in range(0, V, C) for column in (start, min(start + C, V) - 1)]
    targets = torch.tensor([edges[row % len(edges)] for row in range(R)])
    inv_temperature = torch.rand(R, generator=generator) + 0.6
    for row in range(R):
        # unlikely, with its rival in the last tile; confident; huge; unlike any other
        if row % 5 == 1:
            products[row, targets[row]] = -200.0
            products[row, (targets[row] + V - 1) % V] = 30.0
        elif row % 5 == 2:
            products[row, targets[row]] = 40.0
        elif row % 5 == 3:
            products[row] *= 2500.0
            products[row, -1] = 1e4
            products[row, 0] = -1e4
        elif row % 5 == 4:
            products[row, : V // 2] -= 60.0
    bias = torch.randn(V, generator=generator).bfloat16() if has_bias else None
    on = [None if tensor is None else tensor.to(DEVICE) for tensor in (products, targets, bias, inv_temperature)]
    return Case(C, on[0], on[1], on[2], on[3], logit_scale, softcap)


def sweep(case: Case, *, with_entropy: bool, kept: Tensor | None = None) -> tuple[RowSums, Tensor]:
    """The sums after all tiles, and the offsets [tiles, R] after each."""
    sums = RowSums.empty(case.anchor(), with_entropy=with_entropy)
    offsets = []
    for columns in case.tiles():
        exp_tile_(
            case.products[:, columns].contiguous(),
            **case.arguments(columns),
            offset_R=sums.offset,
            S_R=sums.S,
            U_R=sums.U,
            kept_RC=None if kept is None else kept[:, columns],
        )
        offsets.append(sums.offset.clone())
    return sums, torch.stack(offsets)


def spec_sweep(case: Case) -> tuple[RowSums, Tensor, Tensor, Tensor]:
    """`RowSums.add_tile` over the tiles in float64: sums, offsets, exponentials, and their products with the slope."""
    sums = RowSums.empty(case.anchor().double(), with_entropy=True)
    all_logits, offsets, all_exps, kept = case.logits(), [], [], []
    for columns in case.tiles():
        logits = all_logits[:, columns].clone()
        slope = 1.0 if case.softcap is None else case.head().cap_slope(logits)
        exps = torch.empty_like(logits)
        sums.add_tile(logits, exps, columns, case.targets)
        all_exps.append(exps)
        kept.append(exps * slope)
        offsets.append(sums.offset.clone())
    return sums, torch.stack(offsets), torch.cat(all_exps, 1), torch.cat(kept, 1)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    error = (actual.double() - expected.double()).abs()
    assert torch.isfinite(actual).all()
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("R", "V", "C"), [(1, 3, 1), (7, 20, 7), (11, 2600, 1000), (5, 2048, 1024), (6, 2050, 1025)])
def test_sums_and_kept_values_match_the_spec_in_float64(R, V, C, options):
    case = make_case(R, V, C, **OPTIONS[options])
    kept = torch.empty(R, V, dtype=torch.float32, device=DEVICE)
    sums, offsets = sweep(case, with_entropy=True, kept=kept)
    truth, true_offsets, true_exps, true_kept = spec_sweep(case)
    error = case.logit_error()
    assert_within(offsets.t(), true_offsets.t(), error + 1e-30)
    # an exponent is the difference of two logits
    relative = EXP_ERROR + 2 * error
    assert_within(sums.S[:, None], truth.S[:, None], truth.S[:, None] * relative + 1e-30)
    # an exponential's error weighs its exponent, at most 30 or else negative and outweighed, and shifts it
    assert_within(sums.U[:, None], truth.U[:, None], (truth.U.abs() + 31 * truth.S)[:, None] * relative + 1e-30)
    slope_error = 0.0 if case.softcap is None else 2 * CAP_ERROR
    assert_within(kept, true_kept, true_kept * relative + true_exps * slope_error + 1e-37)


@pytest.mark.parametrize("options", OPTIONS)
def test_logps_and_entropies_match_a_softmax_in_float64(options):
    case = make_case(10, 2600, 1000, **OPTIONS[options])
    sums, _ = sweep(case, with_entropy=True)
    all_logps = torch.log_softmax(case.logits(), -1)
    logps = all_logps.gather(1, case.targets[:, None])[:, 0]
    assert options != "plain" or logps.min() < -200
    bound = 1e-5 + 4 * case.logit_error()[:, 0]
    assert_within(sums.logps(), logps, bound)
    assert (sums.logps() <= 0).all()
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    # a shift of a logit moves the entropy by at most its share times the surprise
    assert_within(sums.entropy(), entropy, bound * (1 + entropy))


def test_confident_targets_keep_the_relative_accuracy_of_their_logp():
    case = make_case(5, 1025, 500)
    case.products[:] = case.products / 4
    case.products.scatter_(1, case.targets[:, None], 25.0)
    sums, _ = sweep(case, with_entropy=False)
    # a softmax in float64 would be too coarse
    logps = spec_sweep(case)[0].logps()
    assert (logps > -1e-10).sum() >= 2
    assert_within(sums.logps(), logps, logps.abs() * (EXP_ERROR + 2 * case.logit_error()[:, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_kept_values_go_where_they_belong_and_nowhere_else(dtype):
    case = make_case(5, 2050, 1025, softcap=20.0)
    storage = torch.full((7, 2100), float("nan"), dtype=dtype, device=DEVICE)
    kept = storage[1:6, 16 : 16 + 2050]
    plain = torch.empty(5, 2050, dtype=torch.float32, device=DEVICE)
    products = case.products.clone()
    sums, _ = sweep(case, with_entropy=True, kept=kept)
    other, _ = sweep(case, with_entropy=True, kept=plain)
    assert_within(kept, plain, plain.abs() * STORED_ERROR[dtype])
    assert (kept.gather(1, case.targets[:, None]) == 0).all()
    assert torch.equal(case.products, products)
    # sums are of the exponentials themselves, whatever is stored
    assert torch.equal(sums.S, other.S)
    kept.fill_(float("nan"))
    assert storage.isnan().all()


def test_what_is_kept_or_wanted_changes_no_sum():
    case = make_case(7, 2050, 1025, has_bias=True)
    kept = torch.empty_like(case.products)
    full, offsets = sweep(case, with_entropy=True, kept=kept)
    for again, _ in (sweep(case, with_entropy=False), sweep(case, with_entropy=True)):
        assert torch.equal(again.S, full.S)
        assert torch.equal(again.offset, offsets[-1])


def test_a_row_depends_on_no_other_and_runs_are_bitwise_equal():
    case = make_case(10, 1300, 500, has_bias=True, softcap=8.0)
    kept = torch.empty_like(case.products)
    sums, _ = sweep(case, with_entropy=True, kept=kept)
    for rows in (slice(0, 10), slice(3, 4), slice(6, 10)):
        part = Case(
            case.C,
            case.products[rows],
            case.targets[rows],
            case.bias,
            case.inv_temperature[rows],
            case.logit_scale,
            case.softcap,
        )
        kept_part = torch.empty_like(part.products)
        sums_part, _ = sweep(part, with_entropy=True, kept=kept_part)
        for name in ("offset", "S", "U"):
            assert torch.equal(getattr(sums_part, name), getattr(sums, name)[rows])
        assert torch.equal(kept_part, kept[rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_poisoned_row_stays_alone(value):
    case = make_case(4, 300, 100)
    clean = sweep(case, with_entropy=True)[0]
    case.products[2, 150] = value
    case.targets[2] = 7
    sums, _ = sweep(case, with_entropy=True)
    assert sums.logps()[2].isnan()
    others = torch.tensor([0, 1, 3], device=DEVICE)
    assert torch.equal(sums.logps()[others], clean.logps()[others])


def test_a_target_outside_the_vocabulary_leaves_no_column_out():
    case = make_case(2, 20, 7)
    anchor = torch.zeros(2, device=DEVICE)
    S = torch.zeros(2, device=DEVICE)
    case.products[:] = 0
    case.targets[:] = torch.tensor([-100, 20])
    for columns in case.tiles():
        exp_tile_(
            case.products[:, columns].contiguous(),
            **case.arguments(columns),
            offset_R=anchor,
            S_R=S,
            U_R=None,
            kept_RC=None,
        )
    assert S.tolist() == [20.0, 20.0]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_coefficients_match_the_spec_in_float64(options, with_entropy, dtype):
    case = make_case(6, 5100, 2500, **OPTIONS[options])
    sums, _ = sweep(case, with_entropy=False)
    draws = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    constant, at_entropy = draws if with_entropy else (None, None)
    constant, at_entropy = (None if v is None else v.to(DEVICE) for v in (constant, at_entropy))
    none = torch.empty(0)
    wide = [None if v is None else v.double() for v in (constant, at_entropy)]
    slopes = Slopes(scale=none, at_target=none, constant=wide[0], at_entropy=wide[1])
    storage = torch.full((6, 3000), float("nan"), dtype=dtype, device=DEVICE)
    for columns in case.tiles():
        products = case.products[:, columns].contiguous()
        # an fp32 output may be the products' own memory
        out = products if dtype == torch.float32 else storage[:, : products.shape[1]]
        coefficient_tile_(
            products,
            out,
            **case.arguments(columns),
            offset_R=sums.offset,
            constant_R=constant,
            at_entropy_R=at_entropy,
        )
        logits = case.logits()[:, columns]
        exps = torch.exp(logits - sums.offset.double()[:, None])
        exponents = logits - sums.offset[:, None]
        truth = slopes.coefficients_(case.head(), logits.clone(), sums.offset.double())
        put_targets_(truth, case.targets, columns, 0.0)
        slope_error = 0.0 if case.softcap is None else 2 * CAP_ERROR
        weight = 1.0 if constant is None else (constant.abs()[:, None] + at_entropy.abs()[:, None] * exponents.abs())
        bound = exps * weight * (EXP_ERROR + 6 * case.logit_error() + slope_error + STORED_ERROR[dtype]) + 1e-36
        put_targets_(bound, case.targets, columns, 1e-36)
        assert_within(out, truth, bound)
        storage[:, : products.shape[1]] = float("nan")
        assert storage.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("V", [1, 7, 5000])
def test_entropy_coefficients_of_kept_values_match_float64(V, dtype):
    generator = torch.Generator().manual_seed(0)
    storage = torch.full((5, V + 9), float("nan"), dtype=dtype)
    kept = storage[1:4, 3 : 3 + V]
    kept[:] = torch.exp(torch.randn(3, V, generator=generator) * 20 - 40)
    kept[0, V // 2] = 0
    constant, at_entropy = torch.randn(2, 3, generator=generator)
    e = kept.double()
    exponents = torch.where(e == 0, 0, e.log())
    truth = e * (constant[:, None] + at_entropy[:, None] * exponents)
    storage, truth, e, exponents = (t.to(DEVICE) for t in (storage, truth, e, exponents))
    kept = storage[1:4, 3 : 3 + V]
    entropy_coefficients_(kept, constant_R=constant.to(DEVICE), at_entropy_R=at_entropy.to(DEVICE))
    weight = constant.abs()[:, None].to(DEVICE) + at_entropy.abs()[:, None].to(DEVICE) * exponents.abs()
    assert_within(kept, truth, truth.abs() * STORED_ERROR[dtype] + e * weight * 1e-6 + 1e-36)
    assert kept[0, V // 2] == 0
    kept.fill_(float("nan"))
    assert storage.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("V", "columns"), [(20, 7), (5000, 2050), (3, 1)])
def test_rescaling_touches_only_the_tiles_before_a_move(V, columns, dtype):
    generator = torch.Generator().manual_seed(0)
    T = -(-V // columns)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    storage = torch.rand(5, V + 6, generator=generator).to(dtype).to(DEVICE)
    # signalling NaNs, which any arithmetic would make quiet, where nothing may be touched
    signalling = 0x7F81 if dtype == torch.bfloat16 else 0x7F800001
    storage.view(bits)[2] = signalling
    storage[:, V + 3 :].view(bits)[:] = signalling
    offset = torch.tensor([3.0, 50.0, -7.0, 1e4, 0.5], device=DEVICE)
    offsets = offset.expand(T, 5).clone()
    # the second row moved in its second tile, the fourth in its last, the last after it
    offsets[:1, 1] = 12.0
    offsets[: T - 1, 3] = 9_990.0
    offsets[T - 1, 4] = 0.25
    storage.view(bits)[1, 3 + columns :] = signalling
    before = storage.clone()
    rescale_(storage[:, 3 : 3 + V], offsets_TR=offsets, offset_R=offset, columns=columns)
    drift = (offsets - offset).double().repeat_interleave(columns, 0)[:V].t()
    moved = drift != 0
    inside, inside_before = storage[:, 3 : 3 + V], before[:, 3 : 3 + V]
    assert moved.sum() == min(columns, V) + V
    truth = inside_before[moved].double() * drift[moved].exp()
    assert_within(inside[moved], truth, truth * (STORED_ERROR[dtype] + 3e-6))
    assert torch.equal(inside.contiguous().view(bits)[~moved], inside_before.contiguous().view(bits)[~moved])
    for outside in (slice(0, 3), slice(V + 3, None)):
        assert torch.equal(storage.view(bits)[:, outside], before.view(bits)[:, outside])


def test_no_rows_are_no_work():
    case = make_case(1, 20, 7)
    case = Case(7, case.products[:0], case.targets[:0], None, case.inv_temperature[:0], 1.0, None)
    sums, _ = sweep(case, with_entropy=True, kept=torch.empty(0, 20, device=DEVICE))
    assert sums.S.shape == (0,)


def test_rows_beyond_two_billion_elements_are_found(tmp_path):
    # a sparse file: only the few pages that are touched exist; the last row's index, wrapped to 32 bits,
    # would fall into its first third
    def lazy(name: str, dtype: torch.dtype) -> Tensor:
        if DEVICE == "cuda":
            whole = torch.empty(3 << 31, dtype=dtype, device=DEVICE)
        else:
            whole = torch.from_file(str(tmp_path / name), shared=True, size=3 << 31, dtype=dtype)
        return whole.as_strided((4, 7), ((1 << 30) + 16, 1), 1 << 31)

    case = make_case(4, 7, 7)
    products, kept, out = (lazy("products", torch.float32), *(lazy(name, torch.bfloat16) for name in ("kept", "out")))
    products.copy_(case.products)
    results = []
    for tile, kept_tile, out_tile in (
        (products, kept, out),
        (case.products.contiguous(), *torch.empty(2, 4, 7, dtype=torch.bfloat16, device=DEVICE)),
    ):
        sums = RowSums.empty(case.anchor(), with_entropy=True)
        arguments = case.arguments(slice(0, 7))
        exp_tile_(tile, **arguments, offset_R=sums.offset, S_R=sums.S, U_R=sums.U, kept_RC=kept_tile)
        coefficient_tile_(tile, out_tile, **arguments, offset_R=sums.offset, constant_R=sums.S, at_entropy_R=sums.S)
        rescale_(kept_tile, offsets_TR=(sums.offset - 1)[None], offset_R=sums.offset, columns=7)
        entropy_coefficients_(kept_tile, constant_R=sums.S, at_entropy_R=sums.S)
        results.append((sums.S, kept_tile.clone(), out_tile.clone()))
    for wide, narrow in zip(*results, strict=True):
        assert torch.equal(wide, narrow)
