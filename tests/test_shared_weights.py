"""The policy's parameters are the engine's memory: an optimizer step is the update, for every family."""

import copy
import gc
import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.batch import Sampling
from grpo_fast.generation import shared_weights, vllm_loader
from grpo_fast.generation.transformers_engine import TransformersEngine
from grpo_fast.generation.vllm_engine import VLLMEngine
from grpo_fast.recipes.smollm2 import load_smollm2
from tests.vllm_models import BUILDERS, EOS, PAD, VOCABULARY, build

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]

GREEDY = Sampling(max_tokens=8, temperature=0)
PROMPTS = [[5, 9, 4], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [3, 3]]


def start(model, dtype=torch.float32, **settings):
    return VLLMEngine(
        model=model,
        processing_class=None,
        dtype=dtype,
        max_num_seqs=8,
        eos_token_ids=[EOS],
        max_model_len=64,
        **settings,
    )


def greedy_by_transformers(model):
    return TransformersEngine(model=model, pad_token_id=PAD, eos_token_ids=[EOS]).generate(PROMPTS, GREEDY).ids


def engine_tensors(engine):
    (tensors,) = engine.llm.apply_model(lambda target: list(target.parameters()))
    return tensors


def is_inside(parameter, tensors):
    start, end = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
    return any(t.data_ptr() <= start and end <= t.data_ptr() + t.nbytes for t in tensors)


def train_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("family", BUILDERS)
def test_optimizer_step_is_the_update(family):
    model = build(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = start(model)
    try:
        tensors = engine_tensors(engine)
        assert all(is_inside(parameter, tensors) for parameter in model.parameters())
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        outputs = [engine.generate(PROMPTS, GREEDY).ids]
        assert outputs[0] == greedy_by_transformers(model)
        for seed in range(3):
            train_step(model, optimizer, seed)
            engine.update_weights(model)
            assert engine.weights.copied_bytes == 0
            outputs.append(engine.generate(PROMPTS, GREEDY).ids)
            assert outputs[-1] == greedy_by_transformers(model)
            assert outputs[-1] != outputs[-2], "the policy did not move: equal outputs would prove nothing"
    finally:
        engine.close()
    # the weights outlive the engine
    del engine, tensors
    gc.collect()
    assert greedy_by_transformers(model) == outputs[-1]


@pytest.fixture(scope="module")
def shared():
    """A policy whose weights an engine shares."""
    model = build("llama")
    engine = start(model)
    yield model, engine
    engine.close()


def nbytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def test_files_hold_every_weight_once(shared, tmp_path):
    model, _ = shared
    # what the files' headers may take
    slack = 20_000
    model.save_pretrained(tmp_path)
    assert nbytes(model) <= (tmp_path / "model.safetensors").stat().st_size < nbytes(model) + slack
    loaded = type(model).from_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    # vLLM's embedding is padded to a multiple of 64 rows, and is written whole
    padding = 31 * model.config.hidden_size * 4
    assert nbytes(model) <= (tmp_path / "state.pt").stat().st_size < nbytes(model) + padding + slack
    state = torch.load(tmp_path / "state.pt")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
        assert torch.equal(state[name], parameter), name


def test_loading_and_copying_leave_the_weights_shared(shared):
    model, engine = shared
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    other = build("llama", seed=7)
    model.load_state_dict(other.state_dict())
    engine.update_weights(model)
    assert engine.weights.copied_bytes == 0
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert engine.generate(PROMPTS, GREEDY).ids == greedy_by_transformers(other)
    twin = copy.deepcopy(model)
    tensors = engine_tensors(engine)
    assert not any(is_inside(parameter, tensors) for parameter in twin.parameters())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), twin.parameters(), strict=True))


def test_gradients_are_those_of_a_model_of_its_own(shared):
    model, _ = shared
    twin = copy.deepcopy(model)
    ids = torch.randint(3, VOCABULARY, (2, 12))
    for checkpointing in (False, True):
        for one in (model, twin):
            one.zero_grad()
            one.train()
            if checkpointing:
                one.gradient_checkpointing_enable({"use_reentrant": False})
            one(input_ids=ids, labels=ids).loss.backward()
        for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad)
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()


def test_a_computed_weight_is_not_taken_for_the_parameter_that_lay_there():
    model = nn.Linear(3, 2, bias=False)
    parameters, before = shared_weights._by_address(model), model.weight.detach()
    assert shared_weights._at(parameters, before) is model.weight
    model.weight.data = before.clone()
    assert shared_weights._at(parameters, before) is None


def test_a_weight_that_was_moved_is_taken_back(shared):
    model, engine = shared
    layer = model.model.layers[0].self_attn.k_proj
    view = layer.weight.data
    layer.weight.data = view + 1.0
    expected = layer.weight.detach().clone()
    engine.update_weights(model)
    assert engine.weights.copied_bytes == layer.weight.nbytes
    assert layer.weight.data_ptr() == view.data_ptr()
    assert torch.equal(layer.weight, expected)
    engine.update_weights(model)
    assert engine.weights.copied_bytes == 0


