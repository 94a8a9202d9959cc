import gc
import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_fast.batch import Sampling
from grpo_fast.generation.transformers_engine import TransformersEngine
from grpo_fast.generation.vllm_engine import VLLMEngine
from grpo_fast.generation.vllm_loader import load_every_parameter
from grpo_fast.generation.vllm_steps import vllm_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]

# fp32 engine against fp32 model: rounding of two orders of summation
LOGP_ATOL = 1e-4
# not a multiple of 64, so that vLLM pads its embedding and head
VOCAB = 100
EOS, SECOND_EOS, PAD = 2, 3, 0
MAX_TOKENS = 12


def tiny_model(*, tied, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
        # large enough that the distribution is far from uniform
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def char_tokenizer():
    vocab = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", "<end>", *map(chr, range(32, 32 + VOCAB - 4))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def prompts(count=8):
    generator = random.Random(0)
    return [[generator.randrange(4, VOCAB) for _ in range(generator.randrange(3, 40))] for _ in range(count)]


def perturb(model, scale=0.05):
    """An in-place change of every parameter, as an optimizer step makes it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def process_state():
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "seed": torch.initial_seed(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "precision": torch.get_float32_matmul_precision(),
        "default_dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "multiprocessing": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING"),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "affinity": os.sched_getaffinity(0),
    }


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request):
    model = tiny_model(tied=request.param)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = process_state()
    engine = VLLMEngine(
        model=model,
        # one of the two engines holds a tokenizer
        processing_class=char_tokenizer() if request.param else None,
        dtype=torch.float32,
        max_num_seqs=16,
        eos_token_ids=[EOS, SECOND_EOS],
        max_model_len=96,
        seed=11,
        sampling=Sampling(max_tokens=5, seed=3),
    )
    engine.changed = {name for name, value in process_state().items() if value != before[name]}
    yield model, engine
    engine.close()
    engine.close()
    gc.collect()


def greedy_by_transformers(model, rows, max_tokens=MAX_TOKENS):
    engine = TransformersEngine(model=model, pad_token_id=PAD, eos_token_ids=[EOS, SECOND_EOS])
    return engine.generate(rows, Sampling(max_tokens=max_tokens, temperature=0)).ids


def test_engine_lives_in_this_process(pair):
    _, engine = pair
    workers = engine._llm.collective_rpc(lambda worker: os.getpid())
    assert workers == [os.getpid()]
    assert psutil.Process().children(recursive=True) == []


def test_start_leaves_the_process_as_it_was(pair):
    _, engine = pair
    assert engine.changed == set()


def test_greedy_equals_transformers_before_and_after_an_update(pair):
    model, engine = pair
    rows, sampling = prompts(), Sampling(max_tokens=MAX_TOKENS, temperature=0)
    first = greedy_by_transformers(model, rows)
    assert engine.generate(rows, sampling).ids == first

    perturb(model)
    second = greedy_by_transformers(model, rows)
    assert second != first
    engine.update_weights(model)
    assert engine.generate(rows, sampling).ids == second


def test_update_reaches_the_embedding_and_the_head_alone(pair):
    model, engine = pair
    rows, sampling = prompts(), Sampling(max_tokens=MAX_TOKENS, temperature=0)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        before = greedy_by_transformers(model, rows)
        perturb(part, scale=0.2)
        engine.update_weights(model)
        expected = greedy_by_transformers(model, rows)
        assert expected != before
        assert engine.generate(rows, sampling).ids == expected


def test_cached_prefixes_of_old_weights_are_not_used(pair):
    model, engine = pair
    # two full blocks of 32 tokens, the only part of the prompt that vLLM caches
    rows, sampling = [[7, *range(4, 72)]], Sampling(max_tokens=4, temperature=0)
    engine.generate(rows, sampling)
    perturb(model, scale=0.2)
    engine.update_weights(model)
    after = engine.generate(rows, sampling)
    ids = torch.tensor([rows[0] + after.ids[0]])
    with torch.no_grad():
        logps = model(ids).logits[0, len(rows[0]) - 1 : -1].log_softmax(-1)
    expected = logps.gather(1, torch.tensor(after.ids[0])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(after.logps[0]), expected, rtol=0, atol=LOGP_ATOL)


def test_completions_come_in_the_order_of_the_prompts(pair):
    model, engine = pair
    # runs of several lengths, one prompt twice with another between, more rows than run at once
    a, b, c = prompts(3)
    rows = [a] * 8 + [b] * 3 + [a] * 2 + [c] * 12
    greedy = engine.generate(rows, Sampling(max_tokens=6, temperature=0))
    by_prompt = dict(zip(map(tuple, rows), greedy.ids, strict=True))
    assert greedy.ids == [by_prompt[tuple(row)] for row in rows]
    assert len(set(map(tuple, by_prompt.values()))) == 3

    sampled = engine.generate(rows, Sampling(max_tokens=6, seed=1))
    assert len(sampled.ids) == len(sampled.logps) == len(rows)
    for prompt, ids, logps in zip(rows, sampled.ids, sampled.logps, strict=True):
        with torch.no_grad():
            scored = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = scored.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=0, atol=LOGP_ATOL)


def test_seed_decides_the_samples_whatever_else_is_in_the_batch(pair):
    _, engine = pair
    a, b = prompts(2)
    sampling = Sampling(max_tokens=8, seed=4)
    alone = engine.generate([a] * 4, sampling).ids
    assert engine.generate([a] * 4 + [b] * 4, sampling).ids[:4] == alone
    assert engine.generate([a] * 4, Sampling(max_tokens=8, seed=5)).ids != alone
    assert len(set(map(tuple, alone))) > 1


def test_seeded_samples_of_two_groups_differ_and_leave_the_random_state_alone(pair):
    _, engine = pair
    a, b = prompts(2)
    state = torch.get_rng_state()
    ids = engine.generate([a] * 4 + [b] + [a] * 4, Sampling(max_tokens=8, temperature=2.0, seed=4)).ids
    assert set(map(tuple, ids[:4])).isdisjoint(map(tuple, ids[5:]))
    assert torch.equal(torch.get_rng_state(), state)


def test_unseeded_samples_follow_the_process_random_state(pair):
    _, engine = pair
    rows = [row for row in prompts(2) for _ in range(4)]
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(engine.generate(rows, Sampling(max_tokens=8)).ids)
    assert draws[0] == draws[1] != draws[2]
    assert engine.generate(rows, Sampling(max_tokens=8)).ids != draws[2]


def test_completions_stop_at_max_tokens_or_keep_the_end_token(pair):
    _, engine = pair
    rows = [row for row in prompts(4) for _ in range(16)]
    ids = engine.generate(rows, Sampling(max_tokens=MAX_TOKENS, temperature=2.0, seed=1)).ids
    ended = [row for row in ids if row[-1] in (EOS, SECOND_EOS)]
    assert {row[-1] for row in ended} == {EOS, SECOND_EOS}
    assert all(len(row) == MAX_TOKENS for row in ids if row not in ended)
    assert all(token not in (EOS, SECOND_EOS) for row in ids for token in row[:-1])


def test_extra_wins_over_the_fields(pair):
    _, engine = pair
    sampling = Sampling(max_tokens=8, seed=1, extra={"max_tokens": 3, "seed": 2, "ignore_eos": True})
    first = engine.generate(prompts(2), sampling).ids
    assert max(map(len, first)) == 3
    assert engine.generate(prompts(2), Sampling(max_tokens=3, seed=2)).ids == first


def test_stop_strings_need_an_engine_with_a_tokenizer(pair):
    model, engine = pair
    sampling = Sampling(max_tokens=32, temperature=2.0, seed=1, extra={"stop": ["!"]})
    rows = [prompts(1)[0]] * 16
    if not model.config.tie_word_embeddings:
        with pytest.raises(ValueError, match=r"\['stop'\] need an engine with a tokenizer"):
            engine.generate(rows, sampling)
        return
    stop = char_tokenizer().convert_tokens_to_ids("!")
    ids = engine.generate(rows, sampling).ids
    assert any(row[-1] == stop for row in ids)
    assert all(stop not in row[:-1] for row in ids)


@pytest.mark.parametrize("option", ["n", "tpo_p"])
def test_unknown_option_is_named(pair, option):
    with pytest.raises(ValueError, match=f"does not know: {option}"):
        pair[1].generate(prompts(1), Sampling(max_tokens=4, extra={option: 2}))


def test_overlong_prompt_is_named_and_completions_end_with_the_context(pair):
    _, engine = pair
    with pytest.raises(ValueError, match="prompt 1 has 96 tokens, the engine's context holds 96"):
        engine.generate([[5], [5] * 96], Sampling(max_tokens=4))
    ids = engine.generate([[5] * 94], Sampling(max_tokens=4, extra={"ignore_eos": True, "stop_token_ids": []})).ids
    assert len(ids[0]) == 2


def test_engine_s_own_sampling_decides_until_it_is_changed(pair):
    _, engine = pair
    own = engine.sampling
    assert engine.generate(prompts(2)).ids == engine.generate(prompts(2), own).ids
    engine.sampling = Sampling(max_tokens=2, temperature=0)
    assert max(len(row) for row in engine.generate(prompts(2)).ids) <= 2
    engine.sampling = None
    with pytest.raises(ValueError, match="sampling must be given"):
        engine.generate(prompts(2))
    engine.sampling = own


def test_logps_that_were_not_asked_for_are_none(pair):
    _, engine = pair
    drawn = engine.generate(prompts(2), Sampling(max_tokens=3, extra={"logprobs": None}))
    assert drawn.logps is None
    assert all(drawn.ids)


def test_no_prompts_give_no_completions(pair):
    completions = pair[1].generate([], Sampling(max_tokens=4))
    assert (completions.ids, completions.logps) == ([], [])


def test_parameters_that_no_weight_reaches_are_named(pair):
    model, engine = pair
    shared = {name: parameter.clone() for name, parameter in model.named_parameters()}
    other = tiny_model(tied=model.config.tie_word_embeddings, seed=1)

    class Partial(torch.nn.Module):
        """A model without one part of a fused weight."""

        def named_parameters(self, *args, **kwargs):
            return ((n, p) for n, p in other.named_parameters() if n != "model.layers.1.self_attn.k_proj.weight")

    with pytest.raises(
        ValueError, match=r"leave parameters of .* unset.*model\.layers\.1\.self_attn\.qkv_proj\.weight"
    ):
        engine._llm.apply_model(lambda target: load_every_parameter(target, Partial()))
    model.load_state_dict(shared, strict=False)
    engine.update_weights(model)


def test_trainer_still_gets_gradients(pair):
    model, _ = pair
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tensor_parallel_size": 2},
            r"vllm_tensor_parallel_size must divide the number of processes \(1, .*is 2",
        ),
        (
            {"vllm_engine_kwargs": {"tensor_parallel_size": 2}},
            r"\['tensor_parallel_size'\]: .*_tensor_parallel_size alone",
        ),
        ({"vllm_engine_kwargs": {"quantization": "fp8"}}, r"vllm_engine_kwargs must not hold \['quantization'\]"),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(
            model=tiny_model(tied=True),
            processing_class=None,
            dtype=torch.float32,
            max_num_seqs=1,
            eos_token_ids=[EOS],
            **settings,
        )


def test_images_are_given_as_vllm_takes_them():
    assert vllm_prompt([1], None) == {"prompt_token_ids": [1]}
    assert vllm_prompt([1], []) == {"prompt_token_ids": [1]}
    assert vllm_prompt([1], ["a"]) == {"prompt_token_ids": [1], "multi_modal_data": {"image": "a"}}
    assert vllm_prompt([1], ["a", "b"])["multi_modal_data"] == {"image": ["a", "b"]}


def test_the_end_frees_the_process_group_and_another_engine_can_start():
    script = """
        import atexit
        import torch
        from grpo_fast.batch import Sampling
        from grpo_fast.generation.vllm_engine import VLLMEngine
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(2)
        config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=2, max_position_embeddings=64)
        for _ in range(2):
            model = LlamaForCausalLM(config)
            engine = VLLMEngine(
                model=model, processing_class=None, dtype=torch.bfloat16, max_num_seqs=2, eos_token_ids=[2]
            )
            assert torch.get_num_threads() == 2
            assert len(engine.generate([[5, 6]] * 2, Sampling(max_tokens=4, seed=0)).ids) == 2
            engine.close()
            engine.close()
            assert not torch.distributed.is_initialized()
        torch.set_num_threads(1)
        assert torch.get_num_threads() == 1
        # handlers run in the reverse order: this one after the engine's own
        atexit.register(lambda: print("at exit:", torch.distributed.is_initialized()))
        engine = VLLMEngine(
            model=model, processing_class=None, dtype=torch.bfloat16, max_num_seqs=2, eos_token_ids=[2]
        )
    """
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "at exit: False" in result.stdout
