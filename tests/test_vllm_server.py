"""Server mode against a real vLLM server process: the trainer's weights in it, its log-probs the trainer's."""

import functools
import math
import socket
import time

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.batch import Sampling
from grpo_fast.generation import VLLMServer
from grpo_fast.generation.vllm_server import _check_choices
from grpo_fast.generation.vllm_transfer import _NCCL
from tests.processes import launch_text
from tests.test_trainer_vllm import GREEDY, MAX_LOGP_DIFFERENCE, PROMPTS, CompareEngines, greedy_by_transformers
from tests.tiny_lm import make_model, make_tokenizer
from tests.vllm_servers import free_port, kill, vllm_server

pytestmark = [
    pytest.mark.vllm,
    # what vLLM's server imports beyond its engine
    pytest.mark.skipif("not all(map(__import__('importlib').util.find_spec, ('vllm', 'uvicorn', 'watchfiles')))"),
]

# vLLM's CPU attention takes heads of 32 and wider; a tied head is the one that vLLM's own reload leaves stale on a CPU
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
EOS = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # other weights than any trainer's: what agrees was transferred
    make_model(seed=99, **SHAPE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with vllm_server(str(folder), folder / "log") as started:
        yield started


@pytest.fixture(scope="module")
def url(server):
    return server[0]


def make_trainer(folder, url, *, callbacks=(), model=None, **settings):
    return GRPOTrainer(
        model=model or make_model(seed=3, **SHAPE),
        reward_funcs=lambda completions, **kwargs: [len(set(text)) / 8 for text in completions],
        args=GRPOConfig(
            str(folder),
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=url,
            vllm_server_timeout=5,
            vllm_group_port=free_port(),
            **{
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 8,
                "learning_rate": 3e-2,
                "max_steps": 3,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "seed": 5,
            }
            | settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(10)]),
        processing_class=make_tokenizer(),
        callbacks=list(callbacks),
    )


def make_engine(url, model=None, **kwargs):
    return VLLMServer(
        model=model or make_model(seed=7, **SHAPE),
        base_url=url,
        eos_token_ids=[EOS],
        timeout_s=5,
        group_port=free_port(),
        **kwargs,
    )


@pytest.fixture(scope="module")
def engine(url):
    model = make_model(seed=7, **SHAPE)
    engine = make_engine(url, model)
    engine.update_weights(model)
    yield functools.partial(check_logps, model), engine
    engine.close()
    engine.close()


def check_logps(model, prompts, drawn):
    """The log-probs are the model's own, of the whole vocabulary at temperature 1."""
    assert len(drawn.ids) == len(drawn.logps) == len(prompts)
    for prompt, ids, logps in zip(prompts, drawn.ids, drawn.logps, strict=True):
        with torch.no_grad():
            scored = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = scored.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), expected, rtol=0, atol=MAX_LOGP_DIFFERENCE)


def test_without_a_server_the_url_is_named_in_time():
    url = f"http://127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=f"no vLLM server is up at {url} after 1 s"):
        VLLMServer(model=make_model(), base_url=url, eos_token_ids=[EOS], timeout_s=1)
    assert time.monotonic() - start < 3


