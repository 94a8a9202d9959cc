from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_fast.attention import packed_attention
from grpo_fast.packing import pack_rows
from grpo_fast.padding import pad_rows
from grpo_fast.policy import install_scoring, score
from grpo_fast.self_check import check_scoring
from tests.tiny_models import FAMILIES, SIZES, VOCABULARY, build, llama, qwen3

# norm of the difference over norm of the truth, for fp32 models against the same weights in float64
FP32_RELATIVE = 1e-5
TEMPERATURE = 0.8


def draw_rows() -> tuple[list[list[int]], list[list[int]]]:
    rng = random.Random(4)

    def draw(length: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    first, second, third = draw(7), draw(1), draw(11)
    prompts = [first, second, first, third, first, third, second, first]
    # an empty completion, completions of one token, one longer than the sliding window's reach
    return prompts, [draw(length) for length in (5, 1, 0, 14, 3, 9, 2, 1)]


def weights_of(row: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(row)
    return tuple(torch.randn(2, length, generator=generator, dtype=torch.float64).unbind())  # type: ignore[return-value]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.detach().double().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


Scores = tuple[dict[int, Tensor], dict[int, Tensor], dict[str, Tensor]]


def oracle(model: nn.Module) -> Scores:
    """Log-probs and entropies by row, and the objective's gradients, of the float64 model row by row."""
    return row_by_row(copy.deepcopy(model).double())


def row_by_row(model: nn.Module) -> Scores:
    """The same of the model in its own type."""
    model.zero_grad()
    logps, entropies = {}, {}
    for row, (prompt, completion) in enumerate(zip(*draw_rows(), strict=True)):
        if not completion:
            continue
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0] / TEMPERATURE
        every = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logp = every.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        entropy = -(every.exp() * every).sum(-1)
        weights, entropy_weights = weights_of(row, len(completion))
        ((weights * logp).sum() + (entropy_weights * entropy).sum()).backward()
        logps[row], entropies[row] = logp.detach(), entropy.detach()
    return logps, entropies, gradients(model)


def packed(model: nn.Module, *, max_tokens: int | None, share_prompts: bool = False, pads: bool = False) -> Scores:
    """The same from `score`, of packs or of padded rows."""
    prompts, completions = draw_rows()
    batches: list[Any]
    if pads:
        batches = pad_rows(prompts, completions, max_tokens=max_tokens)
    else:
        batches = pack_rows(prompts, completions, max_tokens=max_tokens, share_prompts=share_prompts)
    model.zero_grad()
    logps, entropies = {}, {}
    for scored in batches:
        rows = sorted(set(scored.rows.tolist()))
        with nullcontext() if pads else packed_attention(model):
            logp, entropy, _ = score(model, scored, temperature=TEMPERATURE, return_entropy=True)
            assert entropy is not None
            assert logp.dtype == entropy.dtype == torch.float32
            both = [weights_of(row, len(completions[row])) for row in rows]
            weights, entropy_weights = (torch.cat(parts).float() for parts in zip(*both, strict=True))
            ((weights * logp).sum() + (entropy_weights * entropy).sum()).backward()
        for row in rows:
            logps[row], entropies[row] = logp[scored.rows == row].detach(), entropy[scored.rows == row].detach()
    return logps, entropies, gradients(model)


def assert_close(name: str, value: Tensor, truth: Tensor) -> None:
    error = (value.double() - truth).norm() / truth.norm()
    assert error <= FP32_RELATIVE, f"{name}: relative error {error:.2e}"


def assert_same(found: Scores, truth: Scores) -> None:
    for kind, values, expected in zip(("logps", "entropies", "gradients"), found, truth, strict=True):
        assert values.keys() == expected.keys()
        for key in expected:
            assert_close(f"{kind} {key}", values[key], expected[key])


@pytest.fixture(scope="module", params=[f"{family}-{head}" for family in FAMILIES for head in ("tied", "untied")])
def model_and_truth(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Scores]:
    family, head = request.param.split("-")
    model = FAMILIES[family](tied=head == "tied")
    install_scoring(model)
    return model, oracle(model)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("max_tokens", [9, 30, None])
def test_packs_score_and_train_as_float64_rows_do(
    model_and_truth: tuple[PreTrainedModel, Scores], share_prompts: bool, max_tokens: int | None
) -> None:
    model, truth = model_and_truth
    assert_same(packed(model, max_tokens=max_tokens, share_prompts=share_prompts), truth)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool, share_prompts: bool) -> None:
    model = FAMILIES["gemma2"](tied=True)
    install_scoring(model)
    truth = oracle(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same(packed(model, max_tokens=30, share_prompts=share_prompts), truth)


@pytest.mark.parametrize("max_tokens", [9, 30, None])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padded_rows_run_on_the_model_s_own_attention(family: str, max_tokens: int | None) -> None:
    model = FAMILIES[family]()
    install_scoring(model)
    assert_same(packed(model, max_tokens=max_tokens, pads=True), oracle(model))


def test_a_pack_outside_packed_attention_is_refused() -> None:
    model = llama()
    install_scoring(model)
    (pack,) = pack_rows([[1, 2], [3]], [[4, 5], [6]], max_tokens=None)
    with pytest.raises(ValueError, match="scored must be PaddedRows outside packed_attention, got a Pack"):
        score(model, pack, temperature=1.0)


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=["adapters", "adapters and head"])
@pytest.mark.parametrize("share_prompts", [True, False])
def test_peft_models_score_and_train_as_float64_rows_do(share_prompts: bool, modules_to_save: list[str] | None) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=modules_to_save)
    model = get_peft_model(qwen3(), config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    install_scoring(model)
    assert check_scoring(model) is None
    truth = oracle(model)
    assert any("lora_B" in name for name in truth[2])
    assert any("lm_head" in name for name in truth[2]) == (modules_to_save is not None)
    assert_same(packed(model, max_tokens=30, share_prompts=share_prompts), truth)


def test_an_adapter_on_the_head_is_refused() -> None:
    model = get_peft_model(qwen3(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"LM head must be a torch\.nn\.Linear.*modules_to_save"):
        install_scoring(model)


def test_logit_scales_of_known_configs_are_applied() -> None:
    # with the others' wider weights plain transformers in fp32 is 1.2e-5 off for Granite
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"initializer_range": 0.1}
    for model in (
        build(CohereForCausalLM, CohereConfig(**sizes, logit_scale=0.25)),
        build(GraniteForCausalLM, GraniteConfig(**sizes, logits_scaling=6.0)),
    ):
        install_scoring(model)
        assert check_scoring(model) is None
        assert_same(packed(model, max_tokens=30, share_prompts=True), oracle(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_and_leaves_mode_attention_and_random_state(family: str) -> None:
    model = FAMILIES[family]()
    model.model.layers[0].eval()
    install_scoring(model)
    modes = [module.training for module in model.modules()]
    native, state = model.config._attn_implementation, torch.get_rng_state()
    assert check_scoring(model) is None
    assert modes == [module.training for module in model.modules()]
    assert model.config._attn_implementation == native
    assert torch.equal(state, torch.get_rng_state())


def scaled_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = type(self).forward(self, *args, **kwargs)
    output.logits = output.logits * 1.5
    return output


def test_the_self_check_catches_logits_scaled_in_an_unknown_way() -> None:
    model = llama()
    model.forward = MethodType(scaled_logits, model)
    install_scoring(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM's own log-probs differ"):
        check_scoring(model)


def test_a_model_whose_packs_differ_from_its_rows_runs_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    install_scoring(model)
    monkeypatch.setattr("grpo_fast.tiled_attention._bias", lambda *_: None)
    assert "LlamaForCausalLM's scores of a pack differ from its own log-probs by" in str(check_scoring(model))


def test_a_model_whose_padding_reaches_its_tokens_is_refused() -> None:
    model = llama()
    install_scoring(model)
    # what a model that attends to later tokens does
    model.config._attn_implementation = "sdpa"
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="from a row's own earlier tokens: LlamaForCausalLM's own log-probs differ"):
        check_scoring(model)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("sliding_window", None, "Qwen2Attention must be given the window of its mask to be packed, 1000; got None"),
        ("attention_dropout", 0.5, r"got dropout=0\.5"),
    ],
)
def test_what_few_tokens_in_evaluation_do_not_show_keeps_a_model_from_packing(
    attribute: str, value: Any, reason: str
) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    # a window longer than the check's rows
    windows = {"use_sliding_window": True, "sliding_window": 1000, "layer_types": ["sliding_attention"] * 2}
    model = build(Qwen2ForCausalLM, Qwen2Config(**sizes, **windows))
    install_scoring(model)
    assert check_scoring(model) is None
    setattr(model.model.layers[1].self_attn, attribute, value)
    assert re.search(reason, str(check_scoring(model)))


def test_a_model_still_generates_saves_and_copies(tmp_path: Path) -> None:
    model = llama(tied=True).eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    before = model.generate(prompt, max_new_tokens=6, do_sample=False)
    install_scoring(model)
    install_scoring(model)
    with packed_attention(model):
        pass
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(prompt, max_new_tokens=6, do_sample=False), before)


