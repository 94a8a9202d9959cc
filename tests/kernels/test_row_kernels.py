"""The Triton passes over rows of width D give what torch gives in float64; on a CPU in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from grpo_kernels.row_kernels import finish_hidden, scale_rows, scale_unless_one_, target_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy warns of what the interpreter computes in lanes that are masked
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
# of a product summed in fp32, relative to the sum of magnitudes
SUM_ERROR = 1e-6
# the interpreter truncates to bf16, hardware rounds
STORED_ERROR = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2**-23}

# stored dtype, operand dtype: the interpreter rounds to fp16 as hardware does, so that masters are rounded to that
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32_as_fp16": (torch.float32, torch.float16),
}
SIZES = [1, 64, 100, 2048, 2049]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def inside_poison(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """NaN storage, and a view of its middle that holds the tensor."""
    rows, columns = tensor.shape
    storage = torch.full((rows + 2, columns + 5), float("nan"), dtype=tensor.dtype, device=DEVICE)
    view = storage[1:-1, 2 : 2 + columns]
    view.copy_(tensor)
    return storage, view


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    error = (actual.double() - expected).abs()
    assert torch.isfinite(actual).all()
    assert (error <= bound).all(), f"off by {(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("D", SIZES)
def test_target_logits_match_float64(D, dtypes, has_bias, softcap):
    stored, operand = DTYPES[dtypes]
    V = 9
    _, hidden = inside_poison(random(5, D, dtype=stored))
    _, weight = inside_poison(random(V, D, dtype=stored, seed=1))
    bias = random(V, dtype=stored, seed=2) if has_bias else None
    inv_temperature = random(5, seed=3).abs() + 0.5
    # the poison around the weight would be read by a target outside the vocabulary that is not left out
    targets = torch.tensor([0, V - 1, 4, -1, V], device=DEVICE)
    logits = target_logits(
        hidden,
        weight,
        targets,
        bias_V=bias,
        inv_temperature_N=inv_temperature,
        logit_scale=0.5,
        softcap=softcap,
        operand=operand,
    )
    assert logits.dtype == torch.float32
    assert logits[3:].tolist() == [0.0, 0.0]
    products = hidden[:3].to(operand).double() * weight[targets[:3]].to(operand).double()
    x = products.sum(1) + (bias[targets[:3]].to(operand).double() if bias is not None else 0)
    x = x * 0.5
    truth = (x if softcap is None else softcap * torch.tanh(x / softcap)) * inv_temperature[:3]
    magnitude = products.abs().sum(1) + 1
    assert_within(logits[:3], truth, (SUM_ERROR * magnitude + 1e-6 * (softcap or 0)) * inv_temperature[:3])


def test_target_logits_of_transposed_tensors_are_the_same():
    hidden, weight = random(4, 300), random(7, 300, seed=1)
    arguments = {"bias_V": None, "logit_scale": 1.0, "softcap": None, "operand": torch.float32}
    arguments["inv_temperature_N"] = torch.ones(4, device=DEVICE)
    targets = torch.tensor([6, 0, 3, 3], device=DEVICE)
    plain = target_logits(hidden, weight, targets, **arguments)
    turned = target_logits(hidden.t().contiguous().t(), weight.t().contiguous().t(), targets, **arguments)
    assert torch.equal(plain, turned)
    alone = target_logits(
        hidden[2:3], weight, targets[2:3], **{**arguments, "inv_temperature_N": torch.ones(1, device=DEVICE)}
    )
    assert torch.equal(alone, plain[2:3])


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("D", SIZES)
def test_scaled_rows_match_float64(D, dtypes):
    stored, operand = DTYPES[dtypes]
    _, hidden = inside_poison(random(3, D, dtype=stored))
    scale = random(3, seed=1)
    narrow = torch.float32 if operand == torch.float16 else operand
    scaled = scale_rows(hidden, scale, operand=operand, dtype=narrow)
    assert scaled.dtype == narrow
    assert scaled.is_contiguous()
    truth = hidden.to(operand).double() * scale.double()[:, None]
    assert_within(scaled, truth, truth.abs() * (STORED_ERROR[narrow] + SUM_ERROR))
    assert torch.equal(scale_rows(hidden.t().contiguous().t(), scale, operand=operand, dtype=narrow), scaled)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("D", SIZES)
def test_finished_hidden_gradients_match_float64(D, dtypes):
    stored, operand = DTYPES[dtypes]
    V = 9
    targets = torch.tensor([0, V - 1, 4, -1, V], device=DEVICE)
    dhidden, scale, at_target = random(5, D), random(5, seed=1), random(5, seed=2)
    _, weight = inside_poison(random(V, D, dtype=stored, seed=3))
    storage, out = inside_poison(torch.zeros(5, D, dtype=stored))
    arguments = {"weight_VD": weight, "targets_R": targets, "scale_R": scale, "at_target_R": at_target}
    finish_hidden(dhidden, **arguments, operand=operand, out_RD=out)
    chosen = weight[targets.clamp(0, V - 1)].to(operand).double() * at_target.double()[:, None]
    chosen[3:] = 0
    truth = (dhidden.double() + chosen) * scale.double()[:, None]
    magnitude = (dhidden.abs() + chosen.abs()) * scale.abs()[:, None]
    assert_within(out, truth, truth.abs() * STORED_ERROR[stored] + magnitude * SUM_ERROR + 1e-7)
    expected = out.clone()
    out.fill_(float("nan"))
    assert storage.isnan().all()
    if stored == torch.float32:
        finish_hidden(dhidden, **arguments, operand=operand, out_RD=dhidden)
        assert torch.equal(dhidden, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("factor", [2.0, 0.0, -0.3])
def test_scaling_multiplies(factor, dtype):
    tensor = random(3, 1700, dtype=dtype)
    truth = tensor.double() * torch.tensor(factor).double()
    scale_unless_one_(tensor, torch.tensor(factor, device=DEVICE))
    assert_within(tensor, truth, truth.abs() * STORED_ERROR[dtype])


def test_scaling_covers_a_tensor_of_more_blocks_than_programs():
    tensor = torch.ones(1056 * 16 + 3, device=DEVICE)
    scale_unless_one_(tensor, torch.tensor(2.0, device=DEVICE), block=8)
    assert (tensor == 2).all()


def test_scaling_by_one_writes_nothing():
    # any arithmetic on a signalling NaN, even times 1, would make it quiet
    tensor = torch.full((5000,), 0x7F800001, dtype=torch.int32, device=DEVICE).view(torch.float32)
    scale_unless_one_(tensor, torch.tensor(1.0, device=DEVICE))
    assert (tensor.view(torch.int32) == 0x7F800001).all()
    scale_unless_one_(tensor, torch.tensor(2.0, device=DEVICE))
    assert (tensor.view(torch.int32) != 0x7F800001).all()


def test_scaling_by_nan_is_not_lost():
    tensor = torch.ones(5, device=DEVICE)
    scale_unless_one_(tensor, torch.tensor(float("nan"), device=DEVICE))
    assert tensor.isnan().all()


def test_no_rows_are_no_work():
    none, weight, targets = random(0, 4), random(3, 4), torch.empty(0, dtype=torch.int64, device=DEVICE)
    vector = torch.empty(0, device=DEVICE)
    arguments = {"bias_V": None, "inv_temperature_N": vector, "logit_scale": 1.0, "softcap": None}
    assert target_logits(none, weight, targets, **arguments, operand=torch.float32).shape == (0,)
    assert scale_rows(none, vector, operand=torch.float32, dtype=torch.float32).shape == (0, 4)
    scale_unless_one_(none, torch.tensor(2.0, device=DEVICE))


def test_rows_beyond_two_billion_elements_are_found(tmp_path):
    # a sparse file: only the few pages that are touched exist; the last row's index, wrapped to 32 bits,
    # would fall into its first third
    def lazy(name: str) -> Tensor:
        if DEVICE == "cuda":
            whole = torch.empty(3 << 31, dtype=torch.bfloat16, device=DEVICE)
        else:
            whole = torch.from_file(str(tmp_path / name), shared=True, size=3 << 31, dtype=torch.bfloat16)
        return whole.as_strided((4, 5), ((1 << 30) + 16, 1), 1 << 31)

    vector, targets = random(4, seed=4), torch.tensor([1, 3, 0, 2], device=DEVICE)
    results = []
    for make in (lazy, lambda name: torch.empty(4, 5, dtype=torch.bfloat16, device=DEVICE)):
        hidden, weight, out = (make(name) for name in ("hidden", "weight", "out"))
        hidden.copy_(random(4, 5))
        weight.copy_(random(4, 5, seed=1))
        logits = target_logits(
            hidden,
            weight,
            targets,
            bias_V=None,
            inv_temperature_N=vector,
            logit_scale=1.0,
            softcap=None,
            operand=torch.bfloat16,
        )
        scaled = scale_rows(hidden, vector, operand=torch.bfloat16, dtype=torch.float32)
        finish_hidden(
            scaled,
            weight_VD=weight,
            targets_R=targets,
            scale_R=vector,
            at_target_R=vector,
            operand=torch.bfloat16,
            out_RD=out,
        )
        results.append((logits, scaled, out.clone()))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)