CHOICE = {"finish_reason": "length", "token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0]}}


@pytest.mark.parametrize(
    ("changed", "wanted", "message"),
    [
        ({}, 3, "cut a completion at 2 of 3 tokens: start it with --generation-config vllm"),
        ({"finish_reason": "abort"}, 2, "ended a completion with 'abort'"),
        ({"logprobs": {"token_logprobs": [-1.0, math.nan]}}, 2, "log-prob of token 1 of a completion is nan"),
        ({"logprobs": {"token_logprobs": [None, -2.0]}}, 2, "log-prob of token 0 of a completion is None"),
    ],
)
def test_replies_that_are_not_what_was_asked_for_are_refused(changed, wanted, message):
    _check_choices([CHOICE], 1, 2)
    with pytest.raises(RuntimeError, match=message):
        _check_choices([CHOICE | changed], 1, wanted)
    with pytest.raises(RuntimeError, match="gave 1 completions of a prompt where 2 were asked for"):
        _check_choices([CHOICE], 2, 2)


def test_the_server_follows_every_step_of_a_run(tmp_path, url):
    compare = CompareEngines()
    trainer = compare.trainer = make_trainer(tmp_path, url, callbacks=[compare])
    trainer.train()
    assert len(compare.outputs) == 3
    assert compare.outputs[0] != compare.outputs[-1], "the policy did not move: equal outputs would prove nothing"
    lines = [line for line in trainer.state.log_history if "reward" in line]
    assert len(lines) == 3
    for line in lines:
        assert line["sampling/sampling_logp_difference/max"] < MAX_LOGP_DIFFERENCE
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert line["time/sync"] > 0
    face = trainer.vllm_generation
    assert (face.mode, face.vllm_client.base_url) == ("server", url)
    with pytest.raises(AttributeError, match="has no llm in this process"):
        _ = face.llm
    trainer.engine.close()


def test_completions_keep_their_places_and_their_log_probs_are_the_policys_whatever_shapes_them(engine):
    check, engine = engine
    a, b = PROMPTS[0], PROMPTS[2]
    prompts = [a] * 4 + [b] * 3 + [a] * 2
    drawn = engine.generate(prompts, Sampling(max_tokens=8, seed=1))
    check(prompts, drawn)
    assert len(set(map(tuple, drawn.ids[:4]))) > 1
    # as the sampler used them they would be of the two tokens that it kept
    check(prompts, engine.generate(prompts, Sampling(max_tokens=8, seed=1, top_k=2)))


def test_the_seed_decides_the_samples_whatever_else_is_asked_for(engine):
    _, engine = engine
    a, b = PROMPTS[0], PROMPTS[2]
    hot = Sampling(max_tokens=8, temperature=2.0, seed=4)
    alone = engine.generate([a] * 4, hot).ids
    ids = engine.generate([a] * 4 + [b] + [a] * 4, hot).ids
    assert ids[:4] == alone
    assert set(map(tuple, alone)).isdisjoint(map(tuple, ids[5:]))


def test_an_update_reaches_every_parameter_and_leaves_no_prefix_of_the_old_ones(engine):
    _, engine = engine
    # a full block of 32 tokens, the only part of the prompt that vLLM caches
    rows = [[7, *range(4, 42)]] * 2
    model = make_model(seed=8, **SHAPE)
    engine.update_weights(model)
    check_logps(model, rows, engine.generate(rows, Sampling(max_tokens=4, seed=1)))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
        engine.update_weights(model)
        check_logps(model, rows, engine.generate(rows, Sampling(max_tokens=4, seed=1)))


def test_adapters_arrive_merged(engine):
    from peft import LoraConfig, get_peft_model

    _, engine = engine
    model = make_model(seed=7, **SHAPE)
    own = greedy_by_transformers(model)
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False))
    # its weights have other names
    engine._described = None
    engine.update_weights(peft)
    expected = greedy_by_transformers(peft)
    assert engine.generate(PROMPTS, GREEDY).ids == expected != own
    engine._described = None


def test_completions_end_at_the_end_token_at_max_tokens_or_with_the_context(engine):
    _, engine = engine
    rows = [PROMPTS[0]] * 16
    ids = engine.generate(rows, Sampling(max_tokens=16, temperature=2.0, seed=1)).ids
    assert {row[-1] for row in ids if len(row) < 16} == {EOS}
    assert all(EOS not in row[:-1] for row in ids)
    extra = {"ignore_eos": True, "stop_token_ids": []}
    assert len(engine.generate([[5] * 62], Sampling(max_tokens=4, extra=extra)).ids[0]) == 2
    assert engine.generate([], Sampling(max_tokens=4)).ids == []


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([[5], []], {}, "prompt 1 has no tokens"),
        ([[5], [5] * 64], {}, "prompt 1 has 64 tokens, the engine's context holds 64"),
        ([[5]], {"extra": {"tpo_p": 1}}, "does not know: tpo_p"),
        ([[5]], {"extra": {"n": 2}}, "does not know: n"),
    ],
)
def test_what_cannot_be_asked_for_is_named(engine, prompts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        engine[1].generate(prompts, Sampling(max_tokens=4, **kwargs))


def test_images_are_refused(engine):
    with pytest.raises(ValueError, match="takes text only"):
        engine[1].generate([[5]], Sampling(max_tokens=4), images=[["an image"]])


def test_a_refused_request_says_why(engine):
    with pytest.raises(RuntimeError, match=r"refused /v1/completions \(400\): .*temperature"):
        engine[1].generate([[5]], Sampling(max_tokens=4, temperature=-1.0))


def test_a_stop_string_ends_a_completion_with_its_token(engine):
    stop = make_tokenizer().convert_tokens_to_ids("a")
    sampling = Sampling(max_tokens=32, temperature=2.0, seed=1, extra={"stop": ["a"]})
    ids = engine[1].generate([PROMPTS[0]] * 16, sampling).ids
    assert any(row[-1] == stop for row in ids)
    assert all(stop not in row[:-1] for row in ids)


def test_a_regex_shapes_the_completions(url):
    engine = make_engine(url, sampling=Sampling(max_tokens=3, seed=1), structured_outputs_regex="[0-9]{3}")
    texts = make_tokenizer().batch_decode(engine.generate([PROMPTS[0]] * 4).ids)
    engine.close()
    assert all(text.isdigit() and len(text) == 3 for text in texts)


def test_a_group_port_in_use_is_named(url):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"vllm_group_port={port} is taken"):
            VLLMServer(model=make_model(**SHAPE), base_url=url, eos_token_ids=[EOS], group_port=port)


def test_a_server_of_another_vocabulary_is_refused(url):
    with pytest.raises(ValueError, match="has a vocabulary of 64 tokens, of which the server does not know the last"):
        make_engine(url, make_model(vocab_size=64))


