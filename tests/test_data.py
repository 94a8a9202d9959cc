"""Prompts in TRL's order; data sets that cannot work are refused by name."""

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value

from grpo_fast import GRPOConfig
from grpo_fast.data import (
    CachedRows,
    RepeatSampler,
    check_chat_template,
    check_dataset,
    check_prompt_lengths,
    is_conversational,
    named_eval_datasets,
    repeat_iterable_dataset,
    settle_train_dataset,
    tokenize_prompts,
)
from tests.tiny_lm import CHAT_TEMPLATE, make_tokenizer

MESSAGES = [{"role": "user", "content": "ab"}]
SETTINGS = [
    {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2},
    {"mini_repeat_count": 1},
    {"mini_repeat_count": 4, "batch_size": 10, "repeat_count": 1},
    {"mini_repeat_count": 3, "batch_size": 11, "repeat_count": 2},
]


def stream_of(rows, features=None):
    return IterableDataset.from_generator(lambda: iter(rows), features=features)


# -- the order of rows -------------------------------------------------------------------------------------------------


@pytest.mark.trl
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shuffle", [True, False])
def test_sampler_is_trls(shuffle, settings):
    from trl.trainer.utils import RepeatSampler as TRLSampler

    settings = settings | {"shuffle": shuffle, "seed": 5}
    ours, theirs = RepeatSampler(range(10), **settings), TRLSampler(range(10), **settings)
    for _ in range(3):
        assert list(ours) == list(theirs)
    assert len(ours) == len(theirs) == len(list(ours))


def test_sampler_goes_on_at_any_epoch():
    straight = RepeatSampler(range(10), mini_repeat_count=1, seed=5)
    orders = [list(straight) for _ in range(3)]
    resumed = RepeatSampler(range(10), mini_repeat_count=1, seed=5)
    resumed.set_epoch(2)
    assert list(resumed) == orders[2]
    assert orders[2] != orders[0]


@pytest.mark.trl
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shuffle", [True, False])
def test_stream_is_trls(shuffle, settings):
    from trl.trainer.utils import repeat_iterable_dataset as trl_repeat

    rows = [{"prompt": [{"role": "user", "content": str(i)}], "x": i} for i in range(10)]
    ours, theirs = (stream_of(rows) for _ in range(2))
    if shuffle:
        ours, theirs = ours.shuffle(seed=3, buffer_size=4), theirs.shuffle(seed=3, buffer_size=4)
    ours, theirs = repeat_iterable_dataset(ours, **settings), trl_repeat(theirs, **settings)
    for epoch in range(2):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_stream_reads_a_row_once_a_chunk():
    drawn = []

    def rows():
        for i in range(6):
            drawn.append(i)
            yield {"prompt": f"{i}"}

    stream = repeat_iterable_dataset(IterableDataset.from_generator(rows), 4, batch_size=2, repeat_count=3)
    assert len(list(stream)) == 6 * 4 * 3
    assert drawn == [0, 1, 2, 3, 4, 5]


def test_repeated_rows_share_no_list_or_dict():
    repeated = iter(repeat_iterable_dataset(stream_of([{"prompt": MESSAGES}] * 2), mini_repeat_count=2))
    first, second = next(repeated), next(repeated)
    first["prompt"][0]["content"] = "changed"
    first["prompt"].append("more")
    assert second == {"prompt": MESSAGES}


def test_cached_rows_decode_each_once_while_batches_name_it():
    decoded = []

    def note(batch):
        decoded.extend(batch["x"])
        return batch

    rows = CachedRows(Dataset.from_dict({"x": list(range(6))}).with_transform(note))
    assert [row["x"] for row in rows.__getitems__([2, 2, 5, 5])] == [2, 2, 5, 5]
    assert [row["x"] for row in rows.__getitems__([5, 2, 1])] == [5, 2, 1]
    assert decoded == [2, 5, 1]
    assert rows[0] == {"x": 0}
    rows[2]
    assert decoded == [2, 5, 1, 0, 2]
    assert len(rows) == 6


