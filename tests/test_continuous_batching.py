import copy
import types

import pytest
import torch
from transformers import GenerationConfig, ProcessorMixin
from transformers.generation import ContinuousBatchingConfig

from grpo_fast.batch import Sampling
from grpo_fast.generation.continuous_batch import ContinuousBatch
from grpo_fast.generation.transformers_engine import TransformersEngine
from tests.tiny_lm import make_model

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9, 10, 11, 12], [13]]
GREEDY = Sampling(max_tokens=8, temperature=0)


def engine_of(model, *, batching=None, **changes):
    return TransformersEngine(
        model=model, pad_token_id=PAD, eos_token_ids=[EOS], batching=batching or ContinuousBatch(), **changes
    )


def test_greedy_equals_one_padded_generate():
    model = make_model(seed=2)
    padded = TransformersEngine(model=model, pad_token_id=PAD, eos_token_ids=[EOS]).generate(PROMPTS, GREEDY)
    drawn = engine_of(model).generate(PROMPTS, GREEDY)
    assert drawn.ids == padded.ids
    assert drawn.logps is None
    assert len(set(map(len, drawn.ids))) > 1


def test_weights_and_modes_stay_as_they_were():
    model = make_model(seed=2).train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attention = model.config._attn_implementation
    engine_of(model, batching=ContinuousBatch(dtype=torch.bfloat16)).generate(PROMPTS, GREEDY)
    after = model.state_dict()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], t) for name, t in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("fp32_head", [False, True])
def test_samples_in_the_wanted_precision(fp32_head):
    model = make_model(seed=2)
    seen = []
    model.lm_head.register_forward_pre_hook(
        lambda m, args: (seen.append(m.weight.dtype), args[0].to(m.weight.dtype))[1]
    )
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(m.mlp.up_proj.weight.dtype))
    batching = ContinuousBatch(dtype=torch.bfloat16, fp32_head=fp32_head)
    ids = engine_of(model, batching=batching).generate(PROMPTS, GREEDY).ids
    assert set(seen) == ({torch.bfloat16, torch.float32} if fp32_head else {torch.bfloat16})
    if not fp32_head:
        assert ids == engine_of(copy.deepcopy(model).bfloat16()).generate(PROMPTS, GREEDY).ids


def test_model_in_the_wanted_precision_is_not_copied():
    model = make_model().bfloat16()
    models = []
    generate_batch = model.generate_batch
    model.generate_batch = lambda *args, **kwargs: (models.append(model), generate_batch(*args, **kwargs))[1]
    engine_of(model, batching=ContinuousBatch(dtype=torch.bfloat16)).generate(PROMPTS, GREEDY)
    assert models == [model]


def test_samples_are_those_of_generate_batch_for_equal_seeds():
    model = make_model(seed=2).eval()
    config = GenerationConfig(
        max_new_tokens=8, do_sample=True, temperature=0.8, top_p=0.9, top_k=12, pad_token_id=PAD, eos_token_id=[EOS]
    )
    torch.manual_seed(4)
    options = ContinuousBatchingConfig(num_blocks=8)
    outputs = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=options)
    engine = engine_of(model, sampling=Sampling(max_tokens=8, temperature=0.8, top_p=0.9, top_k=12))
    torch.manual_seed(4)
    ids = engine.generate(PROMPTS).ids
    assert ids == [output.generated_tokens for output in outputs.values()]
    assert len(set(map(tuple, ids))) > 2
    seeded = Sampling(max_tokens=8, seed=7)
    state = torch.get_rng_state()
    assert engine.generate(PROMPTS, seeded).ids == engine.generate(PROMPTS, seeded).ids
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_take_part():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(seed=2), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    base = engine_of(model, batching=ContinuousBatch(dtype=torch.bfloat16)).generate(PROMPTS, GREEDY).ids
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    ids = engine_of(model).generate(PROMPTS, GREEDY).ids
    assert ids != base
    merged = copy.deepcopy(model).merge_and_unload()
    assert ids == engine_of(merged).generate(PROMPTS, GREEDY).ids


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(make_model(), config)
    with pytest.raises(ValueError, match="prompt-learning adapter"):
        engine_of(model).generate(PROMPTS, GREEDY)


def test_half_of_the_free_memory_is_the_default():
    model = make_model()
    seen = []

    def generate_batch(prompts, continuous_batching_config, **kwargs):
        seen.append(continuous_batching_config)
        return {i: types.SimpleNamespace(generated_tokens=[EOS], error=None) for i in range(len(prompts))}

    model.generate_batch = generate_batch
    for options in ({}, {"max_memory_percent": 0.2, "page_size": 16, "num_blocks": 3}):
        engine_of(model, batching=ContinuousBatch(options=options)).generate(PROMPTS, GREEDY)
    assert [config.max_memory_percent for config in seen] == [0.5, 0.2]
    # on a CPU the cache holds these prompts
    assert [(config.page_size, config.num_blocks) for config in seen] == [(256, 8), (16, 3)]


def test_processor_that_would_be_dropped_is_named():
    engine = engine_of(make_model())
    with pytest.raises(ValueError, match="cannot apply RepetitionPenaltyLogitsProcessor"):
        engine.generate(PROMPTS, Sampling(max_tokens=4, repetition_penalty=1.2))


def test_unfinished_completions_are_an_error():
    model = make_model()
    model.generate_batch = lambda *args, **kwargs: {"req_0": types.SimpleNamespace(generated_tokens=[5], error=None)}
    with pytest.raises(RuntimeError, match="finished 1 of 4 completions"):
        engine_of(model).generate(PROMPTS, GREEDY)
    failed = types.SimpleNamespace(generated_tokens=[], error="no room")
    model.generate_batch = lambda prompts, **kwargs: dict.fromkeys(range(len(prompts)), failed)
    with pytest.raises(RuntimeError, match="finished 0 of 4 completions: no room"):
        engine_of(model).generate(PROMPTS, GREEDY)


def test_unknown_option_and_images_are_refused():
    with pytest.raises(ValueError, match=r"transformers_continuous_batching_config has entries.*: num_block$"):
        ContinuousBatch(options={"num_block": 3})
    with pytest.raises(ValueError, match="takes text only; the prompts have pixel_values"):
        engine_of(make_model()).generate(PROMPTS, GREEDY, multimodal_fields={"pixel_values": torch.zeros(4, 1)})


def test_processor_is_refused(tmp_path):
    from grpo_fast import GRPOConfig
    from grpo_fast.generation import make_engine

    processor = object.__new__(ProcessorMixin)
    processor.tokenizer = types.SimpleNamespace(pad_token_id=PAD, bos_token_id=None)
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", use_transformers_continuous_batching=True
    )
    with pytest.raises(ValueError, match="use_transformers_continuous_batching=True takes text only"):
        make_engine(make_model(), processor, args, eos_token_ids=[EOS], context=torch.inference_mode, seed=0)
