"""Every mistake in the arguments of `linear_logps` is a ValueError that names the argument, the need and the gift."""

import pytest
import torch

from grpo_kernels import linear_logps

WRONG = {
    "hidden_ND must be": {"hidden_ND": torch.zeros(4)},
    "weight_VD must be": {"weight_VD": torch.zeros(7, 5)},
    r"targets_N must be \[4\] torch.int64": {"targets_N": torch.zeros(3, dtype=torch.int64)},
    "got .* torch.float32 on": {"targets_N": torch.zeros(4)},
    r"targets_N must lie in \[0, 7\), got values from 0 to 7": {"targets_N": torch.tensor([0, 1, 7, 2])},
    "got values from -100 to 2": {"targets_N": torch.tensor([0, 1, -100, 2])},
    r"bias must be \[7\]": {"bias": torch.zeros(6)},
    "hidden_ND must be float64, float32": {"hidden_ND": torch.zeros(4, 6, dtype=torch.float8_e4m3fn)},
    "share one dtype outside autocast": {"hidden_ND": torch.zeros(4, 6).bfloat16()},
    "must be on the device of hidden_ND": {"weight_VD": torch.zeros(7, 6, device="meta")},
    "temperature must be finite and above 0, got 0": {"temperature": 0.0},
    "temperature must be finite": {"temperature": float("nan")},
    "softcap must be": {"softcap": -1.0},
    "logit_scale must be": {"logit_scale": float("inf")},
    "workspace_mib must be": {"workspace_mib": 0},
    "impl must be one of auto, triton, torch, reference, got 'fast'": {"impl": "fast"},
    "impl='triton' needs float32, bfloat16 or float16": {
        "hidden_ND": torch.zeros(4, 6).double(),
        "weight_VD": torch.zeros(7, 6).double(),
        "impl": "triton",
    },
    "candidate must be": {"impl": "triton", "candidate": "cublas"},
    r"temperature must be a number or \[4\]": {"temperature": torch.ones(3)},
    "temperature must be finite and above 0, got values down to 0": {"temperature": torch.zeros(4)},
    "temperature must not require a gradient": {"temperature": torch.ones(4, requires_grad=True)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(monkeypatch, message):
    # a candidate is looked up before anything is launched
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = {"hidden_ND": torch.zeros(4, 6), "weight_VD": torch.zeros(7, 6), "targets_N": torch.tensor([0, 6, 2, 3])}
    linear_logps(**inputs)
    with pytest.raises(ValueError, match=message):
        linear_logps(**{**inputs, **WRONG[message]})


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA device, or TRITON_INTERPRET=1 on a CPU, got cpu"):
        linear_logps(torch.zeros(4, 6), torch.zeros(7, 6), torch.zeros(4, dtype=torch.int64), impl="triton")
