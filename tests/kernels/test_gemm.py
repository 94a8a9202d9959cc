"""Products with fp32 results: values on a CPU, and that a CUDA device would take the call."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from grpo_kernels.gemm import PIECE, add_product_, add_rows_, mm_wide, widen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("D", [1, PIECE, PIECE + 1, 300])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_products_are_exact_up_to_wide_sums(dtype, D, rows):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, D, generator=g).to(dtype) for n in (rows, 40))
    wide = torch.promote_types(dtype, torch.float32)
    product = mm_wide(widen(a), widen(b).t(), out=torch.empty(rows, 40, dtype=wide), operand=dtype)
    assert product.dtype == wide
    # 300 terms of size 1 in fp32
    torch.testing.assert_close(product.double(), a.double() @ b.double().t(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_strided_operands(transposed):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 60, generator=g)[::2, ::3], torch.randn(20, 90, generator=g)[:, ::3]
    total = torch.ones(20, 20 if transposed else 30)
    if transposed:
        b = torch.randn(20, 40, generator=g)[:, ::2].t()
    add_product_(total, a, b)
    torch.testing.assert_close(total.double(), 1 + a.double() @ b.double(), rtol=0, atol=1e-5)


def test_rows_that_occur_several_times_add_up():
    total = torch.zeros(5, 3)
    add_rows_(total, torch.tensor([4, 0, 4]), torch.ones(3, 3))
    assert total[:, 0].tolist() == [1, 0, 0, 0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cuda_device_takes_the_call(dtype):
    with FakeTensorMode():
        a, b = (torch.empty(n, 64, dtype=dtype, device="cuda") for n in (32, 48))
        out = torch.empty(32, 48, device="cuda")
        assert mm_wide(widen(a), widen(b).t(), out=out, operand=dtype) is out
