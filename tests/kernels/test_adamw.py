"""`adamw_step`: bitwise torch's fused AdamW on a CPU, the paper's algorithm elsewhere; shadows are bitwise copies."""

import inspect

import pytest
import torch
from torch import Tensor

from grpo_kernels import adamw, adamw_step, reference
from tests.allocations import Allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LR = 0.01
# Of a parameter after one step, in fp32. It is rounded once where it is stored, and the update, at most 3.2 lr where
# gradients are of one size, is a chain of seven roundings.
STORED_ERROR, UPDATE_ERROR = 2.0**-24, 2.0**-20 * LR
# of the moments after one step, relative to the largest so far
MOMENT_ERROR = 2.0**-22
# a step in fp16 is far from float64, but not from the same arithmetic stored in fp16
HALF_ERROR = 2.0**-9

SIZES = {"one": [1], "block": [2048], "over": [2049], "ragged": [5, 0, 4096, 777, 16], "empty": [0]}


def make(sizes: list[int], dtype: torch.dtype = torch.float32, *, seed: int = 0) -> list[list[Tensor]]:
    """Parameters, gradients, moments and steps: as before the first step."""
    g = torch.Generator().manual_seed(seed)
    params, grads = ([torch.randn(n, generator=g).to(dtype).to(DEVICE) for n in sizes] for _ in range(2))
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return [params, grads, *moments, [torch.tensor(0.0, device=DEVICE) for _ in sizes]]


