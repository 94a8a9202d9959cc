"""The parts of dynamic sampling: silent groups, rows of two batches, further prompts, metrics of several rounds."""

import math
import random
from collections import defaultdict

import pytest
import torch
from datasets import Dataset, IterableDataset

from grpo_fast import multimodal
from grpo_fast.advantages import group_advantages, nanstd, weighted_rewards
from grpo_fast.data import RepeatSampler
from grpo_fast.metrics import RowMean, mean_without_nan
from grpo_fast.refill import (
    Entries,
    PromptPass,
    can_merge,
    check_rows,
    equal_rewards,
    replace_rows,
    silent_groups,
)
from grpo_fast.rollout import length_metrics, padded_batch
from tests.image_rows import conversation, family, logps_of, mixed_batch, padded

CPU = torch.device("cpu")
NAN = math.nan

# -- silent groups -----------------------------------------------------------------------------------------------------


def masks(rows, columns):
    return torch.ones(rows, columns, dtype=torch.long)


def test_a_group_is_silent_if_no_token_in_the_loss_has_an_advantage():
    batch = {"advantages": torch.tensor([0.0, 0.0, 0.0, -0.5, 0.3, 0.0]), "completion_mask": masks(6, 3)}
    assert silent_groups(batch, 2).tolist() == [True, False, False]
    # the only row with an advantage is masked, as where truncated completions are
    batch["completion_mask"][3] = 0
    assert silent_groups(batch, 2).tolist() == [True, True, False]
    # what is left of the row is a tool's
    batch["tool_mask"] = masks(6, 3)
    batch["tool_mask"][4] = 0
    assert silent_groups(batch, 2).tolist() == [True, True, True]


@pytest.mark.parametrize("columns", [1, 3])
def test_advantages_may_be_of_tokens(columns):
    advantages = torch.zeros(4, columns)
    advantages[3, -1] = 1.0
    batch = {"advantages": advantages, "completion_mask": masks(4, 3)}
    assert silent_groups(batch, 2).tolist() == [True, False]
    batch["completion_mask"][3, -1] = 0
    assert silent_groups(batch, 2).tolist() == [True, columns == 3]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_equal_rewards_are_those_that_give_no_advantage(aggregation):
    """Against the advantages in float64, of values that fp32 cannot hold, many of them equal or missing."""
    generator = random.Random(0)
    values = [0.1, 0.1, 0.1, 0.7, NAN]
    num_silent = 0
    for weights in ([1.0], [1.0, 0.3, 0.0], [0.2, 3.0]):
        for G in (2, 3, 6):
            rewards = torch.tensor(
                [[generator.choice(values[i % 2 :]) for i in range(len(weights))] for _ in range(40 * G)]
            )
            # some groups of nothing but equal rows
            rewards.view(40, G, -1)[::5] = rewards.view(40, G, -1)[::5, :1].clone()
            ours = equal_rewards(rewards, torch.tensor(weights), num_generations=G, aggregation=aggregation)
            exact = group_advantages(
                rewards.double(),
                torch.tensor(weights).double(),
                num_generations=G,
                scale_rewards="none",
                aggregation=aggregation,
            ).advantages
            # fp32's 0.1 and 0.7 are far apart, and float64 rounds at 1e-16 of them, over EPS where it divides
            assert ours.tolist() == (exact.abs().view(-1, G).amax(1) < 1e-9).tolist()
            num_silent += int(ours.sum())
            # which fp32 zeros would not say
            rounded = group_advantages(
                rewards, torch.tensor(weights), num_generations=G, scale_rewards="group", aggregation=aggregation
            ).advantages
            assert (rounded.view(-1, G)[ours].abs() < 1e-3).all()
    assert 50 < num_silent < 300