def test_cached_rows_stay_as_they_are_in_the_data_set():
    rows = CachedRows(Dataset.from_list([{"prompt": MESSAGES}]))
    first, second = rows.__getitems__([0, 0])
    first["prompt"][0]["content"] = "changed"
    first["extra"] = 1
    assert second == {"prompt": MESSAGES}
    assert rows[0] == {"prompt": MESSAGES}


# -- what a data set must look like ------------------------------------------------------------------------------------


@pytest.mark.trl
@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "a"},
        {"prompt": MESSAGES},
        {"prompt": MESSAGES, "completion": MESSAGES},
        {"messages": MESSAGES},
        {"chosen": MESSAGES},
        {"prompt": ["a"]},
        {"question": MESSAGES},
        {},
    ],
    ids=str,
)
def test_conversations_are_trls(example):
    from trl.data_utils import is_conversational as trl_is_conversational

    assert is_conversational(example) == trl_is_conversational(example)


def test_no_messages_are_no_conversation():
    assert not is_conversational({"prompt": []})


TEXT = Features({"prompt": Value("string"), "image": Value("string")})
NUMBERS = Features({"prompt": List(Value("int64"))})


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (None, ValueError, "train_dataset is needed"),
        ([{"prompt": "a"}], TypeError, "train_dataset must be a datasets.Dataset or IterableDataset, it is list"),
        (Dataset.from_dict({"prompt": []}), ValueError, "train_dataset has no rows"),
        (stream_of([]), ValueError, "train_dataset has no rows"),
        (Dataset.from_dict({"question": ["a"]}), ValueError, r"needs a `prompt` column, .*\['question'\]"),
        (stream_of([{"question": "a"}]), ValueError, r"needs a `prompt` column, .*\['question'\]"),
        (Dataset.from_dict({"prompt": [3]}), ValueError, "must be text or a list of messages, the first is 3"),
        (stream_of([{"prompt": 3}]), ValueError, "must be text or a list of messages, the first is 3"),
        (stream_of([{"prompt": [3]}], NUMBERS), ValueError, "must be text or a list of messages"),
        (Dataset.from_dict({"prompt": ["a"], "image": [None]}), ValueError, "column `image`: prompts with images must"),
        (stream_of([{"prompt": "a", "image": "b"}], TEXT), ValueError, "column `image`: prompts with images must"),
    ],
)
def test_wrong_datasets_are_named(dataset, error, message):
    with pytest.raises(error, match=message):
        check_dataset(dataset, "train_dataset")


@pytest.mark.parametrize("prompt", ["a", MESSAGES, [{"role": "user", "content": [{"type": "text", "text": "a"}]}]])
def test_good_datasets_pass(prompt):
    dataset = Dataset.from_list([{"prompt": prompt, "answer": 1}])
    for good in (dataset, dataset.to_iterable_dataset(), stream_of([{"prompt": prompt}])):
        check_dataset(good, "train_dataset")
        check_chat_template(good, make_tokenizer(CHAT_TEMPLATE), "train_dataset")
    if prompt != "a":
        check_dataset(dataset.add_column("images", [[]]), "train_dataset")


def test_a_stream_that_knows_its_features_is_not_read():
    def rows():
        raise AssertionError("read")
        yield

    for prompt in (Value("string"), List({"role": Value("string"), "content": Value("string")})):
        stream = IterableDataset.from_generator(rows, features=Features({"prompt": prompt}))
        check_dataset(stream, "train_dataset")
        check_chat_template(stream, make_tokenizer(CHAT_TEMPLATE), "train_dataset")
        check_prompt_lengths(stream, make_tokenizer(), "train_dataset", 2, {})


def test_checking_a_stream_leaves_its_rows():
    stream = stream_of([{"prompt": "a"}, {"prompt": "b"}])
    check_dataset(stream, "train_dataset")
    assert [row["prompt"] for row in stream] == ["a", "b"]