def copied(columns: list[list[Tensor]], dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    return [
        *([t.clone().to(dtype or t.dtype) for t in column] for column in columns[:4]),
        [s.clone() for s in columns[4]],
    ]


def draw(columns: list[list[Tensor]], seed: int) -> None:
    """The next gradients, the same for every copy."""
    g = torch.Generator().manual_seed(seed)
    for grad in columns[1]:
        grad.copy_(torch.randn(grad.shape, generator=g).to(torch.float16))


def in_fused(sizes: list[int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of 7 with a view inside each that begins at an odd element."""
    wholes = [torch.full((n + 8,), 7.0, dtype=dtype, device=DEVICE) for n in sizes]
    return wholes, [whole[3 : 3 + n] for whole, n in zip(wholes, sizes, strict=True)]


def assert_near(columns: list[list[Tensor]], truth: list[list[Tensor]], num_steps: int) -> None:
    for param, expected in zip(columns[0], truth[0], strict=True):
        bound = num_steps * (STORED_ERROR * (1 + expected.abs()) + UPDATE_ERROR)
        assert ((param.double() - expected).abs() <= bound).all()
    for moments, expected_moments in zip(columns[2:4], truth[2:4], strict=True):
        for moment, expected in zip(moments, expected_moments, strict=True):
            scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
            assert ((moment.double() - expected).abs() <= num_steps * MOMENT_ERROR * scale).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_reference_is_torchs_adamw(weight_decay):
    columns = make([300], torch.float64)
    theirs = torch.nn.Parameter(columns[0][0].clone())
    options = {"lr": LR, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay, "maximize": weight_decay > 0}
    optimizer = torch.optim.AdamW([theirs], foreach=False, **options)
    for seed in range(10):
        draw(columns, seed)
        theirs.grad = columns[1][0].clone()
        optimizer.step()
        reference.adamw_step(*columns, **options)
    # float64 against float64
    torch.testing.assert_close(columns[0][0], theirs.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(columns[3][0], optimizer.state[theirs]["exp_avg_sq"], rtol=1e-13, atol=1e-14)


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's kernel for CUDA sums in another order")
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95)}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_torchs_fused_adamw(monkeypatch, threads, dtype, options):
    monkeypatch.setattr(adamw, "PIECE", adamw.VECTOR)
    sizes = [1, 63, 64, 65, 0, 1000, 4096]
    columns = make(sizes, dtype)
    theirs = [torch.nn.Parameter(p.clone()) for p in columns[0]]
    optimizer = torch.optim.AdamW(theirs, lr=LR, fused=True, **options)
    wholes, shadows = in_fused(sizes, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(5):
            draw(columns, seed)
            for param, grad in zip(theirs, columns[1], strict=True):
                param.grad = grad.clone()
            optimizer.step()
            adamw_step(*columns, lr=LR, shadows=shadows, **options)
            assert all(torch.equal(a, b) for a, b in zip(columns[0], theirs, strict=True))
            assert all(torch.equal(s, p.to(s.dtype)) for s, p in zip(shadows, columns[0], strict=True))
    finally:
        torch.set_num_threads(before)
    for i, param in enumerate(theirs):
        state = optimizer.state[param]
        assert torch.equal(columns[2][i], state["exp_avg"])
        assert torch.equal(columns[3][i], state["exp_avg_sq"])
        assert columns[4][i] == state["step"] == 5
    assert all((whole[:3] == 7).all() and (whole[-5:] == 7).all() for whole in wholes)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_matches_float64(monkeypatch, sizes, weight_decay):
    pytest.importorskip("triton")
    columns = make(SIZES[sizes])
    truth = copied(columns, torch.float64)
    # the interpreter truncates to bf16, hardware rounds
    wholes, shadows = in_fused(SIZES[sizes], torch.float16 if DEVICE == "cpu" else torch.bfloat16)
    num_steps = 4
    for seed in range(num_steps):
        for each in (columns, truth):
            draw(each, seed)
        adamw_step(*columns, lr=LR, weight_decay=weight_decay, shadows=shadows, impl="triton")
        reference.adamw_step(*truth, lr=LR, weight_decay=weight_decay)
    assert_near(columns, truth, num_steps)
    assert all(torch.equal(s, p.to(s.dtype)) for s, p in zip(shadows, columns[0], strict=True))
    assert all((whole[:3] == 7).all() and (whole[-5:] == 7).all() for whole in wholes)
    assert all(step == num_steps for step in columns[4])


def test_kernel_in_half_precision():
    pytest.importorskip("triton")
    columns = make([2049], torch.float16)
    # eps is below fp16's smallest number, and a second moment may be 0
    for moment in columns[3]:
        moment.fill_(0.5)
    spec = copied(columns)
    adamw_step(*columns, lr=LR, impl="triton")
    reference.adamw_step(*spec, lr=LR)
    for ours, expected in zip(columns[:4], spec[:4], strict=True):
        torch.testing.assert_close(ours, expected, rtol=HALF_ERROR, atol=HALF_ERROR)


IMPLS = ["torch", "triton", "reference"]


@pytest.fixture(params=IMPLS)
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def test_some_have_shadows_of_several_dtypes(impl):
    columns = make([64, 100, 64, 65])
    shadows = [torch.zeros(64, dtype=torch.float16), None, torch.zeros(64), torch.zeros(65, dtype=torch.float64)]
    if impl == "triton":
        shadows[3] = torch.zeros(65)
    shadows = [None if s is None else s.to(DEVICE) for s in shadows]
    plain = copied(columns)
    adamw_step(*columns, lr=LR, shadows=shadows, impl=impl)
    adamw_step(*plain, lr=LR, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(columns[0], plain[0], strict=True))
    assert all(torch.equal(s, p.to(s.dtype)) for s, p in zip(shadows, columns[0], strict=True) if s is not None)


def test_parameters_and_shadows_of_any_layout(impl):
    """A transposed parameter, a shadow of its layout, and one that is not."""
    flat = make([12 * 16, 12 * 16])
    plain = copied(flat)
    turned = [[t.view(12, 16).t() for t in column] for column in flat[:4]]
    fused = torch.full((20, 24), 7.0, device=DEVICE, dtype=torch.float16)
    shadows = [torch.zeros(12, 16, device=DEVICE, dtype=torch.float16).t(), fused[2:18, 5:17]]
    adamw_step(*turned, flat[4], lr=LR, shadows=shadows, impl=impl)
    adamw_step(*plain, lr=LR, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(flat[0], plain[0], strict=True))
    assert all(torch.equal(s, p.to(s.dtype)) for s, p in zip(shadows, turned[0], strict=True))
    assert (fused == 7).sum() == fused.numel() - 12 * 16


def test_what_is_not_finite_stays_with_its_element(impl):
    columns = make([100])
    grads = [float("nan"), float("inf"), 1e30, 1e-30, 0.0, -0.0]
    columns[1][0][: len(grads)] = torch.tensor(grads)
    columns[0][0][4] = float("inf")
    columns[0][0][6] = 1e6
    shadow = torch.zeros(100, dtype=torch.float16, device=DEVICE)
    theirs = torch.nn.Parameter(columns[0][0].clone())
    theirs.grad = columns[1][0].clone()
    torch.optim.AdamW([theirs], lr=LR, weight_decay=0, foreach=False).step()
    adamw_step(*columns, lr=LR, weight_decay=0, shadows=[shadow], impl=impl)
    param = columns[0][0]
    assert param[:2].isnan().all()
    assert param[4] == float("inf")
    assert shadow[:2].isnan().all()
    # 1e6 is beyond fp16, too
    assert shadow[4] == shadow[6] == float("inf")
    torch.testing.assert_close(param, theirs.detach(), rtol=2**-22, atol=UPDATE_ERROR, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_grad_scale_divides_and_found_inf_skips(impl, shape):
    columns = make([65, 2048])
    shadows = [torch.zeros_like(p, dtype=torch.float16) for p in columns[0]]
    plain = copied(columns)
    columns[1] = [grad * 1024 for grad in columns[1]]
    untouched = copied(columns)
    scaling = {"grad_scale": torch.full(shape, 1024.0, device=DEVICE), "found_inf": torch.ones(shape, device=DEVICE)}
    adamw_step(*columns, lr=LR, shadows=shadows, impl=impl, **scaling)
    assert all(torch.equal(a, b) for x, y in zip(columns, untouched, strict=True) for a, b in zip(x, y, strict=True))
    scaling["found_inf"].zero_()
    adamw_step(*columns, lr=LR, shadows=shadows, impl=impl, **scaling)
    adamw_step(*plain, lr=LR, impl=impl)
    # a power of 2 divides exactly; the gradients are left divided, as torch leaves them
    assert all(torch.equal(a, b) for x, y in zip(columns, plain, strict=True) for a, b in zip(x, y, strict=True))
    assert all(torch.equal(s, p.to(s.dtype)) for s, p in zip(shadows, columns[0], strict=True))


def test_maximize_goes_the_other_way(impl):
    up, down = make([100]), make([100])
    down[1][0].neg_()
    adamw_step(*up, lr=LR, maximize=True, impl=impl)
    adamw_step(*down, lr=LR, impl=impl)
    assert torch.equal(up[0][0], down[0][0])


def test_the_last_bits_of_the_second_moments_correction_are_kept():
    """1 - 0.999 in fp32 is off by 1e-5, which every update of the first steps would be, too."""
    pytest.importorskip("triton")
    columns = make([2048])
    columns[0][0].zero_()
    truth = copied(columns, torch.float64)
    adamw_step(*columns, lr=1.0, weight_decay=0, impl="triton")
    reference.adamw_step(*truth, lr=1.0, weight_decay=0)
    torch.testing.assert_close(columns[0][0].double(), truth[0][0], rtol=2**-21, atol=0)


def test_nothing_of_a_parameters_size_is_allocated():
    columns = make([1 << 16, 100])
    shadows = [torch.zeros_like(p, dtype=torch.bfloat16) for p in columns[0]]
    with Allocations() as allocations:
        adamw_step(*columns, lr=LR, shadows=shadows, impl="torch")
    assert allocations.peak_bytes < 1000


def test_no_parameters_are_no_work(impl):
    adamw_step([], [], [], [], [], lr=LR, impl=impl)


@pytest.mark.parametrize("room", [1, 64, 100, 1 << 20])
def test_batches_cover_everything_once(room):
    sizes = [1, 64, 0, 130, 63, 1000]
    found = [[] for _ in sizes]
    for batch in adamw.batches(sizes, room):
        assert sum(stop - start for _, start, stop in batch) < room + adamw.VECTOR
        for i, start, stop in batch:
            assert start % adamw.VECTOR == 0
            found[i] += range(start, stop)
    assert found == [list(range(size)) for size in sizes]


def test_op_and_reference_have_one_signature():
    op, spec = (inspect.signature(f).parameters for f in (adamw_step, reference.adamw_step))
    assert {n: p.default for n, p in op.items() if n != "impl"} == {n: p.default for n, p in spec.items()}


WRONG_OPTIONS = {
    r"shadows\[1\] must be \[4, 6\] on cpu, got \[24\]": {"shadows": [None, torch.zeros(24)]},
    r"shadows\[1\] must be float64.*, got .* torch.int64": {"shadows": [None, torch.zeros(4, 6).long()]},
    r"shadows\[1\] must not require": {"shadows": [None, torch.zeros(4, 6, requires_grad=True)]},
    "shadows must have as many": {"shadows": [None]},
    "lr must be finite and at least 0, got -1": {"lr": -1.0},
    "eps must be .* got nan": {"eps": float("nan")},
    "weight_decay must be": {"weight_decay": -0.1},
    r"betas must be in \[0, 1\), got \(0.9, 1.0\)": {"betas": (0.9, 1.0)},
    r"grad_scale must be \[\] or \[1\] torch.float32 on cpu, got \[2\]": {"grad_scale": torch.ones(2)},
    "found_inf must be .* torch.float64": {"found_inf": torch.zeros((), dtype=torch.float64)},
    "impl must be one of": {"impl": "fast"},
}
# which list, and what its second tensor is instead
WRONG_TENSORS = {
    r"grads\[1\] must be like params\[1\].*, got \[6, 4\]": (1, torch.zeros(6, 4)),
    r"exp_avgs\[1\] must be like .* with strides \(1, 4\)": (2, torch.zeros(6, 4).t()),
    r"exp_avg_sqs\[1\] must be like .* torch.float64": (3, torch.zeros(4, 6).double()),
    r"params must have one dtype and device, .* params\[1\] \[4, 6\] torch.bfloat16": (0, torch.zeros(4, 6).bfloat16()),
    r"params\[1\] must be dense, .* strides \(7, 1\)": (0, torch.zeros(4, 7)[:, :6]),
    r"steps\[1\] must be \[\] float, got \[1\]": (4, torch.zeros(1)),
}


def of_two() -> list[list[Tensor]]:
    return [[torch.zeros(4, 6), torch.zeros(4, 6)] for _ in range(4)] + [[torch.tensor(0.0), torch.tensor(0.0)]]


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options_are_named(message):
    columns = of_two()
    adamw_step(*columns, lr=LR)
    with pytest.raises(ValueError, match=message):
        adamw_step(*columns, **{"lr": LR} | WRONG_OPTIONS[message])
    assert columns[4][0] == 1


@pytest.mark.parametrize("message", WRONG_TENSORS)
def test_wrong_tensors_are_named(message):
    columns = of_two()
    column, tensor = WRONG_TENSORS[message]
    columns[column][1] = tensor
    with pytest.raises(ValueError, match=message):
        adamw_step(*columns, lr=LR)
    assert columns[4][0] == 0


def test_wrong_lists_are_named():
    columns = of_two()
    columns[1] = columns[1][:1]
    with pytest.raises(ValueError, match="grads must have as many tensors as params, 2, got 1"):
        adamw_step(*columns, lr=LR)
    integers = [[torch.zeros(3, dtype=torch.int64)] for _ in range(4)]
    with pytest.raises(ValueError, match=r"params\[0\] must be float64, float32"):
        adamw_step(*integers, [torch.tensor(0.0)], lr=LR)


def test_found_inf_wants_steps_on_the_device():
    columns = [[torch.zeros(4, device="meta")] for _ in range(4)] + [[torch.tensor(0.0)]]
    with pytest.raises(ValueError, match="steps must be on meta like params where found_inf is given"):
        adamw_step(*columns, lr=LR, found_inf=torch.zeros((), device="meta"))
