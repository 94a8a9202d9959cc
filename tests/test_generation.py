import itertools
import types

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, ProcessorMixin

from grpo_fast import GRPOConfig
from grpo_fast.batch import Sampling
from grpo_fast.generation import factory, make_engine, unwrap_model_for_generation
from grpo_fast.generation.base import check_prompts
from grpo_fast.generation.transformers_engine import PaddedBatch, TransformersEngine, cut_after
from grpo_fast.generation.unwrap import _without_hooks
from grpo_fast.generation.vllm_requests import request_seed
from grpo_fast.generation.vllm_start import require_vllm
from grpo_fast.generation.vllm_weights import named_weights, refuse_8bit

PAD, BOS, EOS, SECOND_EOS = 0, 1, 2, 3
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9, 10, 11, 12], [13]]


def tiny_model(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 24,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).train()


def engine_of(model, **changes):
    settings = {"pad_token_id": PAD, "eos_token_ids": [EOS, SECOND_EOS], "bos_token_id": BOS}
    return TransformersEngine(model=model, **settings | changes)


def padded_prompts():
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    return ids, mask


def test_samples_are_bitwise_those_of_one_generate_call():
    model = tiny_model()
    ids, mask = padded_prompts()
    config = GenerationConfig(
        max_new_tokens=20,
        do_sample=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=[EOS, SECOND_EOS],
        temperature=0.8,
        top_p=0.95,
        top_k=10,
        min_p=0.01,
        repetition_penalty=1.1,
        disable_compile=True,
    )
    torch.manual_seed(3)
    expected = model.eval().generate(input_ids=ids, attention_mask=mask, generation_config=config)
    model.train()
    torch.manual_seed(3)
    sampling = Sampling(max_tokens=20, temperature=0.8, top_p=0.95, top_k=10, min_p=0.01, repetition_penalty=1.1)
    completions = engine_of(model).generate(PROMPTS, sampling)
    rows = expected[:, ids.size(1) :].tolist()
    assert completions.ids == [cut_after(row, [EOS, SECOND_EOS]) for row in rows]
    assert completions.logps is None
    assert any(len(row) < 20 for row in completions.ids)


def test_completion_ends_with_the_first_of_the_end_tokens():
    assert cut_after([7, 3, 2, 0], [2, 3]) == [7, 3]
    assert cut_after([7, 8], [2, 3]) == [7, 8]
    assert cut_after([2, 0, 0], [2, 3]) == [2]
    assert cut_after([], [2]) == []


def test_defaults_of_the_model_do_not_reach_the_samples():
    model = tiny_model()
    sampling = Sampling(max_tokens=8, seed=1)
    expected = engine_of(model).generate(PROMPTS, sampling).ids
    model.generation_config.min_p = 0.9
    model.generation_config.top_k = 1
    assert engine_of(model).generate(PROMPTS, sampling).ids == expected
    assert (model.generation_config.min_p, model.generation_config.top_k) == (0.9, 1)


def test_greedy_repeats_and_follows_the_largest_logit():
    model = tiny_model()
    sampling = Sampling(max_tokens=6, temperature=0)
    completions = engine_of(model).generate(PROMPTS, sampling).ids
    assert completions[0] == completions[1]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2]])).logits
    assert completions[2][0] == logits[0, -1].argmax()


def test_modes_of_the_modules_come_back():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    engine_of(model).generate(PROMPTS, Sampling(max_tokens=2))
    assert [module.training for module in model.modules()] == before
    assert model.is_gradient_checkpointing


def test_modules_are_in_evaluation_mode_and_use_the_cache_while_generating():
    model = tiny_model(attention_dropout=0.9)
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    widths = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: widths.append(module.training), with_kwargs=True)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))
    engine_of(model, eos_token_ids=[99]).generate(PROMPTS, Sampling(max_tokens=4))
    assert widths == [False, 5, False, 1, False, 1, False, 1]


def test_context_is_entered_around_generate():
    events = []

    class Context:
        def __enter__(self):
            events.append("enter")

        def __exit__(self, *error):
            events.append("exit")

    engine_of(tiny_model(), context=Context).generate(PROMPTS, Sampling(max_tokens=2))
    assert events == ["enter", "exit"]


def test_seeded_samples_repeat_and_leave_the_random_state_alone():
    engine = engine_of(tiny_model())
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, Sampling(max_tokens=8, seed=7)).ids
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.generate(PROMPTS, Sampling(max_tokens=8, seed=7)).ids == first
    assert engine.generate(PROMPTS, Sampling(max_tokens=8, seed=8)).ids != first


def test_weights_are_read_in_place():
    model = tiny_model()
    engine = engine_of(model)
    sampling = Sampling(max_tokens=8, temperature=0)
    before = engine.generate(PROMPTS, sampling).ids
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    engine.update_weights(model)
    assert engine.generate(PROMPTS, sampling).ids != before


