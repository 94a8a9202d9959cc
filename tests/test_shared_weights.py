"""The policy's parameters are the engine's memory: an optimizer step is the update, for every family."""

import pytest
import torch

from grpo_fast.batch import Sampling
from grpo_fast.generation.transformers_engine import TransformersEngine
from grpo_fast.generation.vllm_engine import VLLMEngine
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
