"""Whatever shapes vLLM's samples, it reports the policy's log-probs: an unchanged policy's importance ratio is 1."""

import types

import pytest
import torch

from grpo_fast.batch import Runs, Sampling
from grpo_fast.generation.vllm_engine import VLLMEngine
from grpo_fast.generation.vllm_generation import VLLMGeneration
from grpo_fast.generation.vllm_sampler import _second_runner_sampler, report_policy_logps
from grpo_fast.importance import Correction, sampler_weights
from tests.tiny_lm import CHARACTERS, make_model, make_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]

# fp32 engine against fp32 model: rounding of two orders of summation
LOGP_ATOL = 1e-4
TEMPERATURE = 0.7
PROMPTS = [[5, 6, 7]] * 4 + [[20, 9, 30, 31, 8, 12]] * 4
DIGITS = [i for i, character in enumerate(CHARACTERS, start=3) if character.isdigit()]


@pytest.fixture(scope="module")
def pair():
    # 32 is the smallest head that vLLM's CPU attention takes
    model = make_model(seed=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    engine = VLLMEngine(
        model=model,
        processing_class=make_tokenizer(),
        dtype=torch.float32,
        max_num_seqs=8,
        eos_token_ids=[1],
        max_model_len=64,
        sampling=Sampling(max_tokens=6, temperature=TEMPERATURE, seed=5),
    )
    yield model, engine
    engine.close()


def logits_of(model, prompt, ids):
    """The logits that predict `ids`, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]


def policy_logps(model, prompt, ids, temperature=TEMPERATURE):
    return (logits_of(model, prompt, ids) / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


SHAPES = {
    "temperature": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.3},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence penalty, logit bias": {"extra": {"presence_penalty": 1.0, "logit_bias": {4: 5.0}}},
    "allowed tokens, minimum length": {"extra": {"allowed_token_ids": [1, *DIGITS], "min_tokens": 4}},
    "bad words": {"extra": {"bad_words": ["a", "b", "7"]}},
    "structured outputs": {"extra": {"structured_outputs": {"regex": "[0-9]{4}"}}},
    "all at once, unseeded": {"top_k": 8, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8, "seed": None},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ratio_of_an_unchanged_policy_is_one(pair, shape):
    model, engine = pair
    sampling = Sampling(**{"max_tokens": 8, "temperature": TEMPERATURE, "seed": 3} | shape)
    drawn = engine.generate(PROMPTS, sampling)
    trainer = torch.cat([policy_logps(model, *row) for row in zip(PROMPTS, drawn.ids, strict=True)])
    sampler = torch.tensor([logp for row in drawn.logps for logp in row])
    runs = Runs.of(tuple(len(ids) for ids in drawn.ids), trainer.device)
    torch.testing.assert_close(sampler, trainer, rtol=0, atol=LOGP_ATOL)
    for mode in ("token_truncate", "sequence_mask"):
        correction = Correction(mode=mode, clip_min=None, clip_max=3.0)
        ratios = sampler_weights(trainer - sampler, runs, correction).ratios
        # a row's ratio is a product over its tokens
        torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=8 * LOGP_ATOL)


def test_samples_still_come_from_the_truncated_support(pair):
    model, engine = pair
    drawn = engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=2.0, top_k=3, seed=1))
    ranks = []
    for prompt, ids in zip(PROMPTS, drawn.ids, strict=True):
        order = logits_of(model, prompt, ids).argsort(dim=-1, descending=True)
        ranks += (order == torch.tensor(ids)[:, None]).int().argmax(dim=-1).tolist()
    assert set(ranks) == {0, 1, 2}


def test_greedy_reports_the_policy_without_temperature(pair):
    model, engine = pair
    drawn = engine.generate(PROMPTS[:1], Sampling(max_tokens=8, temperature=0))
    expected = policy_logps(model, PROMPTS[0], drawn.ids[0], temperature=1.0)
    torch.testing.assert_close(torch.tensor(drawn.logps[0]), expected, rtol=0, atol=LOGP_ATOL)


def test_each_request_has_its_own_temperature_in_direct_calls(pair):
    from vllm import SamplingParams

    model, engine = pair
    llm = VLLMGeneration(engine, policy=lambda: model).llm
    temperatures = [0.5, 1.0, 1.7, 0.0]
    requests = [SamplingParams(temperature=t, top_k=4, max_tokens=6, logprobs=2, seed=1) for t in temperatures]
    outputs = llm.generate([{"prompt_token_ids": PROMPTS[0]}] * 4, requests, use_tqdm=False)
    for output, temperature in zip(outputs, temperatures, strict=True):
        ids = list(output.outputs[0].token_ids)
        logps = (logits_of(model, PROMPTS[0], ids) / (temperature or 1.0)).log_softmax(-1)
        for position, reported in enumerate(output.outputs[0].logprobs):
            assert len(reported) >= 2
            for token, entry in reported.items():
                assert entry.logprob == pytest.approx(logps[position, token].item(), abs=LOGP_ATOL)


def test_prompt_logps_are_untouched(pair):
    from vllm import SamplingParams

    model, engine = pair
    prompt = [5, 6, 7, 8]
    params = SamplingParams(temperature=0.5, max_tokens=2, prompt_logprobs=0, logprobs=0)
    output = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
    expected = policy_logps(model, prompt[:1], prompt[1:], temperature=1.0)
    reported = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    torch.testing.assert_close(torch.tensor(reported), expected, rtol=0, atol=LOGP_ATOL)


def test_structured_outputs_hold_completions_to_the_regex(pair, monkeypatch):
    from vllm.sampling_params import StructuredOutputsParams

    _, engine = pair
    tokenizer = make_tokenizer()

    def texts(extra):
        ids = engine.generate(PROMPTS, Sampling(max_tokens=8, seed=1, extra=extra)).ids
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    for value in ({"regex": "[0-9]{3}"}, StructuredOutputsParams(regex="[0-9]{3}")):
        drawn = texts({"structured_outputs": value})
        assert all(len(text) == 3 and text.isdigit() for text in drawn)
        assert len(set(drawn)) > 1
    # vllm_structured_outputs_regex
    monkeypatch.setattr(engine, "_structured_outputs_regex", "[x-z]{2}")
    assert all(len(text) == 2 and set(text) <= set("xyz") for text in texts({"structured_outputs": {"regex": "a"}}))


def test_face_gives_trl_s_four_lists_and_settings(pair):
    model, engine = pair
    face = VLLMGeneration(engine, policy=lambda: model)
    assert (face.mode, face.temperature, face.max_completion_length) == ("colocate", TEMPERATURE, 6)
    prompts, ids, logps, tokens = face.generate(PROMPTS, None, 4)
    assert prompts == PROMPTS
    drawn = engine.generate(PROMPTS)
    assert ids == drawn.ids
    assert logps == [[[logp] for logp in row] for row in drawn.logps]
    assert tokens == [[[token] for token in row] for row in ids]
    before = engine.sampling
    face.max_completion_length, face.top_k = 2, 1
    assert max(map(len, engine.generate(PROMPTS).ids)) <= 2
    assert len(set(map(tuple, engine.generate(PROMPTS[:4]).ids))) == 1
    engine.sampling = before


def test_sampler_of_the_second_model_runner_returns_the_policy_s_logits():
    # vLLM's own needs a GPU; this has what its `__call__` reads log-probs from, with requests 1 and 0 in the rows
    class Sampler:
        sampling_states = types.SimpleNamespace(temperature=types.SimpleNamespace(gpu=torch.tensor([0.5, 0.0])))

        def sample(self, logits, request_of_row, *rest):
            return torch.tensor([2, 1]), logits.masked_fill_(logits < 1, -torch.inf)

    sampler = _second_runner_sampler(Sampler)()
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, -1.0]], dtype=torch.bfloat16)
    sampler.unmasked = logits.clone()
    masked = logits.index_fill(1, torch.tensor([0]), -torch.inf)
    sampled, policy = sampler.sample(masked, torch.tensor([1, 0]), "rest")
    assert sampled.tolist() == [2, 1]
    torch.testing.assert_close(policy, torch.tensor([[0.0, 1.0, 2.0], [4.0, 6.0, -2.0]]), rtol=0, atol=0)
    assert sampler.unmasked is None


def test_unknown_sampler_is_left_alone_with_a_warning(caplog):
    sampler = types.SimpleNamespace()
    report_policy_logps(types.SimpleNamespace(model_runner=types.SimpleNamespace(sampler=sampler)))
    assert "vLLM samples with SimpleNamespace, which is not known here" in caplog.text
    assert vars(sampler) == {}


def test_direct_calls_see_the_weights_after_a_sync(pair):
    from vllm import SamplingParams

    model, engine = pair
    face = VLLMGeneration(engine, policy=lambda: model)
    params = SamplingParams(temperature=0, max_tokens=8)
    prompt = {"prompt_token_ids": PROMPTS[0]}
    before = list(face.llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = engine_greedy(model, PROMPTS[0])
    assert expected != before
    face.sync_weights()
    assert list(face.llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids) == expected
    # text in, text out, as rollout functions do it
    output = face.llm.generate(["ab="], params, use_tqdm=False)[0].outputs[0]
    assert output.text == make_tokenizer().decode(output.token_ids, skip_special_tokens=True)


def engine_greedy(model, prompt, length=8):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == 1:
                break
    return ids[len(prompt) :]