def test_sums_that_differ_by_rounding_are_equal():
    rewards = torch.tensor([[0.3, 0.4], [0.7, 0.0]])
    assert weighted_rewards(rewards, torch.ones(2)).unique().numel() == 2
    kinds = {"sum_then_normalize": True, "normalize_then_sum": False}
    for aggregation, is_equal in kinds.items():
        assert equal_rewards(rewards, torch.ones(2), num_generations=2, aggregation=aggregation).item() is is_equal
    # one value is not a sum
    next_value = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)).item()
    rewards = torch.tensor([[0.3], [next_value]])
    assert not equal_rewards(rewards, torch.ones(1), num_generations=2, aggregation="sum_then_normalize").item()


def test_infinite_rewards_are_compared_too():
    rewards = torch.tensor([[-math.inf], [-math.inf], [-math.inf], [0.0]])
    assert equal_rewards(rewards, torch.ones(1), num_generations=2, aggregation="sum_then_normalize").tolist() == [
        True,
        False,
    ]


def test_other_rows_than_asked_for_are_refused():
    batch = {"advantages": torch.zeros(4), "completion_mask": masks(4, 2)}
    check_rows(batch, 4, 2)
    with pytest.raises(ValueError, match=r"completion_mask must be a tensor of 6 rows, .* it is 4 rows"):
        check_rows(batch, 6, 2)
    with pytest.raises(ValueError, match=r"its advantages must be .* it is NoneType"):
        check_rows({"completion_mask": masks(4, 2)}, 4, 2)


# -- merging -----------------------------------------------------------------------------------------------------------


def make_row(i, P, C):
    """A row whose values say which one it is."""
    generator = torch.Generator().manual_seed(i)
    return {
        "prompt": [10 + i] * P,
        "completion": torch.randint(3, 50, (C,), generator=generator).tolist(),
        "sampling": torch.rand(C, generator=generator).tolist(),
        "tool_mask": torch.randint(0, 2, (C,), generator=generator).tolist(),
        "i": i,
    }


def batch_of(rows):
    """What a rollout of the rows returns, with keys that a subclass may have added."""
    batch = padded_batch(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        [row["sampling"] for row in rows],
        [row["tool_mask"] for row in rows],
        pad_token_id=9,
        multiple_of=None,
        device=CPU,
    )
    numbers = torch.tensor([row["i"] for row in rows])
    P, C = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]
    batch["advantages"] = numbers / 7
    batch["old_per_token_logps"] = -batch["sampling_per_token_logps"]
    batch["importance_sampling_ratio"] = numbers[:, None] * 0.5
    batch["mm_token_type_ids"] = torch.cat([batch["prompt_mask"] * 2, batch["completion_mask"]], dim=1)
    batch["prompt_weights"] = batch["prompt_mask"] * 0.5
    batch["is_long"] = torch.arange(C) < batch["completion_mask"].sum(1, keepdim=True)
    batch["features"] = batch["completion_mask"][:, :, None].float() * torch.arange(1, 4)
    batch["fixed"] = numbers[:, None].expand(-1, 11).clone()
    batch["texts"] = [str(row["i"]) for row in rows]
    batch["array"] = numbers.numpy()
    batch |= {
        "nothing": None,
        "text": "same",
        "scale": torch.tensor(0.5),
        "num_items_in_batch": torch.tensor(len(rows)),
    }
    assert (max(len(row["prompt"]) for row in rows), max(len(row["completion"]) for row in rows)) == (P, C)
    return batch


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype, name
            torch.testing.assert_close(batch[name], value, rtol=0, atol=0, msg=name)
        else:
            assert batch[name] is value is None or list(batch[name]) == list(value), name