def test_a_deep_copy_scores_with_its_own_weights() -> None:
    model = llama()
    install_scoring(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    check_scoring(other)
    (rows,) = pad_rows([[5, 6]], [[7, 8, 9]], max_tokens=None)
    assert not torch.equal(score(model, rows, temperature=1.0)[0], score(other, rows, temperature=1.0)[0])


def test_hooks_on_the_head_see_the_scoring_call() -> None:
    model = llama()
    install_scoring(model)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    (pack,) = pack_rows([[5, 6, 7]] * 2, [[7, 8, 9], [4]], max_tokens=None)
    with packed_attention(model):
        score(model, pack, temperature=1.0)
    assert seen == [torch.Size([4, 32])]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: model], ids=["wrapped", "plain"])
def test_scoring_works_through_accelerate_s_mixed_precision(wrap: Callable[[nn.Module], nn.Module]) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    install_scoring(model)
    exact, _, _ = packed(model, max_tokens=30)
    # an earlier test's precision would hold for the whole process
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = wrap(accelerator.prepare_model(model))
    check_scoring(prepared)
    found, _, grads = packed(prepared, max_tokens=30)
    assert grads
    for row, logps in exact.items():
        assert not torch.equal(found[row], logps)
        # bf16 activations: 8 bits, through two layers
        torch.testing.assert_close(found[row], logps, rtol=0.05, atol=0.3)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
