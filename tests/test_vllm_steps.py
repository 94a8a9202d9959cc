"""Requests that are stepped by hand: the completions of `LLM.generate`, known early; and the bar that shows them."""

import re
from itertools import pairwise

import pytest
import torch

from grpo_fast.batch import Sampling
from grpo_fast.generation import VLLMEngine, progress, vllm_steps
from grpo_fast.generation.transformers_engine import TransformersEngine
from grpo_fast.generation.vllm_steps import completions_of, drawn, vllm_prompt
from tests.tiny_lm import make_model, make_tokenizer

pytestmark = pytest.mark.vllm

# many, so that completions end at different lengths
ENDS = [1, *range(20, 28)]
A, B, C = [5, 9, 4], [7, 8], [11, 12, 13, 14]
# one prompt twice with another between, a lone row, more rows than run at once
ROWS = [A] * 4 + [B] + [A] * 4 + [C] * 3
RUNS = {0: 4, 4: 1, 5: 4, 9: 3}
SAMPLINGS = {
    "seeded": Sampling(max_tokens=12, seed=4),
    "unseeded": Sampling(max_tokens=12),
    "greedy": Sampling(max_tokens=12, temperature=0.0),
}


@pytest.fixture(scope="module")
def model():
    # vLLM's CPU attention takes heads of 32 and wider
    return make_model(seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def engine(model):
    engine = VLLMEngine(
        model=model,
        processing_class=make_tokenizer(),
        dtype=torch.float32,
        max_num_seqs=5,
        eos_token_ids=ENDS,
        seed=11,
    )
    yield engine
    engine.close()


def by_vllm(engine, sampling):
    """The completions that `LLM.generate` draws for `ROWS`."""
    prompts = [A, B, A, C]
    sizes = list(RUNS.values())
    params = [engine._sampling_params(sampling, i, size) for i, size in enumerate(sizes)]
    return completions_of(engine.llm.generate([vllm_prompt(p, None) for p in prompts], params, use_tqdm=False), sizes)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_completions_are_those_of_llm_generate(engine, sampling):
    torch.manual_seed(1)
    expected = by_vllm(engine, sampling)
    torch.manual_seed(1)
    completions = engine.generate(ROWS, sampling)
    assert completions == expected
    assert len({len(ids) for ids in completions.ids}) > 1, "requests that end together would prove less"


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_groups_are_told_once_each_while_others_are_decoded(engine, sampling):
    told, is_decoding = {}, []

    def on_group(first_row, ids):
        assert first_row not in told
        told[first_row] = ids
        is_decoding.append(engine.llm.llm_engine.has_unfinished_requests())

    completions = engine.generate(ROWS, sampling, on_group=on_group)
    assert told == {first: completions.ids[first : first + size] for first, size in RUNS.items()}
    # the last may end in the same step as the one before it
    assert is_decoding[0]
    assert not is_decoding[-1]


def test_transformers_tells_of_all_groups_at_the_end(model):
    told = {}
    engine = TransformersEngine(model=model, pad_token_id=0, eos_token_ids=ENDS)
    completions = engine.generate(ROWS, SAMPLINGS["seeded"], on_group=told.__setitem__)
    assert told == {first: completions.ids[first : first + size] for first, size in RUNS.items()}
    assert list(told) == list(RUNS)


def test_an_error_of_the_listener_leaves_nothing_in_the_engine(engine):
    def fail(first_row, ids):
        raise ValueError("in the callback")

    expected = engine.generate(ROWS, SAMPLINGS["seeded"])
    with pytest.raises(ValueError, match="in the callback"):
        engine.generate(ROWS, SAMPLINGS["seeded"], on_group=fail)
    inner = engine.llm.llm_engine
    assert not inner.has_unfinished_requests()
    assert not inner.output_processor.parent_requests
    assert not inner.engine_core.engine_core.scheduler.has_unfinished_requests()
    assert engine.generate(ROWS, SAMPLINGS["seeded"]) == expected


def test_completions_of_a_request_are_ordered_and_greedy_ones_repeated():
    class Completion:
        def __init__(self, index):
            self.index = index

    class Output:
        def __init__(self, *indices):
            self.outputs = [Completion(index) for index in indices]

    assert [completion.index for completion in drawn(Output(2, 0, 1), 3)] == [0, 1, 2]
    assert [completion.index for completion in drawn(Output(0), 3)] == [0, 0, 0]


# -- the bar -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shows(engine, monkeypatch):
    """The engine with a bar that is due at every step."""
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    monkeypatch.setattr(engine, "_shows_progress", True)
    return engine


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_bar_counts_completions_and_tokens(shows, sampling, monkeypatch):
    seen = []

    class Bar(progress.GenerationBar):
        def __init__(self, total, *, is_shown):
            super().__init__(total, is_shown=is_shown)
            self.total = total

        def show(self, done, num_tokens):
            seen.append((done, num_tokens, self.total))
            super().show(done, num_tokens)

    monkeypatch.setattr(vllm_steps, "GenerationBar", Bar)
    ids = shows.generate(ROWS, sampling).ids
    if sampling.temperature == 0:
        # greedy completions of a prompt are drawn once
        ids = [ids[first] for first in RUNS]
    assert {total for *_, total in seen} == {len(ids)}
    assert seen[-1][:2] == (len(ids), sum(map(len, ids)))
    assert seen == sorted(seen)
    # tokens of completions that are not done count
    assert any(done == before and num_tokens > less for (before, less, _), (done, num_tokens, _) in pairwise(seen))


def test_the_bar_is_written_to_stderr_and_wiped(shows, capsys):
    shows.generate(ROWS, SAMPLINGS["seeded"])
    written = capsys.readouterr()
    assert not written.out
    lines = written.err.split("\r")
    rates = [re.search(r"vLLM: +\d+%\|.*\| (\d+)/12 completions \[\d+:\d+, (\d+) tokens/s\]", line) for line in lines]
    shown = [(int(match[1]), int(match[2])) for match in rates if match]
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert shown[-1][0] == 12
    assert shown[-1][1] > 0
    assert lines[-2].strip() == lines[-1] == ""


def test_a_short_generation_leaves_nothing_in_a_log_file(engine, monkeypatch, capsys):
    monkeypatch.setattr(engine, "_shows_progress", True)
    engine.generate(ROWS, SAMPLINGS["seeded"])
    assert capsys.readouterr() == ("", "")


def test_no_bar_unless_asked_for(engine, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    engine.generate(ROWS, SAMPLINGS["seeded"])
    assert capsys.readouterr() == ("", "")