class Kill(TrainerCallback):
    """Ends the server after the second step, whose checkpoint is written."""

    def __init__(self, process):
        self._process = process

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            kill(self._process)


def test_the_death_of_the_server_ends_the_run_and_leaves_its_last_checkpoint(tmp_path, server):
    # the last of the tests that use it
    url, process = server
    trainer = make_trainer(tmp_path, url, callbacks=[Kill(process)], max_steps=4, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match=f"the vLLM server at {url} does not answer /"):
        trainer.train()
    trainer.engine.close()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.fixture(scope="module")
def second_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second_server")
    make_model(seed=99, **SHAPE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with vllm_server(str(folder), folder / "log") as started:
        yield started


# each process has its own rows, and a group of one prompt spans both
TWO_PROCESSES = """
import sys

from accelerate import PartialState

from grpo_fast.batch import Sampling
from tests.test_trainer_vllm import GREEDY, PROMPTS, CompareEngines
from tests.test_vllm_server import make_trainer

folder, url = sys.argv[1:]
compare = CompareEngines()
trainer = compare.trainer = make_trainer(
    folder, url, callbacks=[compare], per_device_train_batch_size=4, num_generations=8
)
trainer.train()
rank = PartialState().process_index
lines = [line for line in trainer.state.log_history if "reward" in line]
assert len(lines) == 3
for line in lines:
    assert line["sampling/sampling_logp_difference/max"] < 1e-4, line
assert compare.outputs[0] != compare.outputs[-1]
# of unequal lengths, as the last rows of an evaluation may be
rows = PROMPTS[:3] if rank else PROMPTS[3:]
first = trainer.engine.generate(rows, Sampling(max_tokens=8, seed=1))
again = trainer.engine.generate(rows, Sampling(max_tokens=8, seed=1))
assert first == again and len(first.ids) == len(rows)
try:
    trainer.engine.generate([[5]] if rank else [[]], GREEDY)
except ValueError as error:
    assert "prompt 0 has no tokens" in str(error)
else:
    raise AssertionError("an empty prompt in one process must be refused in both")
trainer.engine.close()
"""

# accelerate does not shard on a CPU, torch does
SHARDED = """
import sys

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.test_trainer_vllm import GREEDY, PROMPTS, greedy_by_transformers
from tests.test_vllm_server import SHAPE, make_engine
from tests.tiny_lm import make_model

PartialState(cpu=True)
expected = greedy_by_transformers(make_model(seed=7, **SHAPE))
model = make_model(seed=7, **SHAPE)
engine = make_engine(sys.argv[1], model)
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
for _ in range(2):
    engine.update_weights(model)
    assert engine.generate(PROMPTS, GREEDY).ids == expected
engine.close()
"""


@pytest.mark.slow
def test_two_processes_share_a_server(tmp_path, second_server):
    launch_text(TWO_PROCESSES, tmp_path, tmp_path / "out", second_server[0])


@pytest.mark.slow
def test_sharded_weights_arrive_whole(tmp_path, second_server):
    launch_text(SHARDED, tmp_path, second_server[0])


@pytest.mark.slow
def test_a_server_of_other_sizes_is_refused(second_server):
    # the last of the tests that use it: vLLM does not get over a weight that does not fit
    model = make_model(**SHAPE | {"intermediate_size": 32})
    engine = make_engine(second_server[0], model)
    with pytest.raises(RuntimeError, match="refused /update_weights"):
        engine.update_weights(model)
    engine.close()


@pytest.mark.slow
def test_a_server_with_nccl_and_raw_log_probs_is_refused_without_a_gpu(tmp_path, caplog):
    make_model(**SHAPE).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    arguments = ["--logprobs-mode", "raw_logprobs"]
    with (
        vllm_server(str(tmp_path), tmp_path / "log", *arguments, backend="nccl", extension=None) as (url, _),
        pytest.raises(ValueError, match="its backend is 'nccl' and the trainer is on 'cpu'"),
    ):
        make_engine(url, sampling=Sampling(max_tokens=4, top_p=0.9))
    assert "runs with --logprobs-mode raw_logprobs" in caplog.text
    assert "over the tokens that its sampling leaves, so top_p may bias" in caplog.text


@pytest.mark.slow
def test_what_nccl_is_told_is_what_the_installed_vllm_takes():
    import inspect

    import vllm
    from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor

    transport = _NCCL(vllm.__version__)
    info = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    init = nccl_engine.NCCLWeightTransferInitInfo(**info | transport.init_extra)
    update = nccl_engine.NCCLWeightTransferUpdateInfo(names=[], dtype_names=[], shapes=[], **transport.update_extra)
    assert getattr(init, "packed", False) or getattr(update, "packed", False)
    inspect.signature(nccl_common.trainer_init).bind(info)
    inspect.signature(packed_tensor.packed_nccl_broadcast_producer).bind(
        iterator=None, group=None, src=0, post_iter_func=None
    )
