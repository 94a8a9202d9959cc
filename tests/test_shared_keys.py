"""What attention on gathered keys keeps for its backward pass, with a kernel of torch in place of FlashAttention's."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from grpo_fast import attention
from grpo_fast.attention import AttentionPlan, packed_attention
from grpo_fast.batch import Layout
from grpo_fast.packing import pack_rows
from grpo_fast.policy import install_scoring, score
from tests.allocations import Allocations
from tests.test_attention import draw_states, make_layout
from tests.tiny_models import llama

# sums of products in float64
FLOAT64_ATOL = 1e-12
# a prompt of 9 tokens with 6 completions, and a row alone
SHARED = [(9, 9), *[(3, 12)] * 6, (4, 4)]
TOKENS, KEYS = 9 + 6 * 3 + 4, 9 + 6 * 12 + 4


class VarlenAttention(torch.autograd.Function):
    """Exact, on any device, and saves what FlashAttention saves: queries, keys, values, output, and the lengths."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float
    ) -> Tensor:
        out = VarlenAttention.attend(query, key, value, cu_q, cu_k, scale)
        ctx.save_for_backward(query, key, value, out, cu_q, cu_k)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, cu_q, cu_k = ctx.saved_tensors
        with torch.enable_grad():
            states = [states.detach().requires_grad_() for states in (query, key, value)]
            out = VarlenAttention.attend(*states, cu_q, cu_k, ctx.scale)
            grads = torch.autograd.grad(out, states, dout)
        return *grads, None, None, None

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float) -> Tensor:
        parts = []
        for i in range(len(cu_q) - 1):
            q, k, v = query[cu_q[i] : cu_q[i + 1]], key[cu_k[i] : cu_k[i + 1]], value[cu_k[i] : cu_k[i + 1]]
            k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
            parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
        return torch.cat(parts)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, **_: Any
) -> Tensor:
    return VarlenAttention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """The back end of CUDA, which the package of that name needs."""
    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention, "_choose_backend", lambda *_: attention._flash_attention)


def attend(states: list[Tensor], layout: Layout, backend: Any) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients, and the bytes that are alive between the passes beside the states."""
    call = attention._Call(plan=AttentionPlan(layout, torch.device("cpu")), scaling=0.5, window=None, softcap=None)
    leaves = [state.clone().requires_grad_() for state in states]
    with Allocations() as allocations:
        out = backend(*(leaf[0].transpose(0, 1) for leaf in leaves), call)
        gc.collect()
        kept = allocations.live_bytes()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), leaves)), kept


def test_gathered_keys_are_not_kept_and_gradients_are_the_tiles() -> None:
    layout = make_layout(SHARED)
    assert sum(layout.query_lengths) == TOKENS
    assert sum(layout.key_lengths) == KEYS
    states = draw_states(TOKENS, heads=4, kv_heads=2)
    out, grads, kept = attend(states, layout, attention._flash_attention)
    expected, expected_grads, _ = attend(states, layout, attention._tiled_attention)
    torch.testing.assert_close(out, expected, rtol=0, atol=FLOAT64_ATOL)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=FLOAT64_ATOL)
    # the output, of 4 heads 8 wide in float64
    assert kept == 4 * 8 * 8 * TOKENS


def test_without_shared_prompts_nothing_is_gathered() -> None:
    layout = make_layout([(5, 5), (3, 3)])
    out, grads, kept = attend(draw_states(8, heads=4, kv_heads=2), layout, attention._flash_attention)
    expected, expected_grads, _ = attend(draw_states(8, heads=4, kv_heads=2), layout, attention._tiled_attention)
    torch.testing.assert_close(out, expected, rtol=0, atol=FLOAT64_ATOL)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=FLOAT64_ATOL)
    assert kept == 4 * 8 * 8 * 8


def test_hooks_outside_get_what_is_kept() -> None:
    """As where activations wait on the host."""
    layout = make_layout(SHARED)
    states = draw_states(TOKENS, heads=4, kv_heads=2)
    _, expected, _ = attend(states, layout, attention._flash_attention)
    seen: list[Tensor] = []

    def backend(*args: Any) -> Tensor:
        with saved_tensors_hooks(lambda states: seen.append(states) or len(seen) - 1, lambda i: seen[i].clone()):
            return attention._flash_attention(*args)

    _, grads, _ = attend(states, layout, backend)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert torch.equal(grad, expected_grad)
    # queries, keys, values and output of every token, once
    assert [len(states) for states in seen if states.dim() == 3] == [TOKENS] * 4


def test_a_graph_that_is_dropped_is_freed() -> None:
    layout = make_layout(SHARED)
    call = attention._Call(plan=AttentionPlan(layout, torch.device("cpu")), scaling=0.5, window=None, softcap=None)
    gc.collect()
    gc.disable()
    try:
        leaves = [states.requires_grad_() for states in draw_states(TOKENS, heads=4, kv_heads=2)]
        inputs = [leaf[0].transpose(0, 1) * 1 for leaf in leaves]
        out = attention._flash_attention(*inputs, call)
        seen = [weakref.ref(states.untyped_storage()) for states in (*inputs, out)]
        del inputs, out
        assert [ref() for ref in seen] == [None] * 4
    finally:
        gc.enable()


def train(model: Any, *, counts: bool = True) -> tuple[Tensor, Tensor, int]:
    """Log-probs, gradients end to end, and the bytes alive between the passes if it `counts` them."""
    prompt = list(range(5, 25))
    (pack,) = pack_rows([prompt] * 4, [[7, 8, 9], [4], [11, 12], [9, 9, 9, 9]], max_tokens=None, share_prompts=True)
    model.zero_grad()
    with packed_attention(model):
        allocations = Allocations()
        with allocations if counts else nullcontext():
            logps = score(model, pack, temperature=1.0)[0]
            gc.collect()
            kept = allocations.live_bytes()
        logps.square().sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), kept


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["all kept", "checkpoints", "reentrant checkpoints"])
def test_a_model_trains_as_with_tiles(use_reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    install_scoring(model)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        # as the trainer does: a checkpointed layer's inputs must want gradients
        model.enable_input_require_grads()
    logps, grads, kept = train(model)
    with monkeypatch.context() as patch:
        patch.setattr("grpo_fast.shared_keys._hooks", lambda *_: nullcontext())
        _, _, kept_gathered = train(model)
    monkeypatch.setattr(attention, "_choose_backend", lambda *_: attention._tiled_attention)
    expected, expected_grads, _ = train(model)
    # fp32
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert (grads - expected_grads).norm() <= 1e-5 * expected_grads.norm()
    # a prompt of 20 tokens, bodies of 2, 1 and 3: keys and values of two layers, 16 wide in fp32
    gathered, own = (2 * 2 * 16 * 4 * num_keys for num_keys in (20 + 3 * 20 + 6, 20 + 6))
    assert kept_gathered - kept == (gathered - own if use_reentrant is None else 0)


def test_compiled_layers_train_the_same() -> None:
    model = llama()
    install_scoring(model)
    logps, grads, _ = train(model, counts=False)
    torch._dynamo.reset()
    found, found_grads, _ = train(torch.compile(model, backend="aot_eager"), counts=False)
    torch._dynamo.reset()
    assert torch.equal(found, logps)
    # compiled parts add gradients up in another order
    assert (found_grads - grads).norm() <= 1e-6 * grads.norm()