def test_no_prompts_give_no_completions():
    assert engine_of(tiny_model()).generate([], Sampling(max_tokens=4)).ids == []


def test_extra_wins_over_the_fields():
    completions = engine_of(tiny_model(), eos_token_ids=[99]).generate(
        PROMPTS, Sampling(max_tokens=4, extra={"max_new_tokens": 6})
    )
    assert [len(row) for row in completions.ids] == [6] * 4


def test_unknown_option_is_named():
    with pytest.raises(ValueError, match="generation_kwargs has entries this engine does not know: tpo_p"):
        engine_of(tiny_model()).generate(PROMPTS, Sampling(max_tokens=4, extra={"tpo_p": 0.5}))


def test_overlong_prompt_is_named_and_completions_end_with_the_context():
    with pytest.raises(ValueError, match="prompt 1 has 64 tokens, the engine's context holds 64"):
        engine_of(tiny_model()).generate([[5], [5] * 64], Sampling(max_tokens=4))
    ids = engine_of(tiny_model()).generate([[5] * 62], Sampling(max_tokens=4, extra={"eos_token_id": None})).ids
    assert len(ids[0]) == 2
    check_prompts([[5] * 1000], context=None)


def test_empty_prompt_is_named():
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine_of(tiny_model()).generate([[5], []], Sampling(max_tokens=4))


def test_missing_vllm_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"use_vllm=True needs vLLM.*pip install"):
        require_vllm()


def test_request_seeds_leave_room_for_their_groups():
    seeds = sorted(request_seed(seed, index) for seed in range(20) for index in range(20))
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 10**6
    assert seeds[-1] < 2**62


def test_lora_weights_are_named_and_valued_as_merged(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights = dict(named_weights(model))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    merged = model.merge_and_unload().state_dict()
    assert set(weights) == set(merged)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=0)


def test_generates_with_adapters_and_restores_the_generation_config():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    before = model.get_base_model().generation_config
    completions = engine_of(model).generate(PROMPTS, Sampling(max_tokens=4))
    assert len(completions.ids) == 4
    assert model.get_base_model().generation_config is before


def test_other_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="peft_config of type LoraConfig without use_dora"):
        list(named_weights(model))


def test_engine_s_own_config_decides_until_it_is_changed():
    engine = engine_of(tiny_model(), sampling=Sampling(max_tokens=8, temperature=1.5, seed=1))
    first = engine.generate(PROMPTS).ids
    assert first == engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=1.5, seed=1)).ids
    greedy = engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=0)).ids
    assert first != greedy
    engine.generation_config.top_k = 1
    assert engine.generate(PROMPTS).ids == greedy
    engine.generation_config.max_new_tokens = 3
    assert engine.generate(PROMPTS).ids == [row[:3] for row in greedy]
    # sampling of one's own is not touched by it
    assert engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=1.5, seed=1)).ids == first


def test_replaced_config_takes_special_tokens_but_no_sampling_from_the_model():
    model = tiny_model()
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD, top_k=1, temperature=0.01)
    engine = engine_of(model, eos_token_ids=[EOS], sampling=Sampling(max_tokens=20, seed=3))
    engine.generation_config = GenerationConfig(max_new_tokens=20, do_sample=True, top_k=0)
    replaced = engine.generate(PROMPTS).ids
    assert replaced == engine.generate(PROMPTS, Sampling(max_tokens=20, seed=3)).ids
    assert any(row[-1] == EOS for row in replaced)


def test_sampling_is_needed_by_an_engine_without_its_own():
    with pytest.raises(ValueError, match="sampling must be given"):
        engine_of(tiny_model()).generate(PROMPTS)


def test_multimodal_fields_reach_the_model_padded_like_the_prompts():
    seen = []

    class Vision(LlamaForCausalLM):
        def forward(self, input_ids=None, pixel_values=None, token_type_ids=None, counts=None, **kwargs):
            seen.append((input_ids, pixel_values, token_type_ids, counts))
            return super().forward(input_ids, **kwargs)

    torch.manual_seed(0)
    model = Vision(tiny_model().config)
    pixels = torch.randn(4, 3, 2, 2)
    fields = {"pixel_values": pixels, "token_type_ids": [[1] * len(row) for row in PROMPTS], "counts": [1, 2, 0, 1]}
    engine_of(model).generate(PROMPTS, Sampling(max_tokens=1), multimodal_fields=fields)
    ids, mask = padded_prompts()
    assert torch.equal(seen[0][0], ids)
    assert torch.equal(seen[0][1], pixels)
    assert torch.equal(seen[0][2], mask)
    assert seen[0][3].tolist() == [1, 2, 0, 1]


def test_suppressed_tokens_are_not_drawn():
    model = tiny_model()
    sampling = Sampling(max_tokens=8, temperature=0)
    favourite = engine_of(model).generate(PROMPTS, sampling).ids[0][0]
    suppressing = engine_of(model, suppress_tokens=[favourite])
    assert all(favourite not in row for row in suppressing.generate(PROMPTS, sampling).ids)


