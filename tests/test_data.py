"""Prompts in TRL's order; data sets that cannot work are refused by name."""

import pytest
from datasets import Dataset

from grpo_fast.data import RepeatSampler, check_chat_template, check_dataset, check_prompt_lengths, tokenize_prompts
from tests.tiny_lm import CHAT_TEMPLATE, make_tokenizer

MESSAGES = [{"role": "user", "content": "ab"}]


@pytest.mark.trl
@pytest.mark.parametrize("shuffle", [True, False])
def test_sampler_is_trls(shuffle):
    from trl.trainer.utils import RepeatSampler as TRLSampler

    settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "shuffle": shuffle, "seed": 5}
    ours, theirs = RepeatSampler(range(10), **settings), TRLSampler(range(10), **settings)
    for _ in range(3):
        assert list(ours) == list(theirs)
    assert len(ours) == len(theirs) == 36


def test_sampler_goes_on_at_any_epoch():
    straight = RepeatSampler(range(10), mini_repeat_count=1, seed=5)
    orders = [list(straight) for _ in range(3)]
    resumed = RepeatSampler(range(10), mini_repeat_count=1, seed=5)
    resumed.set_epoch(2)
    assert list(resumed) == orders[2]
    assert orders[2] != orders[0]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (None, ValueError, "train_dataset is needed"),
        ([{"prompt": "a"}], TypeError, "train_dataset must be a datasets.Dataset, it is list"),
        (Dataset.from_dict({"prompt": []}), ValueError, "train_dataset has no rows"),
        (Dataset.from_dict({"question": ["a"]}), ValueError, r"needs a `prompt` column, .*\['question'\]"),
        (Dataset.from_dict({"prompt": [3]}), ValueError, "must be text or a list of messages, the first is 3"),
        (Dataset.from_dict({"prompt": ["a"], "image": [None]}), ValueError, "prompts with images are not supported"),
        (Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), ValueError, "is an IterableDataset"),
    ],
)
def test_wrong_datasets_are_named(dataset, error, message):
    with pytest.raises(error, match=message):
        check_dataset(dataset, "train_dataset")


def test_conversation_needs_a_chat_template():
    dataset = Dataset.from_list([{"prompt": MESSAGES}])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        check_chat_template(dataset, make_tokenizer(), "train_dataset")
    check_chat_template(dataset, make_tokenizer(CHAT_TEMPLATE), "train_dataset")


@pytest.mark.parametrize("long", ["a" * 70, [{"role": "user", "content": "a" * 61}]])
def test_overlong_prompt_is_found(long):
    short = "a" if isinstance(long, str) else MESSAGES
    dataset = Dataset.from_list([{"prompt": short}, {"prompt": long}])
    with pytest.raises(ValueError, match=r"the prompt of row 1 has .* tokens, the model's context holds 64"):
        check_prompt_lengths(dataset, make_tokenizer(CHAT_TEMPLATE), "train_dataset", 64, {})
    check_prompt_lengths(dataset, make_tokenizer(CHAT_TEMPLATE), "train_dataset", 128, {})


def test_prompts_as_tokens():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert tokenize_prompts(["ab"], tokenizer, {}) == [[3, 4]]
    (ids,) = tokenize_prompts([MESSAGES], tokenizer, {})
    assert tokenizer.decode(ids) == "u:ab\na:"