# prompts wider here and completions there, the opposite, both the same, and prompts as wide as completions
@pytest.mark.parametrize("sizes", [(6, 3, 2, 8), (2, 8, 6, 3), (4, 5, 4, 5), (3, 5, 5, 3), (5, 5, 2, 2), (1, 1, 4, 6)])
def test_a_merged_batch_is_the_batch_of_its_rows(sizes):
    P, C, other_P, other_C = sizes
    rows = [make_row(0, P, C), *(make_row(i, max(P - i, 1), max(C - i, 1)) for i in range(1, 6))]
    others = [make_row(i, max(other_P + i - 12, 1), max(other_C + i - 12, 1)) for i in range(7, 13)]
    batch, source = batch_of(rows), batch_of(others)
    kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    # rows 2, 3 go, the widest of both stay
    merged = replace_rows(batch, source, [2, 3], [4, 5], pad_id=9)
    expected = batch_of([*rows[:2], *others[4:], *rows[4:]]) | {"array": [0, 1, 11, 12, 4, 5]}
    assert_same(merged, expected)
    assert_same(batch, kept)


def test_a_difference_that_no_padding_explains_is_named():
    batch, source = batch_of([make_row(0, 3, 4)]), batch_of([make_row(1, 2, 6)])
    for change, message in (
        ({"extra": torch.zeros(1)}, "only one has extra in its padded dict"),
        ({"fixed": torch.zeros(1, 5)}, r"their fixed is a tensor of shape \[1, 11\] and a tensor of shape \[1, 5\]"),
        ({"texts": None}, "their texts is list of length 1 and NoneType"),
        ({"texts": ["a", "b"]}, "their texts is list of length 1 and list of length 2"),
        ({"advantages": torch.zeros(1, 6)}, r"their advantages is a tensor of shape \[1\] and a tensor of .*\[1, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_rows(batch, source | change, [0], [0], pad_id=9)


def text_batch(name, texts, completions):
    """A batch of rows without images, which has no image fields."""
    _, processor = family(name)
    prompt_ids, images, _ = multimodal.tokenize([conversation(None, text) for text in texts], processor, {})
    assert images is None
    return padded(prompt_ids, completions)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3", "internvl", "llava_next"])
@torch.no_grad()
def test_images_come_with_their_rows(name):
    """Log-probs under the model: of a batch with images, merged with one without, in both directions."""
    model, _ = family(name)
    mixed, plain = mixed_batch(name), text_batch(name, ["?", "how long??"], [[5], [6, 7, 8, 9, 10]])
    expected = torch.cat([pad_columns(logps_of(model, batch, slice(None)), 5) for batch in (mixed, plain)])
    one = replace_rows(mixed, plain, [2, 0], [1, 0], pad_id=0)
    two = replace_rows(plain, mixed, [0], [2], pad_id=0)
    for merged, rows in ((one, [4, 1, 5, 3]), (two, [2, 5])):
        split = multimodal.split_pixel_values_by_grid(merged)
        again = multimodal.unsplit_pixel_values_by_grid(split)
        logps = logps_of(model, again, slice(None))
        # fp32: a longer row shifts the others' positions
        torch.testing.assert_close(pad_columns(logps, 5), expected[rows], rtol=2e-4, atol=2e-4)
    assert one["num_images"] == [0, 0, 0, 0]
    assert two["num_images"] == [2, 0]


def pad_columns(values, columns):
    return torch.nn.functional.pad(values, (0, columns - values.shape[1]))


def test_rows_whose_images_were_left_out_stay_apart():
    lost = {"num_images": None}
    assert can_merge({}, {"num_images": [1]})
    assert can_merge(lost, lost)
    assert not can_merge(lost, {"num_images": [1]})
    assert not can_merge({}, lost)


# -- further prompts ---------------------------------------------------------------------------------------------------

ROWS = [{"prompt": str(i), "x": i} for i in range(7)]


def source_of(kind, rows=ROWS):
    dataset = Dataset.from_list(rows)
    return dataset if kind == "set" else dataset.to_iterable_dataset(num_shards=min(3, len(rows)))


def numbers(rows):
    return [row["x"] for row in rows]


@pytest.mark.parametrize("kind", ["set", "stream"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_further_prompts_go_round_the_data(kind, shuffle):
    everything = PromptPass(source_of(kind), seed=3, shuffle=shuffle)
    turns = [numbers(everything.take(7, slice(None), 1)) for _ in range(3)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    # later turns of a stream in several shards begin with another shard
    assert (turns[0] == list(range(7))) is not shuffle
    if shuffle:
        assert turns[0] != turns[1] != turns[2]
        assert turns[0] != numbers(PromptPass(source_of(kind), seed=4, shuffle=True).take(7, slice(None), 1))
        # nor as the training pass has them
        training = RepeatSampler(range(7), mini_repeat_count=1, seed=3)
        assert turns[0] != (list(training) if kind == "set" else numbers(source_of(kind).shuffle(seed=3)))
    # across the ends of turns, as two processes take them
    pair = [PromptPass(source_of(kind), seed=3, shuffle=shuffle) for _ in range(2)]
    taken = []
    for count in (2, 4, 2, 1):
        parts = [numbers(one.take(2 * count, slice(p * count, (p + 1) * count), 1)) for p, one in enumerate(pair)]
        taken += parts[0] + parts[1]
    assert taken == (turns[0] + turns[1] + turns[2])[:18]


@pytest.mark.parametrize("kind", ["set", "stream"])
def test_further_prompts_go_on_where_they_stood(kind):
    straight = PromptPass(source_of(kind), seed=3, shuffle=True)
    for count in (3, 4, 5, 9):
        straight.take(count, slice(0, 1), 1)
        resumed = PromptPass(source_of(kind), seed=3, shuffle=True, **straight.place)
        ahead = PromptPass(source_of(kind), seed=3, shuffle=True, **straight.place)
        assert numbers(resumed.take(20, slice(None), 1)) == numbers(ahead.take(20, slice(None), 1))
        assert resumed.place == ahead.place
        copied = straight.place
        assert numbers(straight.take(4, slice(None), 1)) == numbers(
            PromptPass(source_of(kind), seed=3, shuffle=True, **copied).take(4, slice(None), 1)
        )


def test_more_rows_may_be_left_out_than_there_are():
    begun = PromptPass(source_of("set"), seed=0, shuffle=False, offset=16)
    assert numbers(begun.take(6, slice(None), 1)) == [2, 3, 4, 5, 6, 0]
    assert begun.place == {"epoch": 3, "offset": 1}


@pytest.mark.parametrize("kind", ["set", "stream"])
def test_repeated_rows_are_copies(kind):
    rows = PromptPass(
        source_of(kind, [{"prompt": [{"role": "user", "content": "a"}], "x": 0}]), seed=0, shuffle=True
    ).take(1, slice(None), 2)
    rows[0]["prompt"][0]["content"] = "changed"
    assert rows[1]["prompt"][0]["content"] == "a"


def test_the_runs_random_state_and_its_own_stream_are_left_alone():
    stream = source_of("stream").shuffle(seed=1)
    order = numbers(stream)
    for shuffle in (True, False):
        state = torch.get_rng_state()
        training = iter(stream)
        drawn = [next(training)["x"] for _ in range(2)]
        PromptPass(stream, seed=0, shuffle=shuffle, epoch=5).take(9, slice(None), 1)
        assert drawn + numbers(training) == order == numbers(stream)
        assert torch.equal(torch.get_rng_state(), state)


def test_data_without_rows_is_named():
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        PromptPass(empty, seed=0, shuffle=False).take(1, slice(None), 1)


# -- metrics -----------------------------------------------------------------------------------------------------------


def add_round(metrics, rewards, lengths, is_truncated):
    """What a rollout of these rows logs."""
    for name, value in length_metrics(lengths, is_truncated).items():
        metrics[name].append(value)
    for i in range(rewards.shape[1]):
        metrics[f"rewards/f{i}/mean"].append(rewards[:, i].nanmean().item())
        metrics[f"rewards/f{i}/std"].append(nanstd(rewards[:, i]).item())
    totals = weighted_rewards(rewards, torch.ones(rewards.shape[1]))
    metrics["reward"].append(totals.nanmean().item())
    metrics["reward_std"].append(nanstd(totals).item())
    metrics["num_tokens"] = [metrics["num_tokens"][-1] + int(lengths.sum()) if metrics["num_tokens"] else 0]
    is_scored = ~rewards.isnan()
    counts = {f"rewards/f{i}/{key}": int(is_scored[:, i].sum()) for i in range(2) for key in ("mean", "std")}
    return counts | dict.fromkeys(("reward", "reward_std"), int(is_scored.any(1).sum()))


@pytest.mark.parametrize("sizes", [(12, 4, 2), (8,), (6, 1), (2, 2, 2, 2)])
def test_metrics_of_rounds_are_those_of_all_their_rows(sizes):
    generator = torch.Generator().manual_seed(len(sizes))
    rewards = torch.rand(sum(sizes), 2, generator=generator)
    rewards[torch.rand(rewards.shape, generator=generator) < 0.3] = NAN
    # a function that scored no row of a round, or one
    rewards[: sizes[0], 1] = NAN
    rewards[0, 1] = 0.25
    lengths = torch.randint(1, 9, (sum(sizes),), generator=generator)
    is_truncated = torch.rand(sum(sizes), generator=generator) < 0.5
    is_truncated[: sizes[0]] = True
    metrics = defaultdict(list, {"reward": [-5.0], "completions/min_length": [-5.0], "mine": [1.0]})
    entries = Entries(metrics)
    parts = zip(*(values.split(sizes) for values in (rewards, lengths, is_truncated)), strict=True)
    for part in parts:
        entries.end_round(len(part[0]), add_round(metrics, *part))
    entries.pool()
    expected = defaultdict(list)
    add_round(expected, rewards, lengths, is_truncated)
    assert metrics.pop("mine") == [1.0]
    for name in ("reward", "completions/min_length"):
        # of a rollout before
        assert metrics[name].pop(0) == -5.0
    assert metrics.keys() == expected.keys()
    for name, (value,) in expected.items():
        if name != "num_tokens":
            # fp32 means
            assert metrics[name] == [pytest.approx(value, rel=1e-5, nan_ok=True)], name


def test_other_metrics_are_means_of_rows():
    metrics = defaultdict(list)
    entries = Entries(metrics)
    metrics["num_tokens"] = [10]
    metrics["tools/call_frequency"] += [0.5]
    metrics["tools/failure_frequency"] += [0.25]
    metrics["once"] += [3.0]
    # two entries of one round
    metrics["own"] += [1.0, 2.0]
    metrics["sampling/importance_sampling_ratio/min"] += [0.5]
    entries.end_round(12, {})
    metrics["num_tokens"] = [14]
    metrics["tools/call_frequency"] += [0.0]
    # no call to fail
    metrics["tools/failure_frequency"] += [0.0]
    metrics["own"] += [5.5]
    metrics["sampling/importance_sampling_ratio/min"] += [0.25]
    entries.end_round(4, {})
    entries.pool()
    assert metrics == {
        "num_tokens": [14],
        "tools/call_frequency": [0.375],
        "tools/failure_frequency": [0.25],
        "once": [3.0],
        "own": [2.5],
        "sampling/importance_sampling_ratio/min": [0.25],
    }


def test_a_line_is_the_mean_of_all_its_rows():
    assert mean_without_nan([RowMean(1.0, 30), RowMean(4.0, 10), RowMean(NAN, 5)]) == 1.75
    # placeholders count only where there is nothing else
    assert mean_without_nan([RowMean(0.0, 0), RowMean(4.0, 10)]) == 4.0
    assert mean_without_nan([RowMean(0.5, 0)]) == 0.5
    assert mean_without_nan([1.0, 2.0, NAN]) == 1.5
    assert mean_without_nan([RowMean(NAN, 5)]) is None