def test_weights_in_memory_of_others_are_copied_and_said(shared, caplog):
    model, engine = shared
    layer = model.model.layers[0].self_attn.k_proj
    view = layer.weight.data
    # as in DeepSpeed's flat buffers
    buffer = torch.cat([view.flatten() + 1.0, torch.zeros(8)])
    layer.weight.data = buffer[: view.numel()].view_as(view)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine.update_weights(model)
            assert engine.weights.copied_bytes == layer.weight.nbytes
    assert layer.weight.data_ptr() == buffer.data_ptr()
    assert torch.equal(view, layer.weight)
    said = [record.message for record in caplog.records]
    assert len(said) == 1, "once, however many updates follow"
    assert "own copy of 1 weights (0.0 MiB): no longer a view" in said[0]
    layer.weight.data = view


def test_no_memory_of_shared_weights_is_a_copy(shared):
    _, engine = shared
    assert engine.weights.copies() == {}


def test_bf16_engine_shadows_fp32_weights(caplog):
    model = build("qwen3")
    with caplog.at_level(logging.WARNING):
        engine = start(model, torch.bfloat16)
    try:
        assert "the policy is float32, vLLM bfloat16" in caplog.text
        shadows = engine.shadows()
        assert set(shadows) == set(model.parameters())
        # embedding and head are padded to 128 rows, of which the policy fills 97
        filled = {weight for weight in model.parameters() if VOCABULARY not in weight.shape}
        copies = engine.weights.copies()
        assert sum(storage.nbytes() for storage in copies) == sum(weight.nbytes for weight in filled) // 2
        addresses = {storage.data_ptr() for storage in copies}
        assert {weight for weight in shadows if shadows[weight].untyped_storage().data_ptr() in addresses} == filled
        links = {link.view.data_ptr() for links in copies.values() for link in links}
        assert links == {shadows[weight].data_ptr() for weight in filled}
        tensors = engine_tensors(engine)
        assert all(is_inside(shadow, tensors) for shadow in shadows.values())
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        train_step(model, optimizer, 0)
        engine.update_weights(model)
        assert engine.weights.copied_bytes == nbytes(model) // 2
        assert all(torch.equal(shadow, parameter.bfloat16()) for parameter, shadow in shadows.items())

        # an optimizer that writes both leaves nothing to copy, until something else changes a weight
        train_step(model, optimizer, 1)
        for parameter, shadow in shadows.items():
            shadow.copy_(parameter.detach())
        engine.shadows_written()
        engine.update_weights(model)
        assert engine.weights.copied_bytes == 0
        with torch.no_grad():
            model.model.norm.weight.add_(1.0)
        engine.update_weights(model)
        assert engine.weights.copied_bytes == 2 * model.model.norm.weight.numel()
        assert torch.equal(shadows[model.model.norm.weight], model.model.norm.weight.bfloat16())
    finally:
        engine.close()


def test_weights_that_vllm_transforms_go_through_its_own_loader(monkeypatch, caplog):
    # vLLM's own layers pack their weights on a CPU and drop them
    monkeypatch.setattr("grpo_fast.generation.vllm_loader.keep_weights_as_loaded", lambda target: None)
    model = build("qwen2")
    with caplog.at_level(logging.WARNING):
        engine = start(model)
    try:
        assert "vLLM transforms weights after loading" in caplog.text
        assert engine.shadows() == engine.weights.copies() == {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for seed in range(2):
            before = engine.generate(PROMPTS, GREEDY).ids
            train_step(model, optimizer, seed)
            engine.update_weights(model)
            assert engine.generate(PROMPTS, GREEDY).ids == greedy_by_transformers(model) != before
    finally:
        engine.close()


def test_projections_swapped_from_the_start_are_named_before_any_weight_moves(monkeypatch):
    record = vllm_loader.record_load

    def swapped(target, weights):
        recorded = record(target, weights)
        q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
        recorded.pieces[q], recorded.pieces[k] = recorded.pieces[k], recorded.pieces[q]
        return recorded

    monkeypatch.setattr(vllm_loader, "record_load", swapped)
    model = build("llama", num_key_value_heads=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"q_proj\.weight: what vLLM loaded is not what it was given"):
        start(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.smol
def test_smollm2_s_optimizer_step_is_the_update():
    folder = load_smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenizer(["The capital of France is", "3 + 4 =", "Once upon a time"])["input_ids"]
    greedy = Sampling(max_tokens=12, temperature=0)
    eos = [tokenizer.eos_token_id]
    transformers = TransformersEngine(model=model, pad_token_id=tokenizer.pad_token_id, eos_token_ids=eos)
    engine = VLLMEngine(
        model=model, processing_class=None, dtype=torch.float32, max_num_seqs=8, eos_token_ids=eos, max_model_len=64
    )
    try:
        assert all(link.is_shared for link in engine.weights._links.values())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        outputs = [engine.generate(prompts, greedy).ids]
        for seed in range(2):
            train_step(model, optimizer, seed)
            engine.update_weights(model)
            assert engine.weights.copied_bytes == 0
            outputs.append(engine.generate(prompts, greedy).ids)
            assert outputs[-1] == transformers.generate(prompts, greedy).ids
        assert outputs[0] != outputs[-1]
    finally:
        engine.close()
