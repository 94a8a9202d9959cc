"""Layers that recompute: exactly those, without a trace in the gradients; and what the others hold, before they do."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from grpo_fast.activations import check_count, checkpoint_layers, decoder_layers, measure
from grpo_fast.attention import packed_attention
from grpo_fast.memory_plan import Size, peak_bytes
from grpo_fast.packing import pack_rows
from grpo_fast.policy import install_scoring, score
from tests.allocations import Allocations
from tests.tiny_models import SIZES, VOCABULARY, build, falcon, gemma2, llama

L = 4
DEEP = SIZES | {"num_hidden_layers": L}
ROW = 16
SIZES_MEASURED = (64, 192)
# what grows in steps: experts without a token save nothing, padding of tiles
MEASURE_RTOL = 0.03


def deep_llama():
    return build(LlamaForCausalLM, LlamaConfig(**DEEP, tie_word_embeddings=True))


def mixture(**kwargs):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**(DEEP | experts | kwargs)))


def lora(dropout=0.0):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout)
    model = get_peft_model(deep_llama(), config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # zero at first: nothing above them would have a gradient
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


MODELS = {"llama": deep_llama, "lora": lora, "mixture": mixture}


def packs_of(share_prompts):
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9, 10], [9, 10], [11]]
    completions = [[12, 13, 14], [15, 16], [17, 18, 19, 20], [21], [22, 23, 24]]
    return pack_rows(prompts, completions, max_tokens=12, share_prompts=share_prompts)


def gradients(model, share_prompts):
    """Of two packs, summed, and how often each layer ran."""
    runs = [0] * L
    layers = decoder_layers(model)

    def count(i, *_):
        runs[i] += 1

    handles = [layer.register_forward_pre_hook(partial(count, i)) for i, layer in enumerate(layers)]
    model.zero_grad()
    packs = packs_of(share_prompts)
    assert len(packs) > 1
    with packed_attention(model):
        for pack in packs:
            score(model, pack, temperature=0.9)[0].sum().backward()
    for handle in handles:
        handle.remove()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad], [count // len(packs) for count in runs]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_layers_run_again_and_no_bit_of_a_gradient_tells(name, use_reentrant):
    model = MODELS[name]()
    install_scoring(model)
    for share_prompts in (True, False):
        model.gradient_checkpointing_disable()
        expected, runs = gradients(model, share_prompts)
        assert runs == [1] * L
        assert all(gradient.abs().max() > 0 for gradient in expected)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for k in range(L + 1):
            checkpoint_layers(model, k)
            found, runs = gradients(model, share_prompts)
            assert runs == [2] * k + [1] * (L - k)
            assert all(map(torch.equal, found, expected)), k


def test_layers_of_the_language_model_only():
    from tests.tiny_vlm import FAMILIES

    model = FAMILIES["qwen2_5_vl"]()[0]
    layers = decoder_layers(model)
    assert layers == list(model.model.language_model.layers)
    model.gradient_checkpointing_enable()
    checkpoint_layers(model, 1)
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
    assert all(block.gradient_checkpointing for block in model.model.visual.blocks)


def test_layers_within_layers_follow_the_outer_one():
    model = deep_llama()
    layers = decoder_layers(model)
    layers[1].inner = type(layers[0])(model.config, 0)
    model.gradient_checkpointing_enable()
    assert decoder_layers(model) == layers
    checkpoint_layers(model, 1)
    assert not layers[1].inner.gradient_checkpointing
    checkpoint_layers(model, 2)
    assert layers[1].inner.gradient_checkpointing


def test_more_layers_than_there_are_is_refused():
    check_count(falcon(), None)
    check_count(llama(), 2)
    with pytest.raises(
        ValueError, match=r"checkpointed_layers must be at most 2, the layers of LlamaForCausalLM .* is 3"
    ):
        check_count(llama(), 3)


# -- what layers hold --------------------------------------------------------------------------------------------------


def pack_of(tokens):
    rows = torch.randint(3, VOCABULARY, (tokens // ROW, ROW + 1), generator=torch.Generator().manual_seed(1)).tolist()
    (pack,) = pack_rows([row[:1] for row in rows], [row[1:] for row in rows], max_tokens=None, share_prompts=False)
    return pack.only(torch.arange(len(pack.targets)) == 0)


def run_on(model, autocasts):
    def run(tokens):
        with packed_attention(model), torch.autocast("cpu", torch.bfloat16) if autocasts else nullcontext():
            return score(model, pack_of(tokens), temperature=1.0)

    return run


def really_held(model, run, tokens):
    """Bytes of all that a pass leaves for its backward pass, alive, weights left out."""
    weights = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes, saved = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved.append(tensor)
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run(tokens)
    del result
    return sum(sizes.values())


@pytest.mark.parametrize("autocasts", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixture", "lora"])
def test_two_small_packs_foretell_a_large_one(family, autocasts):
    model = (MODELS | {"gemma2": gemma2, "lora": partial(lora, 0.1)})[family]()
    install_scoring(model)
    run = run_on(model, autocasts)
    cost = measure(model, run, SIZES_MEASURED)
    tokens = 4 * SIZES_MEASURED[1]
    foretold = cost.rest.at(tokens) + sum(layer.held.at(tokens) for layer in cost.layers)
    assert foretold == pytest.approx(really_held(model, run, tokens), rel=MEASURE_RTOL)
    hidden = model.config.hidden_size
    # fp32 rows between layers; the first one also gets the positions' cosines and sines
    assert [layer.kept.per_token for layer in cost.layers[1:]] == [4 * hidden] * (len(cost.layers) - 1)
    assert cost.layers[0].kept.per_token > 4 * hidden
    assert all(layer.held.per_token > 4 * layer.kept.per_token for layer in cost.layers[1:])
    # rounded weights do not grow
    assert all((layer.held.fixed > 1000) == autocasts for layer in cost.layers)


def test_a_probe_leaves_no_trace():
    model = lora(dropout=0.5)
    install_scoring(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint_layers(model, 2)
    norm = model.base_model.model.model.norm
    norm.register_buffer("calls", torch.zeros(1))
    norm.register_buffer("replaced", torch.zeros(1))

    def counts(module, *_):
        module.calls += 1
        module.replaced = module.replaced + 1

    norm.register_forward_pre_hook(counts)
    model.eval()
    norm.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    modules = list(model.modules())
    replaced = norm.replaced

    def state():
        return (
            [module.training for module in modules],
            [vars(module).get("gradient_checkpointing") for module in modules],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
            [None if p.grad is None else p.grad.sum().item() for p in trained],
            [(name, buffer.tolist()) for name, buffer in model.named_buffers()],
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    before = state()
    with torch.no_grad():
        measure(model, run_on(model, False), SIZES_MEASURED)
        # it did run with dropout: torch's generator is where it was all the same
        held = measure(model, run_on(model, False), SIZES_MEASURED)
    assert state()[:-1] == before[:-1]
    assert norm.replaced is replaced
    without = lora()
    install_scoring(without)
    plain = measure(without, run_on(without, False), SIZES_MEASURED)
    assert held.layers[-1].held.per_token > plain.layers[-1].held.per_token


def test_a_probe_needs_no_more_memory_than_an_evaluation():
    model = deep_llama()
    install_scoring(model)
    run = run_on(model, False)
    with Allocations() as watched, torch.no_grad():
        run(SIZES_MEASURED[1])
    with Allocations() as probe:
        cost = measure(model, run, SIZES_MEASURED)
    held = sum(layer.held.at(SIZES_MEASURED[1]) for layer in cost.layers)
    assert probe.peak_bytes < 1.2 * watched.peak_bytes < held


# -- the peak ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """Activations outweigh all else: 6 layers, 1024 tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "head_dim": 16}
    model = build(LlamaForCausalLM, LlamaConfig(**(SIZES | sizes)))
    install_scoring(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def real_peak(model, pack, autocasts):
    with packed_attention(model), Allocations() as watched:
        with torch.autocast("cpu", torch.bfloat16) if autocasts else nullcontext():
            loss = score(model, pack, temperature=1.0)[0].sum()
        loss.backward()
    return watched.peak_bytes


@pytest.mark.parametrize("autocasts", [False, True], ids=["fp32", "bf16"])
def test_the_peak_is_foreseen(wide, autocasts):
    tokens = 1024
    cost = measure(wide, run_on(wide, autocasts), SIZES_MEASURED)
    # one token is scored: the head needs nothing to speak of
    cost = replace(cost, head=Size())
    for k in (0, 2, 5, 6):
        checkpoint_layers(wide, k)
        real = real_peak(wide, pack_of(tokens), autocasts)
        # gradients of activations are allowed for by an upper bound
        assert real <= peak_bytes(cost, tokens, k) <= 1.3 * real, k


def test_first_layers_are_the_ones_to_recompute(wide):
    """The same number at the end needs more: they come back on top of what the others hold."""
    layers = decoder_layers(wide)
    peaks = {}
    for name, chosen in {"first": layers[:3], "last": layers[3:]}.items():
        for layer in layers:
            layer.gradient_checkpointing = layer in chosen
        peaks[name] = real_peak(wide, pack_of(1024), False)
    assert peaks["first"] < 0.9 * peaks["last"]
