"""What scripts import from TRL's modules: the same names here, with TRL's signatures and results."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import IterableDataset

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.trainer import grpo_trainer as ours
from tests.tiny_lm import make_tokenizer

NAN = float("nan")
# one rounding: the same sums, multiplied in the same order
RTOL, ATOL = 1e-6, 1e-7
# a template that, like some reasoning models', writes into the prompt what it leaves out of earlier turns
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if tools is not none %}{{ 'tools' }}{% endif %}"
    "{% if add_generation_prompt %}{{ 'a:' + ('.' if thinking else '') }}{% endif %}"
)
NAMES = (
    "RewardFunc", "RolloutFunc", "EnvironmentFactory", "RepeatSampler", "nanstd", "nanmin", "nanmax", "pad",
    "split_tensor_dict", "shuffle_sequence_dict", "is_conversational", "apply_chat_template",
    "unwrap_model_for_generation", "profiling_context", "profiling_decorator", "GRPOConfig", "VLLMGeneration",
    "SyncRefModelCallback", "prepare_multimodal_messages", "split_pixel_values_by_grid",
    "unsplit_pixel_values_by_grid", "repeat_iterable_dataset",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("trl.trainer.grpo_trainer")


# -- the names ---------------------------------------------------------------------------------------------------------


def test_scripts_find_their_imports():
    from grpo_fast.trainer.grpo_config import GRPOConfig as by_module

    assert by_module is GRPOConfig
    missing = [name for name in NAMES if not hasattr(ours, name)]
    assert not missing


@pytest.mark.trl
def test_callables_take_trls_arguments(theirs):
    for name in NAMES:
        value = getattr(theirs, name)
        if name in ("GRPOConfig", "VLLMGeneration", "RewardFunc", "RolloutFunc", "EnvironmentFactory"):
            continue
        parameters = list(inspect.signature(value).parameters)
        assert list(inspect.signature(getattr(ours, name)).parameters) == parameters, name


@pytest.mark.trl
def test_the_trainer_has_trls_arguments_methods_and_class_attributes(theirs):
    def parameters(function):
        # a value that TRL requires, as transformers does not, may have a default here
        return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]

    arguments = inspect.signature(GRPOTrainer.__init__).parameters
    assert len(arguments) == 1 + 14
    defaults = [p.default for p in inspect.signature(theirs.GRPOTrainer.__init__).parameters.values()]
    assert [p.default for p in arguments.values()] == defaults
    for name, value in vars(theirs.GRPOTrainer).items():
        if callable(value) or isinstance(value, staticmethod):
            assert parameters(getattr(GRPOTrainer, name)) == parameters(getattr(theirs.GRPOTrainer, name)), name
    assert GRPOTrainer.loss_is_scaled_for_ga is True
    assert GRPOTrainer._name == theirs.GRPOTrainer._name
    assert set(theirs.GRPOTrainer._tag_names) <= set(GRPOTrainer._tag_names)
    assert GRPOTrainer._paper["id"] == theirs.GRPOTrainer._paper["id"]


# -- what they do ------------------------------------------------------------------------------------------------------


@pytest.mark.trl
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 1), (1, -1)])
def test_nanstd(theirs, dim, keepdim):
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    values[0, :, 0] = NAN
    values[1, 1:, 2] = NAN
    expected = theirs.nanstd(values, dim=dim, keepdim=keepdim)
    torch.testing.assert_close(ours.nanstd(values, dim=dim, keepdim=keepdim), expected, equal_nan=True)


@pytest.mark.trl
@pytest.mark.parametrize("values", [[1.0], [NAN, NAN], [NAN, 2.0], [3.0, NAN, 1.0], [-torch.inf, 1.0]])
def test_statistics_of_few_values(theirs, values):
    tensor = torch.tensor(values)
    for name in ("nanstd", "nanmin", "nanmax"):
        expected = getattr(theirs, name)(tensor)
        torch.testing.assert_close(getattr(ours, name)(tensor), expected, equal_nan=True)


@pytest.mark.trl
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 4])
@pytest.mark.parametrize(
    "shapes", [[(3,), (1,), (0,)], [(2, 2), (1, 3)], [(4, 1, 2), (2, 2, 1)]], ids=["1-d", "2-d", "3-d"]
)
def test_pad(theirs, shapes, side, multiple):
    tensors = [torch.arange(torch.Size(shape).numel()).view(shape) + 1 for shape in shapes]
    settings = {"padding_value": -1, "padding_side": side, "pad_to_multiple_of": multiple}
    assert torch.equal(ours.pad(tensors, **settings), theirs.pad(tensors, **settings))


def test_pad_names_a_wrong_side():
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right'; it is 'top'"):
        ours.pad([torch.ones(2)], padding_side="top")


def mixed_batch(num_rows):
    """What a subclass may put into the padded dict."""
    return {
        "nothing": None,
        "advantages": torch.arange(num_rows).float(),
        "completion_ids": torch.arange(3 * num_rows).view(num_rows, 3),
        "count": torch.tensor(7),
        "texts": [f"row {i}" for i in range(num_rows)],
        "pairs": tuple((i, -i) for i in range(num_rows)),
        "array": np.arange(num_rows),
    }


def plain(batch):
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else None if value is None else list(value)
        for name, value in batch.items()
    }


@pytest.mark.trl
def test_shuffle_permutes_every_sequence_alike(theirs):
    torch.manual_seed(5)
    expected = theirs.shuffle_sequence_dict(mixed_batch(6))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    shuffled = ours.shuffle_sequence_dict(mixed_batch(6))
    assert plain(shuffled) == plain(expected)
    assert shuffled["advantages"].tolist() != list(range(6))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.trl
@pytest.mark.parametrize(("num_rows", "num_chunks"), [(6, 3), (6, 1), (7, 2), (6, 4)])
def test_split_cuts_equal_runs(theirs, num_rows, num_chunks):
    # TRL's split knows tensors and lists
    batch = {name: value for name, value in mixed_batch(num_rows).items() if name not in ("pairs", "array")}
    expected = theirs.split_tensor_dict(batch, num_chunks)
    assert [plain(chunk) for chunk in ours.split_tensor_dict(batch, num_chunks)] == [plain(c) for c in expected]


def test_what_has_no_rows_goes_to_every_slice():
    batch = {"note": "seed 3", "threshold": 0.5, "count": torch.tensor(7), "rows": torch.arange(4)}
    slices = ours.split_tensor_dict(ours.shuffle_sequence_dict(batch), 2)
    assert [(s["note"], s["threshold"], int(s["count"])) for s in slices] == [("seed 3", 0.5, 7)] * 2


@pytest.mark.trl
@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "text"},
        {"prompt": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"chosen": ["a"]},
        {"completion": [{"content": "a"}]},
        {"text": [{"role": "user", "content": "a"}]},
    ],
)
def test_is_conversational(theirs, example):
    assert ours.is_conversational(example) == theirs.is_conversational(example)


USER, ANSWER = [{"role": "user", "content": "1+1"}], [{"role": "assistant", "content": "2"}]


@pytest.mark.trl
@pytest.mark.parametrize(
    "example",
    [
        {"prompt": USER},
        {"prompt": USER, "answer": "kept out"},
        {"prompt": USER + ANSWER},
        {"prompt": USER, "completion": ANSWER},
        {"prompt": USER, "completion": ANSWER, "label": True},
        {"prompt": USER, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "3"}]},
        {"chosen": USER + ANSWER, "rejected": ANSWER},
        {"messages": USER + ANSWER},
        {"prompt": USER, "chat_template_kwargs": {"thinking": True}},
    ],
    ids=lambda example: ", ".join(example),
)
@pytest.mark.parametrize("options", [{}, {"tools": []}, {"tools": [{"name": "add"}]}], ids=["", "no tools", "tools"])
def test_apply_chat_template(theirs, example, options):
    tokenizer = make_tokenizer(TEMPLATE)
    expected = theirs.apply_chat_template(example, tokenizer, **options)
    assert ours.apply_chat_template(example, tokenizer, **options) == expected
    if "messages" not in example:
        expected = theirs.apply_chat_template({"prompt": USER}, tokenizer, thinking=True, **options)
        assert ours.apply_chat_template({"prompt": USER}, tokenizer, thinking=True, **options) == expected


@pytest.mark.trl
@pytest.mark.parametrize(
    ("example", "error"),
    [({"completion": ANSWER}, KeyError), ({"prompt": [{"role": "system", "content": "be brief"}]}, ValueError)],
)
def test_apply_chat_template_refuses(theirs, example, error):
    for module in (ours, theirs):
        with pytest.raises(error):
            module.apply_chat_template(example, make_tokenizer(TEMPLATE))


@pytest.mark.trl
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("mini_repeat_count", "batch_size", "repeat_count"), [(2, 3, 4), (1, 1, 1), (3, 2, 1)])
def test_repeat_sampler(theirs, mini_repeat_count, batch_size, repeat_count, shuffle):
    arguments = (range(7), mini_repeat_count, batch_size, repeat_count, shuffle, 42)
    sampler, expected = ours.RepeatSampler(*arguments), theirs.RepeatSampler(*arguments)
    # two epochs
    assert [list(sampler), list(sampler)] == [list(expected), list(expected)]
    assert len(sampler) == len(expected)


@pytest.mark.trl
def test_repeat_iterable_dataset(theirs):
    def stream():
        return IterableDataset.from_generator(lambda: ({"x": i} for i in range(7)))

    settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2}
    expected = list(theirs.repeat_iterable_dataset(stream(), **settings))
    assert list(ours.repeat_iterable_dataset(stream(), **settings)) == expected


def test_profiling_of_something_that_is_no_trainer():
    class Engine:
        @ours.profiling_decorator
        def generate(self, prompts, *, seed=0):
            return [*prompts, seed]

    assert Engine().generate(["a"], seed=3) == ["a", 3]
    assert Engine.generate.__name__ == "generate"


# -- the library that rewrites the classes -----------------------------------------------------------------------------

UNSLOTH = """
import sys, types
{before}
sys.modules["unsloth"] = types.ModuleType("unsloth")
{after}
"""


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_unsloth_before_us_is_refused():
    result = run_python(UNSLOTH.format(before="", after="from grpo_fast import GRPOConfig, GRPOTrainer"))
    assert result.returncode == 1
    assert "ImportError: unsloth has been imported in this process" in result.stderr
    assert "remove `import unsloth`" in result.stderr


def test_unsloth_between_us_and_the_trainer_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", type(sys)("unsloth"))
    with pytest.raises(ImportError, match="remove `import unsloth`"):
        GRPOTrainer(model="nowhere", reward_funcs=lambda completions, **kwargs: [0.0] * len(completions))
