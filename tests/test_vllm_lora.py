"""LoRA in the engine: the base is one memory and an update writes A and B alone, or adapters are added into copies."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, GPT2Config, GPT2LMHeadModel, LlavaConfig, LlavaForConditionalGeneration

from grpo_fast import GRPOConfig, GRPOTrainer, adapters
from grpo_fast.generation.vllm_lora import why_merged
from tests.test_shared_weights import GREEDY, PROMPTS, greedy_by_transformers, start, train_step
from tests.test_trainer_vllm import MAX_LOGP_DIFFERENCE
from tests.tiny_lm import make_model, make_tokenizer
from tests.vllm_models import build

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]

# updates of adapters that are added into the weights
CYCLES = 1000
MERGING = {"vllm_engine_kwargs": {"enable_lora": False}}
CONFIGS = {
    "two slices of a fused linear": ("llama", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "all linears, each scaled its own way": (
        "gemma3",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": "all-linear",
            "exclude_modules": r".*0\.mlp\.up_proj",
            "rank_pattern": {"q_proj": 12},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "a linear that transformers fuses, and a trained head": (
        "phi3",
        {"r": 3, "target_modules": ["qkv_proj", "o_proj"], "modules_to_save": ["lm_head"]},
    ),
}


def adapted(family, config, *, seed=1, **changes):
    """A policy whose adapters are no identity."""
    model = get_peft_model(build(family, **changes), LoraConfig(task_type="CAUSAL_LM", **config))
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model, seed, std=0.2):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def greedy(engine, model):
    engine.update_weights(model)
    engine.weights.check(model, num_rows=8, generator=torch.Generator().manual_seed(0))
    if engine.adapter is not None:
        engine.adapter.check(model)
    ours = engine.generate(PROMPTS, GREEDY).ids
    assert ours == greedy_by_transformers(model)
    return ours


def base_weights(model):
    return {name: weight.clone() for name, weight in model.named_parameters() if ".base_layer." in name}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_update_copies_the_adapter_alone(case):
    family, config = CONFIGS[case]
    model = adapted(family, config)
    before = base_weights(model)
    engine = start(model)
    try:
        assert engine.adapter is not None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        outputs = [greedy(engine, model)]
        size = sum(parameter.nbytes for name, parameter in model.named_parameters() if ".lora_" in name)
        for seed in range(3):
            train_step(model, optimizer, seed)
            outputs.append(greedy(engine, model))
            assert outputs[-1] != outputs[-2], "the policy did not move: equal outputs would prove nothing"
            assert engine.weights.copied_bytes == 0
            assert engine.copied_bytes == size
        with model.disable_adapter():
            assert greedy_by_transformers(model) != outputs[-1], "the adapter changes nothing"
        assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())
    finally:
        engine.close()


def test_every_request_runs_with_the_adapter_and_what_is_stale_is_named():
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = adapted(*CONFIGS["two slices of a fused linear"])
    engine = start(model)
    try:
        ours = greedy(engine, model)
        requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        settings = SamplingParams(temperature=0, max_tokens=8, detokenize=False, stop_token_ids=[2])
        direct = engine.llm.generate(requests, settings, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in direct] == ours
        other = LoRARequest(lora_name="other", lora_int_id=7, lora_path="nowhere")
        with pytest.raises(ValueError, match="lora_request must be left out"):
            engine.llm.generate(requests, settings, use_tqdm=False, lora_request=other)

        # one value that no update has written
        weight = model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj.lora_B.default").weight
        with torch.no_grad():
            weight[3, 2] += 1e-3
        with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.default\.weight: its values"):
            engine.adapter.check(model)
        engine.update_weights(model)
        engine.adapter.check(model)
        # a module that the policy leaves alone
        (slots,) = engine.llm.apply_model(lambda target: target.model.layers[0].self_attn.qkv_proj.lora_b_stacked)
        slots[0][0, 0, 5, 1] += 1
        with pytest.raises(RuntimeError, match=r"weights: model\.layers\.0\.self_attn\.q_proj\.lora_B"):
            engine.adapter.check(model)
        (target,) = engine.llm.apply_model(lambda target: target)
        target.lora_manager.remove_all_adapters()
        with pytest.raises(RuntimeError, match="policy: vLLM has dropped the adapter"):
            engine.adapter.check(model)
        assert greedy(engine, model) == greedy_by_transformers(model), "an update takes it back in"
    finally:
        engine.close()


@pytest.mark.parametrize("settings", [{}, MERGING], ids=["in its slots", "merged"])
def test_the_engine_runs_what_the_model_runs(settings):
    """Reference, other adapters, several at once, disabled, merged: at an update the engine takes what is active."""
    model = adapted("llama", {"r": 8, "target_modules": ["q_proj", "down_proj"]})
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj"]))
    fill(model, seed=2)
    adapters.add_reference_adapter(model)
    model.base_model.set_adapter(["default", "other"])
    before = base_weights(model)
    engine = start(model, **settings)
    try:
        both = greedy(engine, model)
        model.set_adapter("default")
        own = greedy(engine, model)
        assert own != both
        with adapters.reference_adapter(model):
            assert engine.generate(PROMPTS, GREEDY).ids == own
        fill(model, seed=3)
        moved = greedy(engine, model)
        assert moved != own
        with model.disable_adapter():
            assert greedy(engine, model) not in (own, moved)
        assert greedy(engine, model) == moved
        model.set_adapter("other")
        assert greedy(engine, model) not in (own, moved)
        model.set_adapter("default")
        assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())
        for seed in (4, 5):
            model.merge_adapter()
            merged = greedy(engine, model)
            model.unmerge_adapter()
            assert greedy(engine, model) == merged
            fill(model, seed)
        engine.update_weights(model)
        # vLLM has slots of rank 16 for the 8 + 3 at the start, and none on a layer without adapters then
        model.add_adapter("large", LoraConfig(r=17, target_modules=["q_proj"]))
        model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["o_proj"]))
        fill(model, seed=6)
        base = model.get_submodule("base_model.model.model.layers.0.self_attn.o_proj").base_layer.weight
        kept = base.clone()
        for name, message in [
            ("large", r"rank 16; active on .*q_proj are large of rank 17; vllm_engine_kwargs"),
            ("elsewhere", r"no place for the adapter of model\.layers\.0\.self_attn\.o_proj"),
        ]:
            model.set_adapter(name)
            if engine.adapter is None:
                greedy(engine, model)
            else:
                with pytest.raises(ValueError, match=message):
                    engine.update_weights(model)
        assert torch.equal(base, kept), "a weight with an adapter took the place of the base's"
    finally:
        engine.close()


def test_merged_adapters_leave_no_trace(caplog):
    """An adapter on experts, which vLLM does not run, beside one on a linear and a module that is trained whole."""
    config = {"r": 4, "target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}
    model = adapted("qwen3_moe", config | {"modules_to_save": ["lm_head"]})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with caplog.at_level(logging.WARNING):
        engine = start(model)
    try:
        assert engine.adapter is None
        (line,) = [record.getMessage() for record in caplog.records if "its own copy" in record.getMessage()]
        assert "MiB): adapters are added to them: model.layers.0.mlp.experts: an adapter on a parameter" in line
        first = greedy(engine, model)
        (tensors,) = engine.llm.apply_model(lambda target: list(target.parameters()))
        values = [tensor.clone() for tensor in tensors]
        for seed in range(CYCLES):
            fill(model, seed)
            engine.update_weights(model)
        assert greedy(engine, model) != first
        fill(model, seed=1)
        assert greedy(engine, model) == first
        assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, values, strict=True))
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        adapted_bytes = sum(parameter.nbytes for name, parameter in before.items() if is_adapted(name))
        assert engine.copied_bytes == adapted_bytes
    finally:
        engine.close()


def is_adapted(name):
    return name.endswith(("experts.base_layer.down_proj", "q_proj.base_layer.weight"))


def test_why_merged():
    def why(config, family="llama", on_cpu=True, changes=None, **settings):
        model = adapted(family, config, **changes or {})
        return why_merged(model, {"dtype": torch.float32} | settings, on_cpu=on_cpu)

    untied = {"tie_word_embeddings": False}
    assert why({"target_modules": "all-linear"}) is None
    assert why({"target_modules": ["q_proj"], "bias": "all"}, family="qwen2") is None
    assert why({"target_modules": ["q_proj"], "r": 512}) is None
    assert why({"target_modules": ["q_proj"]}, enable_lora=True, max_num_seqs=2) is None
    assert why({"target_modules": ["q_proj"]}, dtype=torch.bfloat16, on_cpu=False) is None
    assert "the engine is float32" in why({"target_modules": ["q_proj"]}, on_cpu=False)
    assert "vllm_tensor_parallel_size" in why({"target_modules": ["q_proj"]}, tensor_parallel_size=2)
    assert "'enable_lora': False" in why({"target_modules": ["q_proj"]}, enable_lora=False)
    assert why({"target_modules": ["q_proj"], "r": 513}) == "rank 513 is more than vLLM takes"
    assert "layers.0.self_attn.q_proj: lora_bias=True" in why(
        {"target_modules": ["q_proj"], "lora_bias": True}, family="qwen2"
    )
    assert "embed_tokens: an adapter on a Embedding" in why({"target_modules": ["embed_tokens"]}, changes=untied)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=97, bos_token_id=0, eos_token_id=0))
    model = get_peft_model(gpt2, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    settings = {"dtype": torch.float32}
    assert why_merged(model, settings, on_cpu=True) == "vLLM's GPT2LMHeadModel does not support LoRA"
    # vLLM's own classes for images import more than its text models
    settings["model_impl"] = "transformers"
    assert why_merged(model, settings, on_cpu=True) is None
    vision = CLIPVisionConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1, image_size=8, patch_size=4
    )
    for targets, reason in [
        (r".*language_model.*q_proj", None),
        (r".*layers\.0.*q_proj", "vLLM adapts the language model only, not model.vision_tower.encoder.layers.0"),
    ]:
        llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=build("llama").config))
        model = get_peft_model(llava, LoraConfig(target_modules=targets))
        found = why_merged(model, settings, on_cpu=True)
        assert found == reason or found.startswith(reason)


def test_training_with_an_adapter(tmp_path):
    trainer = GRPOTrainer(
        model=make_model(seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1),
        reward_funcs=lambda completions, **kwargs: [len(set(text)) / 8 for text in completions],
        args=GRPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=8,
            learning_rate=1e-1,
            beta=0.1,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=5,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(10)]),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"),
    )
    try:
        trainer.train()
        lines = [line for line in trainer.state.log_history if "reward" in line]
        assert len(lines) == 3
        for line in lines:
            assert line["sampling/sampling_logp_difference/max"] < MAX_LOGP_DIFFERENCE
        assert lines[-1]["kl"] > 1e-5, "the policy did not leave its reference"
        engine = trainer.engine
        trainer.sync_engine()
        engine.adapter.check(trainer.model)
        assert engine.weights.copied_bytes == 0
        assert engine.copied_bytes == sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    finally:
        trainer.engine.close()