def test_environments_may_bring_the_prompts(tmp_path):
    dataset = Dataset.from_dict({"level": [1, 2], "environment": ["a", "b"]})
    check_dataset(dataset, "train_dataset", has_environment=True)
    args = GRPOConfig(str(tmp_path), use_cpu=True, max_steps=1, generation_batch_size=32)
    assert settle_train_dataset(dataset, args, {"a": object, "b": object}) is dataset
    stand_in = settle_train_dataset(None, args, object)
    assert stand_in["prompt"][:] == [[{"role": "user", "content": ""}]] * 4


@pytest.mark.parametrize(
    ("dataset", "environment", "max_steps", "message"),
    [
        (None, None, 1, "train_dataset is needed, unless an environment_factory brings the prompts"),
        (None, {"a": object}, 1, "environment_factory of several environments needs a train_dataset"),
        (None, object, -1, "max_steps says how long to train; it must be above 0, it is -1"),
        (stream_of([{"prompt": "a"}]), None, -1, "train_dataset is a stream, of unknown length: max_steps must be"),
        (Dataset.from_dict({"prompt": ["a"]}), {"a": object}, 1, r"needs the column `environment` .*\['prompt'\]"),
    ],
)
def test_training_sets_are_settled_or_refused(tmp_path, dataset, environment, max_steps, message):
    args = GRPOConfig(str(tmp_path), use_cpu=True, max_steps=max_steps)
    with pytest.raises(ValueError, match=message):
        settle_train_dataset(dataset, args, environment)


def test_evaluation_sets_have_names():
    assert named_eval_datasets(None) == {}
    assert named_eval_datasets(1) == {"eval_dataset": 1}
    assert named_eval_datasets({"a": 1, "b": 2}) == {"eval_dataset['a']": 1, "eval_dataset['b']": 2}


def test_conversation_needs_a_chat_template():
    dataset = Dataset.from_list([{"prompt": MESSAGES}])
    for conversations in (dataset, dataset.to_iterable_dataset(), Dataset.from_dict({"level": [1]})):
        with pytest.raises(ValueError, match="processing_class has no chat template"):
            check_chat_template(conversations, make_tokenizer(), "train_dataset")
    check_chat_template(Dataset.from_dict({"prompt": ["a"]}), make_tokenizer(), "train_dataset")


@pytest.mark.parametrize("long", ["a" * 70, [{"role": "user", "content": "a" * 61}]])
def test_overlong_prompt_is_found(long):
    short = "a" if isinstance(long, str) else MESSAGES
    dataset = Dataset.from_list([{"prompt": short}, {"prompt": long}])
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    for cut in (None, 64):
        with pytest.raises(ValueError, match=r"the prompt of row 1 has .* tokens, the model's context holds 64"):
            check_prompt_lengths(dataset, tokenizer, "train_dataset", 64, {}, max_prompt_length=cut)
    check_prompt_lengths(dataset, tokenizer, "train_dataset", 64, {}, max_prompt_length=63)
    check_prompt_lengths(dataset, tokenizer, "train_dataset", 128, {})
    check_prompt_lengths(Dataset.from_dict({"level": [1]}), tokenizer, "train_dataset", 64, {})


# -- prompts as token ids ----------------------------------------------------------------------------------------------


def test_prompts_as_tokens():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert tokenize_prompts(["ab"], tokenizer, {}) == [[3, 4]]
    (ids,) = tokenize_prompts([MESSAGES], tokenizer, {})
    assert tokenizer.decode(ids) == "u:ab\na:"


def test_long_prompts_lose_their_beginning():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert tokenize_prompts(["abcd", "d"], tokenizer, {}, max_prompt_length=2) == [[5, 6], [6]]
    (ids,) = tokenize_prompts([MESSAGES], tokenizer, {}, max_prompt_length=4)
    assert tokenizer.decode(ids) == "b\na:"


def test_the_template_sees_tools_and_its_own_arguments():
    template = "{{ tools | length if tools else 'no' }}{{ ' ' + greeting }}"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools, text in (([tool, tool], "2 hi"), ([], "no hi"), (None, "no hi")):
        (ids,) = tokenize_prompts([MESSAGES], make_tokenizer(), {"greeting": "hi"}, tools=tools, chat_template=template)
        assert make_tokenizer().decode(ids) == text
