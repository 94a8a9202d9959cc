"""The benched ops: shapes by name, floors counted by hand, every provider against float64, bounds that fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import attention_providers as attention
from bench import policy_loss_providers as policy_loss
from bench.hardware import Peak
from bench.ops import OPS
from bench.provider import why_not
from bench.shapes import ATTENTION, HEADS, TOKENS, AttentionHeads, Head, parse_shape

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# fp32 against float64, relative to the norm
FP32 = 2e-6


def test_shapes_go_by_the_models_names():
    assert parse_shape("Qwen3-8B/8192") == (Head("Qwen3-8B", 4096, 151936), 8192)
    assert set(ATTENTION) == set(HEADS)
    assert TOKENS == (2048, 4096, 8192, 16384, 32768, 65536)


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-8B/", "Qwen3-8B/0", "Qwen3-8B/8k", "GPT-5/8192", "Qwen3-8B/-8"])
def test_other_shapes_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"shape must be MODEL/TOKENS.*got '"):
        parse_shape(name)


@pytest.mark.parametrize(
    ("op", "shape", "message"),
    [
        ("training", ("tokens/64",), "shape must be MODEL/TOKENS"),
        ("policy-loss", ("Qwen3-8B/64",), "shape must be tokens/N"),
        ("policy-loss", ("tokens/64", "bf16"), "dtype must be one of fp32 for policy-loss, got 'bf16'"),
        ("training", ("Qwen3-8B/64", "fp32", "shared"), "data must be one of peaked, random for training"),
    ],
)
def test_cases_an_op_does_not_have_are_refused(op, shape, message):
    with pytest.raises(ValueError, match=message):
        OPS[op].case(*shape)


N, D, V = 512, 576, 49152


@pytest.mark.parametrize(
    ("op", "dtype", "flops", "num_bytes", "result_bytes"),
    [
        ("scoring", "bf16", 2 * N * D * V, 2 * (N * D + V * D) + 8 * N + 8 * N, 8 * N),
        ("training", "bf16", 6 * N * D * V, 4 * (N * D + V * D) + 8 * N, 2 * (N * D + V * D)),
        ("training", "fp32", 6 * N * D * V, 8 * (N * D + V * D) + 8 * N, 4 * (N * D + V * D)),
        ("training-frozen", "bf16", 4 * N * D * V, 4 * N * D + 2 * V * D + 8 * N, 2 * N * D),
    ],
)
def test_floors_of_the_head(op, dtype, flops, num_bytes, result_bytes):
    work = OPS[op].work(OPS[op].case(f"SmolLM2-135M/{N}", dtype))
    assert (work.flops, work.num_bytes, work.result_bytes) == (flops, num_bytes, result_bytes)
    assert work.convention.startswith(f"{flops // (N * D * V)}NDV")


def test_floor_of_the_policy_loss_is_its_bytes():
    work = OPS["policy-loss"].work(OPS["policy-loss"].case("tokens/1000"))
    # five vectors in, one out
    assert (work.flops, work.num_bytes, work.result_bytes) == (0, 6 * 4000, 4000)


def test_floor_of_attention_counts_visible_pairs():
    op = OPS["attention"]
    work = op.work(op.case("SmolLM2-135M/256", "fp32", "shared"))
    layout = attention.make_layout(256, "shared")
    # the prompt sees itself, a completion all of the prompt and itself
    seen = sum(min(q + 1, 128) for q in range(128))
    seen += sum(128 * n + n * (n + 1) // 2 for n in layout.query_lengths[1:])
    assert sum(layout.query_lengths) == 256
    assert work.flops == 12 * seen * 9 * 64
    assert work.num_bytes == 4 * 6 * 256 * 64 * (9 + 3)
    assert work.result_bytes == 4 * 2 * 256 * 64 * (9 + 3)


def test_the_roofline_is_the_slower_of_products_and_memory():
    work = OPS["training"].work(OPS["training"].case("Qwen3-8B/8192", "bf16"))
    fast_memory = Peak({"bf16": 1e15, "fp32": 1e13}, 1e15, "")
    slow_memory = Peak({"bf16": 1e15, "fp32": 1e13}, 1e9, "")
    assert work.floor_seconds(fast_memory) == pytest.approx(6 * 8192 * 4096 * 151936 / 1e15)
    assert work.floor_seconds(slow_memory) == pytest.approx(work.num_bytes / 1e9)
    exact = OPS["training"].work(OPS["training"].case("Qwen3-8B/8192", "fp32"))
    assert exact.floor_seconds(fast_memory) == pytest.approx(6 * 8192 * 4096 * 151936 / 1e13)


def test_every_op_names_tests_and_a_bench_that_exist():
    for op in OPS.values():
        for file in op.tests:
            assert (ROOT / file).is_file()
        name = op.name.removesuffix("-frozen").replace("-", "_")
        assert f'op("{op.name}")' in (ROOT / "bench" / f"bench_{name}.py").read_text()
        for on_cuda in (False, True):
            for case in op.cases(on_cuda=on_cuda):
                assert op.case(case.shape, case.dtype, case.data) == case


def runnable(providers):
    return [provider for provider in providers.values() if why_not(provider, has_cuda=False) is None]


@pytest.mark.parametrize("data", attention.DATA)
@pytest.mark.parametrize("provider", runnable(attention.PROVIDERS), ids=lambda provider: provider.label)
def test_attention_by_every_provider_is_float64s(provider, data):
    problem = attention.make_problem(AttentionHeads("tiny", 4, 2, 16), 700, dtype="fp32", data=data, device=CPU)
    found = attention.errors(problem, provider.step(problem), attention.exact(problem))
    assert found.keys() == {"out", "dquery", "dkey", "dvalue"}
    assert max(found.values()) < FP32


@pytest.mark.parametrize("data", attention.DATA)
def test_attentions_truth_is_one_query_at_a_time(data):
    problem = attention.make_problem(AttentionHeads("tiny", 2, 1, 8), 40, dtype="fp32", data=data, device=CPU)
    layout, truth = problem.layout, attention.exact(problem)[0]
    index = torch.arange(40) if layout.key_index is None else layout.key_index
    query, key, value = (state.detach().double() for state in (problem.query, problem.key, problem.value))
    token = 0
    for row, q, k in zip(index.split(layout.key_lengths), layout.query_lengths, layout.key_lengths, strict=True):
        for i in range(q):
            seen = row[: k - q + i + 1]
            for head in range(2):
                weights = (key[seen, 0] @ query[token, head] * 8**-0.5).softmax(0)
                torch.testing.assert_close(truth[token, head], weights @ value[seen, 0])
            token += 1


@pytest.mark.parametrize("data", attention.DATA)
def test_flex_attentions_mask_is_the_layouts(data):
    problem = attention.make_problem(AttentionHeads("tiny", 2, 1, 8), 256, dtype="fp32", data=data, device=CPU)
    q, k = torch.arange(256)[:, None], torch.arange(256)[None]
    none = torch.zeros((), dtype=torch.int64)
    seen = problem.block_mask.mask_mod(none, none, q, k)
    assert int(seen.sum()) == attention.visible_pairs(problem.layout)
    weights = torch.where(seen, 0.0, -torch.inf).double()
    states = [state.detach().double().transpose(0, 1)[None] for state in (problem.query, problem.key, problem.value)]
    out = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=weights, enable_gqa=True)
    torch.testing.assert_close(out[0].transpose(0, 1), attention.exact(problem)[0])


@pytest.fixture
def no_compilation(monkeypatch):
    # the bench compiles; here the same function is checked without
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    policy_loss._compiled.cache_clear()
    yield
    policy_loss._compiled.cache_clear()


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize("provider", runnable(policy_loss.PROVIDERS), ids=lambda provider: provider.label)
def test_the_policy_loss_by_every_provider_is_float64s(provider):
    problem = policy_loss.make_problem(5000, device=CPU)
    assert policy_loss.errors(problem, provider.step(problem))["dlogps"] < FP32


def test_the_policy_losss_truth_is_autograds():
    problem = policy_loss.make_problem(500, device=CPU)
    exact = policy_loss.Problem(
        **{name: value.detach().double().requires_grad_(name == "logps") for name, value in vars(problem).items()}
    )
    (truth,) = torch.autograd.grad(policy_loss.loss_of(exact), exact.logps)
    torch.testing.assert_close(policy_loss.exact_gradient(problem), truth)
    ratio = torch.exp(exact.logps - exact.old_logps).detach()
    # both sides of the clip, or neither is tested
    assert (ratio > 1.2).any()
    assert (ratio < 0.8).any()


@pytest.mark.parametrize(
    ("label", "error", "is_wrong"),
    [
        ("ours", 0.0015, False),
        ("ours", 0.01, True),
        ("trl", 0.01, False),
        ("trl", 0.9, True),
        ("ours", float("nan"), True),
    ],
)
def test_ours_is_held_to_narrower_bounds(label, error, is_wrong):
    op = OPS["training"]
    case = op.case("SmolLM2-135M/64", "bf16")
    errors = {"dhidden": 1e-3, "logps_max": error}
    if not is_wrong:
        op.check(case, op.providers[label], errors)
        return
    with pytest.raises(AssertionError, match=f"{label} is wrong on SmolLM2-135M/64-bf16-peaked: logps_max off by"):
        op.check(case, op.providers[label], errors)


def test_a_wrong_provider_has_a_failure_and_no_figure(monkeypatch):
    from bench.measuring import Rounds
    from bench.running import run_case

    op = OPS["policy-loss"]
    wrong = type(op.providers["trl"])(label="trl", step=lambda problem: policy_loss.exact_gradient(problem) * 1.1)
    monkeypatch.setitem(op.providers, "trl", wrong)
    case, rounds = op.case("tokens/512"), Rounds(least=1, most=1)
    result = run_case(op, case, ["ours", "trl"], absent={}, device=CPU, rounds=rounds)
    assert "trl is wrong on tokens/512" in result.failures["trl"]
    assert result.measurements.keys() == {"ours"}
    assert result.errors["trl"]["dlogps"] == pytest.approx(0.1, rel=1e-3)


def test_providers_say_why_they_do_not_run():
    training = OPS["training"]
    assert training.why_not("cce", on_cuda=False) == "needs CUDA"
    assert training.why_not("ours-two-calls", on_cuda=False) == "on a CPU only with --variant"
    assert training.why_not("ours-two-calls", on_cuda=False, asked=["ours-two-calls"]) is None
    assert training.why_not("ours-two-calls", on_cuda=True) is None
    assert OPS["training-frozen"].why_not("ours-accumulating", on_cuda=True) == "a frozen head has no gradient"
    assert OPS["attention"].why_not("ours-segments", on_cuda=True) == "runs on a CPU only"
    assert "takes logits" in OPS["policy-loss"].why_not("liger", on_cuda=True)
    absent = type(training.providers["cce"])(label="x", step=print, package="no_such_package")
    assert why_not(absent, has_cuda=True) == "no_such_package is not installed"
