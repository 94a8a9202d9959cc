from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from grpo_fast import attention, segment_attention, tiled_attention
from grpo_fast.attention import (
    AttentionPlan,
    can_pack,
    causal_lm,
    is_packed,
    native_attention,
    packed_attention,
    running_packs,
)
from grpo_fast.batch import Layout
from tests.tiny_models import falcon, gemma2, llama

# fp32 sums of some dozen products of unit normals, against float64
FP32_ATOL = 2e-5
# bf16 keeps 8 bits; the reference sees the same rounded inputs
BF16_ATOL = 3e-2

# query and key lengths of segments; a pair of unequal lengths reads keys stored before its queries
LAYOUTS = {
    "one": [(9, 9)],
    "equal": [(6, 6), (6, 6), (6, 6)],
    "ragged": [(3, 3), (11, 11), (1, 1), (7, 7)],
    "shared": [(5, 5), (4, 9), (1, 6), (7, 12)],
    "two groups": [(5, 5), (4, 9), (2, 7), (8, 8), (6, 14), (1, 9), (3, 3)],
}


def make_layout(lengths: list[tuple[int, int]]) -> Layout:
    """Segments end to end; one with more keys than queries reads the start of the last one with as many of both."""
    keys, start, base = [], 0, 0
    for num_queries, num_keys in lengths:
        if num_queries == num_keys:
            base = start
        own = torch.arange(start, start + num_queries)
        keys.append(torch.cat([torch.arange(base, base + num_keys - num_queries), own]))
        start += num_queries
    queries, counts = zip(*lengths, strict=True)
    return Layout(
        cu_queries=torch.tensor([0, *queries]).cumsum(0).int(),
        cu_keys=torch.tensor([0, *counts]).cumsum(0).int(),
        key_index=None if queries == counts else torch.cat(keys),
        query_lengths=queries,
        key_lengths=counts,
    )


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """[1, H, T, D] states to [1, T, H, D], one query and head at a time, in the inputs' type."""
    group = query.shape[1] // key.shape[1]
    total = int(layout.cu_queries[-1])
    key_index = torch.arange(total) if layout.key_index is None else layout.key_index.cpu()
    out = []
    for segment, num_queries in enumerate(layout.query_lengths):
        keys = key_index[layout.cu_keys[segment] : layout.cu_keys[segment + 1]]
        for i in range(num_queries):
            position = int(layout.cu_queries[segment]) + i
            seen = keys[: len(keys) - num_queries + i + 1]
            seen = (seen if window is None else seen[-window:]).to(query.device)
            heads = []
            for head in range(query.shape[1]):
                scores = key[0, head // group, seen] @ query[0, head, position] * scaling
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                heads.append(scores.softmax(0) @ value[0, head // group, seen])
            out.append(torch.stack(heads))
    return torch.stack(out)[None]


def draw_states(total: int, *, heads: int, kv_heads: int, value_width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 8), (kv_heads, 8), (kv_heads, value_width)]
    return [torch.randn(1, h, total, d, generator=generator, dtype=torch.float64) for h, d in shapes]


def run_packed(states: list[Tensor], layout: Layout, **options: float | None) -> Tensor:
    layer = llama().model.layers[0].self_attn
    return attention._packed_attention_forward(
        layer, *states, None, layout=AttentionPlan(layout, torch.device("cpu")), **options
    )[0]


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
def test_tiles_equal_explicit_attention_and_its_gradients(
    lengths: list[tuple[int, int]], window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    layout = make_layout(lengths)
    exact = [
        states.requires_grad_() for states in draw_states(sum(layout.query_lengths), heads=heads[0], kv_heads=heads[1])
    ]
    expected = explicit_attention(*exact, layout, 0.5, window, softcap)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * weights).sum(), exact)

    states = [state.detach().float().requires_grad_() for state in exact]
    out = run_packed(states, layout, scaling=0.5, sliding_window=window, softcap=softcap)
    grads = torch.autograd.grad((out * weights).sum(), states)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FP32_ATOL)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=FP32_ATOL)


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("name", ["ragged", "two groups"])
def test_cutting_segments_into_small_tiles_changes_nothing(
    name: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled_attention, "TILE_SCORES", 1)
    monkeypatch.setattr(tiled_attention, "MIN_TILE_QUERIES", 3)
    layout = make_layout(LAYOUTS[name])
    states = [s.requires_grad_() for s in draw_states(sum(layout.query_lengths), heads=4, kv_heads=2)]
    expected = explicit_attention(*states, layout, 0.5, window, None)
    out = run_packed(states, layout, scaling=0.5, sliding_window=window)
    # float64 throughout
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(out.square().sum(), states)
    expected_grads = torch.autograd.grad(expected.square().sum(), states)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-11)