def test_prompts_are_padded_to_a_multiple_within_the_context():
    model = tiny_model(max_position_embeddings=24)
    widths = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))
    engine = engine_of(model, batching=PaddedBatch(pad_token_id=PAD, pad_to_multiple_of=16), eos_token_ids=[99])
    assert [len(row) for row in engine.generate([[5] * 22, [6]], Sampling(max_tokens=4)).ids] == [2, 2]
    assert widths == [32, 1]


def test_unwrapped_model_evaluates_and_gets_its_modes_back_after_an_error():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    config = model.generation_config

    def fail_inside():
        with unwrap_model_for_generation(model, Accelerator(cpu=True)) as unwrapped:
            assert unwrapped is model
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    with unwrap_model_for_generation(model, Accelerator(cpu=True), generation_kwargs={"top_k": 3}):
        assert model.generation_config.top_k == 3
    assert model.generation_config is config


def test_engine_generates_with_what_unwrap_gives():
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.lm_head.weight.neg_()
    sampling = Sampling(max_tokens=4, temperature=0)
    engine = engine_of(model, unwrap=lambda: unwrap_model_for_generation(other, Accelerator(cpu=True)))
    assert engine.generate(PROMPTS, sampling).ids == engine_of(other).generate(PROMPTS, sampling).ids
    assert engine.generate(PROMPTS, sampling).ids != engine_of(model).generate(PROMPTS, sampling).ids


def test_deepspeed_hooks_come_back_after_an_error():
    # what DeepSpeed's offload object has, which is not installed here
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        parameter.ds_active_sub_modules = {1}
    module.ds_external_parameters = list
    registered, hooks = [], [module.register_forward_hook(lambda *args: None)]
    coordinator = types.SimpleNamespace(
        is_invalid_trace=lambda: False, _invalidate_trace=lambda: hooks.append("traced")
    )
    offload = types.SimpleNamespace(
        module=module,
        forward_hooks=list(hooks),
        backward_hooks=[],
        param_coordinator=coordinator,
        _register_deepspeed_module=registered.append,
    )

    def fail_inside():
        with _without_hooks(offload):
            assert not module._forward_hooks
            assert offload.forward_hooks == []
            assert all(not parameter.ds_active_sub_modules for parameter in module.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert registered == [module]
    assert hooks[-1] == "traced"


def test_8bit_weights_are_refused():
    class Int8Params(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = Int8Params(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"does not take 8-bit weights \(0.weight\)"):
        refuse_8bit(model)


def test_engine_has_the_run_s_settings(tmp_path):
    args = GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_completion_length=7,
        temperature=0.8,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        pad_to_multiple_of=8,
        generation_kwargs={"num_beams": 1, "top_k": 5},
    )
    model = tiny_model()
    model.config.image_token_id = 17
    processor = object.__new__(ProcessorMixin)
    processor.tokenizer = types.SimpleNamespace(pad_token_id=PAD, bos_token_id=BOS)
    engine = make_engine(model, processor, args, eos_token_ids=[EOS], context=torch.no_grad, seed=0)
    config = engine.generation_config.to_dict()
    expected = {"max_new_tokens": 7, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "eos_token_id": [EOS]}
    expected |= {"repetition_penalty": 1.1, "suppress_tokens": [17], "pad_token_id": PAD, "bos_token_id": BOS}
    assert {name: config[name] for name in expected} == expected


def test_vllm_has_the_run_s_settings(tmp_path, monkeypatch):
    given = {}
    # what it makes of them is the engine's own tests' matter
    monkeypatch.setattr(factory, "VLLMEngine", lambda **kwargs: given.update(kwargs))
    args = GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=True,
        report_to="none",
        use_vllm=True,
        disable_tqdm=False,
        max_completion_length=7,
        temperature=0.8,
        generation_kwargs={"seed": 3},
        vllm_structured_outputs_regex="[0-9]+",
        vllm_max_model_length=30,
        vllm_engine_kwargs={"max_num_seqs": 3},
        trust_remote_code=True,
    )
    make_engine(tiny_model(), "tokenizer", args, eos_token_ids=[EOS], context=torch.no_grad, seed=13)
    sampling = given["sampling"]
    assert (sampling.max_tokens, sampling.temperature, sampling.extra) == (7, 0.8, {"seed": 3})
    expected = {"dtype": torch.bfloat16, "max_num_seqs": 8, "max_model_len": 30, "seed": 13, "eos_token_ids": [EOS]}
    expected |= {"structured_outputs_regex": "[0-9]+", "trust_remote_code": True, "processing_class": "tokenizer"}
    expected |= {"vllm_engine_kwargs": {"model_impl": "vllm", "max_num_seqs": 3}, "shows_progress": True}
    assert {name: given[name] for name in expected} == expected
