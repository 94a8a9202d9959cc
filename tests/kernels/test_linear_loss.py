"""What a call hands over: gradients that exist already, a buffer that was added into, those of a loss of one's own."""

import pytest
import torch

from grpo_kernels import linear_loss, linear_policy_loss, reference
from grpo_kernels.policy_terms import PolicyLoss
from tests.heads import make_head, relative_rms, to_float64
from tests.kernels.policy_runs import loss_and_grads, make_tokens

# fp32 sums of thousands of terms against float64
FP32_GRADS = 1e-5
# MiB: one block, and several
ONE_BLOCK = 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mib", [ONE_BLOCK, 1], ids=["one block", "blocks"])
def test_the_weight_gradient_is_added_into_a_given_buffer(dtype, workspace_mib):
    inputs = make_head(300, 1000, 64, dtype=dtype)
    tokens = make_tokens(inputs)
    _, plain = loss_and_grads(linear_policy_loss, inputs, tokens, workspace_mib=workspace_mib)
    for grad_dtype in {torch.float32, dtype}:
        buffer = torch.full((1000, 64), 0.5, dtype=grad_dtype)
        result = linear_policy_loss(**inputs, **tokens, weight_grad=buffer, workspace_mib=workspace_mib)
        added = buffer.double() - 0.5
        result.loss.backward()
        assert inputs["weight_VD"].grad is None
        assert torch.equal(inputs["hidden_ND"].grad, plain["hidden_ND"])
        inputs["hidden_ND"].grad = None
        # the buffer rounds 0.5 plus a gradient of about 1e-3; a bf16 gradient is rounded itself, on both ways
        step = 0.5 * torch.finfo(grad_dtype).eps
        rounding = 2 * torch.finfo(dtype).eps * plain["weight_VD"].double().abs()
        assert ((added - plain["weight_VD"].double()).abs() <= step + rounding + 1e-6).all()
        assert (buffer.double() - 0.5 == added).all()


def test_with_a_given_buffer_the_upstream_gradient_must_be_one():
    inputs = make_head(20, 100, 16)
    result = linear_policy_loss(**inputs, **make_tokens(inputs), weight_grad=torch.zeros(100, 16))
    with pytest.raises(ValueError, match=r"weight_grad .* upstream gradient 1, got 0.5"):
        (result.loss * 0.5).backward()


def test_a_second_derivative_is_refused():
    inputs = make_head(20, 100, 16)
    result = linear_policy_loss(**inputs, **make_tokens(inputs))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(result.loss, inputs["hidden_ND"], create_graph=True)


def test_backward_runs_once():
    inputs = make_head(20, 100, 16)
    result = linear_policy_loss(**inputs, **make_tokens(inputs))
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over"):
        result.loss.backward()


def test_without_gradients_nothing_is_attached():
    inputs = make_head(20, 100, 16)
    tokens = make_tokens(inputs)
    with torch.no_grad():
        scored = linear_policy_loss(**inputs, **tokens)
    trained = linear_policy_loss(**inputs, **tokens)
    assert not scored.loss.requires_grad
    assert trained.loss.requires_grad
    assert not trained.logps.requires_grad
    assert torch.equal(scored.logps, trained.logps)


def test_a_buffer_for_a_frozen_weight_is_refused():
    inputs = make_head(20, 100, 16)
    inputs["weight_VD"].requires_grad_(False)
    with pytest.raises(ValueError, match="weight_VD does not require a gradient"):
        linear_policy_loss(**inputs, **make_tokens(inputs), weight_grad=torch.zeros(100, 16))


def test_a_loss_of_ones_own_sees_whole_sequences_and_gets_its_gradients():
    inputs = make_head(1200, 300, 24)
    lengths, seen = [300, 500, 1, 399], []

    def of(logps, entropies, graph=False):
        loss = (logps * 0.1).square() - 0.01 * entropies
        return loss if graph else loss.detach()

    def loss(logps, entropies, rows):
        seen.append((rows.start, rows.stop))
        flags = torch.zeros_like(logps, dtype=torch.bool)
        return PolicyLoss(
            loss=of(logps, entropies),
            slope=0.02 * logps,
            entropy_slope=torch.full_like(entropies, -0.01),
            ratio=torch.ones_like(logps),
            kl=None,
            is_low_clipped=flags,
            is_high_clipped=flags,
            phi=None,
        )

    ours = linear_loss(**inputs, loss=loss, sequence_lengths=lengths, has_entropy_slope=True)
    grads = torch.autograd.grad(ours.loss, [inputs["hidden_ND"], inputs["weight_VD"]])
    wide = to_float64(inputs)
    logps, entropies = reference.linear_logps(**wide, return_entropy=True)
    exact = torch.autograd.grad(of(logps, entropies, graph=True).sum(), [wide["hidden_ND"], wide["weight_VD"]])
    assert seen == [(0, 801), (801, 1200)]
    for gradient, expected in zip(grads, exact, strict=True):
        assert relative_rms(gradient, expected) <= FP32_GRADS
    with pytest.raises(ValueError, match="needs has_entropy_slope=True"):
        linear_loss(**inputs, loss=loss)
    with pytest.raises(ValueError, match=r"sequence_lengths must be non-negative and add up to 1200, got \[1199\]"):
        linear_loss(**inputs, loss=loss, sequence_lengths=[1199])