def test_values_may_be_wider_than_keys() -> None:
    layout = make_layout(LAYOUTS["shared"])
    states = draw_states(sum(layout.query_lengths), heads=4, kv_heads=2, value_width=12)
    out = run_packed(states, layout, scaling=0.5)
    torch.testing.assert_close(out, explicit_attention(*states, layout, 0.5, None, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_parts", [False, True])
def test_half_precision_states_are_multiplied_in_fp32_under_autocast_too(
    has_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_attention, "MIN_PAIRS", 0 if has_parts else 10**9)
    layout = make_layout(LAYOUTS["shared"])
    states = [s.bfloat16() for s in draw_states(sum(layout.query_lengths), heads=4, kv_heads=2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_packed(states, layout)
        wide = run_packed([s.float() for s in states], layout)
    assert out.dtype == torch.bfloat16
    expected = explicit_attention(*(s.double() for s in states), layout, 8**-0.5, None, None)
    torch.testing.assert_close(wide.double(), expected, rtol=0, atol=FP32_ATOL)
    torch.testing.assert_close(out, wide.bfloat16(), rtol=0, atol=0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts for packs of any size, cut down to two tokens."""
    monkeypatch.setattr(segment_attention, "MAX_CAUSAL", 2)
    monkeypatch.setattr(segment_attention, "MIN_PAIRS", 0)


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, FP32_ATOL), (torch.float64, 1e-12)], ids=str)
@pytest.mark.usefixtures("small_parts")
def test_parts_equal_explicit_attention_and_its_gradients(
    lengths: list[tuple[int, int]], window: int | None, heads: tuple[int, int], dtype: torch.dtype, atol: float
) -> None:
    layout = make_layout(lengths)
    exact = [s.requires_grad_() for s in draw_states(sum(layout.query_lengths), heads=heads[0], kv_heads=heads[1])]
    expected = explicit_attention(*exact, layout, 0.5, window, None)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * weights).sum(), exact)
    states = [state.detach().to(dtype).requires_grad_() for state in exact]
    assert backend_of(states, layout, window=window) is attention._segment_attention
    out = run_packed(states, layout, scaling=0.5, sliding_window=window)
    grads = torch.autograd.grad((out * weights).sum(), states)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=atol)


def backend_of(
    states: list[Tensor], layout: Layout, *, window: int | None = None, softcap: float | None = None
) -> object:
    query, _, value = (state[0].transpose(0, 1) for state in states)
    call = attention._Call(plan=AttentionPlan(layout, torch.device("cpu")), scaling=0.5, window=window, softcap=softcap)
    return attention._choose_backend(query, value, call)


def test_long_segments_go_to_the_kernel_and_what_it_cannot_do_to_tiles() -> None:
    long, short = make_layout([(150, 150), (90, 240), (90, 240)]), make_layout([(30, 30)] * 11)
    states = draw_states(330, heads=4, kv_heads=2)
    assert backend_of(states, long) is attention._segment_attention
    assert backend_of(states, long, window=240) is attention._segment_attention
    assert backend_of(states, long, window=239) is attention._tiled_attention
    assert backend_of(states, long, softcap=1.5) is attention._tiled_attention
    assert backend_of(states, short) is attention._tiled_attention
    wide = draw_states(330, heads=4, kv_heads=2, value_width=12)
    assert backend_of(wide, long) is attention._tiled_attention


def seen_by(layout: Layout) -> Tensor:
    """[T, T]: how often each query sees each token, by the parts."""
    total = int(layout.cu_queries[-1])
    seen = torch.zeros(total, total, dtype=torch.int64)
    for part in segment_attention.make_parts(layout):
        block = seen[part.queries, part.keys]
        block += torch.ones_like(block).tril() if part.is_causal else 1
    return seen


# two groups whose completions take turns; a completion behind a prompt in two pieces
SCATTERED = {
    "turns": ([(0, 4), (4, 7), (7, 10), (10, 15), (15, 17)], [[], [], [(0, 4)], [(4, 7)], [(0, 4)]]),
    "pieces": ([(0, 3), (3, 5), (5, 8), (8, 13), (13, 14)], [[], [], [], [(0, 3), (5, 8)], [(0, 3), (5, 8)]]),
}


def scattered_layout(name: str) -> Layout:
    own, before = SCATTERED[name]
    keys = [
        torch.cat([torch.arange(*run) for run in [*runs, tokens]]) for tokens, runs in zip(own, before, strict=True)
    ]
    lengths = tuple(end - start for start, end in own)
    return Layout(
        cu_queries=torch.tensor([0, *lengths]).cumsum(0).int(),
        cu_keys=torch.tensor([0, *map(len, keys)]).cumsum(0).int(),
        key_index=torch.cat(keys),
        query_lengths=lengths,
        key_lengths=tuple(map(len, keys)),
    )


@pytest.mark.parametrize("name", [*LAYOUTS, *SCATTERED])
@pytest.mark.usefixtures("small_parts")
def test_parts_hold_each_visible_pair_once(name: str) -> None:
    layout = scattered_layout(name) if name in SCATTERED else make_layout(LAYOUTS[name])
    total = int(layout.cu_queries[-1])
    index = torch.arange(total) if layout.key_index is None else layout.key_index
    expected = torch.zeros(total, total, dtype=torch.int64)
    for s, num_queries in enumerate(layout.query_lengths):
        keys = index[layout.cu_keys[s] : layout.cu_keys[s + 1]]
        for i in range(num_queries):
            expected[int(layout.cu_queries[s]) + i, keys[: len(keys) - num_queries + i + 1]] += 1
    assert torch.equal(seen_by(layout), expected)


@pytest.mark.usefixtures("small_parts")
def test_completions_behind_one_prompt_are_one_part() -> None:
    parts = segment_attention.make_parts(make_layout([(5, 5), (4, 9), (1, 6), (7, 12)]))
    assert [part for part in parts if part.keys == slice(0, 5)] == [
        segment_attention.Part(slice(5, 17), slice(0, 5), is_causal=False)
    ]


@pytest.mark.usefixtures("small_parts")
def test_segments_that_do_not_end_in_their_own_queries_are_left_to_tiles() -> None:
    layout = scattered_layout("turns")
    layout.key_index[-1] = 3
    assert segment_attention.make_parts(layout) is None


@pytest.mark.usefixtures("small_parts")
def test_half_precision_gradients_of_parts_are_as_good_as_torch_s_own() -> None:
    """Rounded once at the end; torch's bf16 attention rounds weights and their gradients, too."""
    rounded = [s.bfloat16() for s in draw_states(40, heads=4, kv_heads=2)]
    exact = [s.double().requires_grad_() for s in rounded]
    weights = torch.randn(1, 40, 4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    reference = explicit_attention(*exact, make_layout([(40, 40)]), 0.5, None, None)
    expected = torch.autograd.grad((reference * weights).sum(), exact)

    def errors(out: Tensor, states: list[Tensor]) -> list[float]:
        grads = torch.autograd.grad((out * weights).sum(), states)
        return [(g.double() - e).norm().item() for g, e in zip(grads, expected, strict=True)]

    states = [s.clone().requires_grad_() for s in rounded]
    ours = errors(run_packed(states, make_layout([(40, 40)]), scaling=0.5), states)
    peers = [s.clone().requires_grad_() for s in rounded]
    out = torch.nn.functional.scaled_dot_product_attention(*peers, is_causal=True, scale=0.5, enable_gqa=True)
    torchs = errors(out.transpose(1, 2), peers)
    assert all(mine <= other for mine, other in zip(ours, torchs, strict=True))


def test_tiles_hold_a_bounded_part_of_padding() -> None:
    lengths = [(n, n) for n in (400, 390, 300, 210, 200, 120, 30, 7, 5, 3, 2)]
    tiling = AttentionPlan(make_layout(lengths), torch.device("cpu")).tiling(None, 4, 2)
    padded = sum(tile.size[0] * tile.size[3] * tile.size[4] for tile in tiling.tiles)
    real = sum(n * n for n, _ in lengths)
    # a quarter of the padded scores may be padding, and a few thousand where segments are short
    assert real >= 0.75 * padded - tiled_attention.FREE_PADDING
    assert all(4 * tile.size[0] * tile.size[3] * tile.size[4] <= tiled_attention.TILE_SCORES for tile in tiling.tiles)
    assert AttentionPlan(make_layout(lengths), torch.device("cpu")).tiling(
        None, 4, 2
    ).restore.unique().numel() == 4 * sum(n for n, _ in lengths)


def test_tiles_are_built_once_a_layout_for_all_windows_that_reach_everywhere() -> None:
    plan = AttentionPlan(make_layout(LAYOUTS["ragged"]), torch.device("cpu"))
    assert plan.tiling(None, 4, 2) is plan.tiling(11, 4, 2)
    assert plan.tiling(None, 4, 2) is not plan.tiling(10, 4, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["_flash_attention", "_varlen_attention"])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("window", [None, 4])
def test_cuda_back_ends_equal_explicit_attention(
    backend: str, lengths: list[tuple[int, int]], window: int | None
) -> None:
    if backend == "_flash_attention":
        pytest.importorskip("flash_attn")
    layout = make_layout(lengths).to(torch.device("cuda"))
    rounded = [s.bfloat16().cuda() for s in draw_states(sum(layout.query_lengths), heads=4, kv_heads=2)]
    exact = [s.double().requires_grad_() for s in rounded]
    states = [s.requires_grad_() for s in rounded]
    expected = explicit_attention(*exact, layout, 0.5, window, None)
    call = attention._Call(plan=AttentionPlan(layout, torch.device("cpu")), scaling=0.5, window=window, softcap=None)
    out = getattr(attention, backend)(*(s[0].transpose(0, 1) for s in states), call)[None]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=BF16_ATOL)
    grads = torch.autograd.grad(out.float().sum(), states)
    expected_grads = torch.autograd.grad(expected.sum(), exact)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=BF16_ATOL, atol=BF16_ATOL)


def test_contexts_nest_and_restore_the_model_s_own_attention() -> None:
    model = llama()
    native = model.config._attn_implementation
    with native_attention(model):
        assert model.config._attn_implementation == native
    with packed_attention(model), packed_attention(model):
        with native_attention(model):
            assert model.config._attn_implementation == native
            with packed_attention(model):
                assert is_packed(model)
            assert not is_packed(model)
        assert is_packed(model)
    assert model.config._attn_implementation == native

    def fail_inside() -> None:
        with packed_attention(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert model.config._attn_implementation == native


def test_models_that_cannot_pack_say_why() -> None:
    assert can_pack(llama()) is None
    assert "AttentionInterface" in str(can_pack(falcon()))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2))
    assert "recurrent state" in str(can_pack(mamba))
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    dropping = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, attention_dropout=0.1))
    assert "attention_dropout=0.1" in str(can_pack(dropping))
    sizes |= {"num_key_value_heads": 1, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1}
    sinks = GptOssForCausalLM(GptOssConfig(**sizes, num_hidden_layers=1, layer_types=["full_attention"]))
    assert "sinks" in str(can_pack(sinks))
    strange = llama()
    strange.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in str(can_pack(strange))


def test_the_model_is_found_inside_wrappers() -> None:
    model = llama()
    assert causal_lm(torch.nn.DataParallel(model)) is model
    with pytest.raises(ValueError, match=r"must be or wrap a transformers\.PreTrainedModel, got Linear"):
        causal_lm(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("build", [llama, gemma2])
def test_calls_without_a_layout_get_the_model_s_own_attention(build) -> None:
    """Also under gradient checkpointing, whose second forward pass runs in the backward pass."""
    model = build().train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    results = []
    for context in (nullcontext, lambda: packed_attention(model)):
        model.zero_grad()
        with context():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 2:]
            logits.square().sum().backward()
        results.append((logits.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_calls_that_packed_attention_would_answer_wrongly_are_refused() -> None:
    model, ids = llama(), torch.tensor([[5, 6, 7]])
    layout = make_layout([(3, 3)])
    with packed_attention(model), running_packs(), pytest.raises(ValueError, match="layout must reach LlamaAttention"):
        model(ids, use_cache=False)
    states = draw_states(3, heads=4, kv_heads=2)
    layer = model.model.layers[0].self_attn
    plan = AttentionPlan(layout, torch.device("cpu"))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        attention._packed_attention_forward(layer, *states, torch.ones(1, 1, 3, 3), layout=plan)
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        attention._packed_attention_forward(layer, *states, None, layout=plan, dropout=0.1)
    with pytest.raises(ValueError, match="s_aux"):
        attention._packed_attention_forward(layer, *states, None, layout=plan, s_aux=torch.ones(4))
