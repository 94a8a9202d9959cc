"""Dynamic sampling in the trainer: what a step trains on, what it logs, and that a run resumes."""

import functools
import logging
import math
import random

import pytest
import torch
from datasets import Dataset

import grpo_fast
from grpo_fast.advantages import group_advantages
from grpo_fast.metrics import mean_without_nan
from grpo_fast.rollout import padded_batch, unpadded_rows
from tests import test_multimodal_trainer as images
from tests import trainer_subclasses as subclasses
from tests.processes import launch_text
from tests.tiny_lm import make_model, make_tokenizer
from tests.tool_chats import HERMES, encode, weather
from tests.tool_chats import make_tokenizer as make_chat_tokenizer
from tests.trainer_runs import ATOL_OURS, RTOL_OURS, SEED, build, trained, weights_of

FLAT = make_tokenizer()("f")["input_ids"][0]
CLOCKED = ("step_time", "time/", "train_", "total_flos")


def rows(num_flat, num_useful):
    """Prompts whose completions all score the same, and prompts whose completions do not, in a mixed order."""
    flat = [{"prompt": "f" * (1 + i % 3) + f"{i}="} for i in range(num_flat)]
    useful = [{"prompt": "ab" * (1 + i % 4) + f"{i}="} for i in range(num_useful)]
    return random.Random(1).sample(flat + useful, num_flat + num_useful)


def value_of(first_id, ids):
    # the fp32 mean of six of these is not 0.6
    return 0.6 if first_id == FLAT else 7 * sum(ids) % 11 / 11


def score(prompts, completion_ids, **kwargs):
    return [value_of(FLAT if p[0] == "f" else 0, ids) for p, ids in zip(prompts, completion_ids, strict=True)]


def length(completion_ids, prompts, **kwargs):
    return [0.5 if p[0] == "f" else len(ids) / 9 for p, ids in zip(prompts, completion_ids, strict=True)]


def watched(base):
    """Keeps what each round was given and returned, and each generation's batch."""

    class Watched(base):
        def __init__(self, *args, **kwargs):
            self.rounds, self.batches = [[]], []
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            self.rounds[-1].append((inputs, {k: v.clone() for k, v in batch.items() if isinstance(v, torch.Tensor)}))
            return batch

        def _timed_rollout(self, inputs):
            batch = super()._timed_rollout(inputs)
            self.batches.append(batch)
            self.rounds.append([])
            # the shuffle that follows
            torch.manual_seed(self.state.global_step)
            return batch

    return Watched


def rows_of(batch):
    """Prompt and completion of each row, without padding."""
    prompts = unpadded_rows(batch["prompt_ids"], batch["prompt_mask"])
    return list(zip(prompts, unpadded_rows(batch["completion_ids"], batch["completion_mask"]), strict=True))


def groups_of(items, num_generations):
    return [items[i : i + num_generations] for i in range(0, len(items), num_generations)]


def is_useful(group):
    return len({value_of(prompt[0], ids) for prompt, ids in group}) > 1


def line_of(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


# 4 groups of 6 a generation
SIX = {"per_device_train_batch_size": 24, "num_generations": 6, "rewards": [score]}


# -- the batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True], ids=["set", "stream"])
@pytest.mark.parametrize("limit", [1, 8])
def test_useful_groups_take_the_places_of_silent_ones(tmp_path, is_stream, limit):
    dataset = Dataset.from_list([{**row, "unused": 1} for row in rows(9, 6)])
    if is_stream:
        dataset = dataset.to_iterable_dataset(num_shards=2)
    settings = {**SIX, "dataset": dataset, "remove_unused_columns": True}
    trainer = trained(grpo_fast, tmp_path, watched, dynamic_sampling_rounds=limit, **settings)
    assert {name for rounds in trainer.rounds for inputs, _ in rounds for row in inputs for name in row} == {"prompt"}
    logged = [line_of(trainer, f"dynamic_sampling/{name}") for name in ("rounds", "groups_seen", "groups_replaced")]
    logged.append(line_of(trainer, "dynamic_sampling/groups_silent"))
    assert len(trainer.batches) == 3
    for step, (rounds, batch) in enumerate(zip(trainer.rounds, trainer.batches, strict=False)):
        first, *further = [groups_of(rows_of(output), 6) for _, output in rounds]
        expected, spare = list(first), []
        for groups in further:
            silent = [i for i, group in enumerate(expected) if not is_useful(group)]
            # as many as were missing, each a prompt's
            assert len(groups) == len(silent)
            assert all(len({tuple(prompt) for prompt, _ in group}) == 1 for group in groups)
            spare = [group for group in groups if is_useful(group)]
            for i, group in zip(silent, spare, strict=False):
                expected[i] = group
        assert groups_of(rows_of(batch), 6) == expected
        num_silent = sum(not is_useful(group) for group in expected)
        assert len(further) == limit or num_silent == 0
        num_replaced = sum(not is_useful(group) for group in first) - num_silent
        assert [values[step] for values in logged] == [
            len(further),
            len(first) + sum(map(len, further)),
            num_replaced,
            num_silent,
        ]
        # noise of 0.6's rounding is no signal
        is_silent = torch.tensor([not is_useful(group) for group in expected]).repeat_interleave(6)
        assert not batch["advantages"][is_silent].any()
        assert int(batch["num_items_in_batch"]) == sum(len(ids) for _, ids in rows_of(batch))
    assert sum(logged[2]) > 0
    # the table is of the last rollout, all of it
    assert len(trainer._logs["prompt"]) == 6 * logged[1][-1] == len(trainer._logs["rewards"]["score"])


SETTINGS = {
    "dapo": {},
    "grpo, scaled by the batch": {"scale_rewards": "batch", "loss_type": "grpo"},
    "two functions, each by itself": {
        "multi_objective_aggregation": "normalize_then_sum", "rewards": [score, length], "reward_weights": [1.0, 0.5]
    },
    "four steps a generation": {
        "per_device_train_batch_size": 12, "steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "max_steps": 4
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_steps_are_those_of_a_batch_made_by_hand(tmp_path, settings):
    """Of the same rows, padded no wider than they need, with advantages in float64 from their rewards."""
    settings = {**SIX, "max_steps": 1, "dataset": Dataset.from_list(rows(9, 6)), **settings}
    ours = trained(grpo_fast, tmp_path, watched, dynamic_sampling_rounds=1, **settings)
    assert line_of(ours, "dynamic_sampling/groups_replaced")[0] > 0
    made = rows_of(ours.batches[0])
    # the widest of the first round is not among them
    assert max(len(prompt) for prompt, _ in made) <= ours.batches[0]["prompt_ids"].shape[1]
    names = [function.__name__ for function in settings["rewards"]]
    values = {
        "score": [value_of(prompt[0], ids) for prompt, ids in made],
        "length": [0.5 if prompt[0] == FLAT else len(ids) / 9 for prompt, ids in made],
    }
    advantages = group_advantages(
        torch.tensor([values[name] for name in names], dtype=torch.float64).T,
        torch.tensor(settings.get("reward_weights", [1.0]), dtype=torch.float64),
        num_generations=6,
        scale_rewards=settings.get("scale_rewards", "group"),
        aggregation=settings.get("multi_objective_aggregation", "sum_then_normalize"),
    ).advantages
    # of 6e-4 are the z-scores in fp32 of six times 0.6, in a quarter of the rows, and that is the batch's mean
    atol = 1e-3 if "multi_objective_aggregation" in settings else 1e-5
    torch.testing.assert_close(ours.batches[0]["advantages"].double(), advantages, rtol=1e-5, atol=atol)

    def given(base):
        class Given(watched(base)):
            def _generate_and_score_completions(self, inputs):
                batch = padded_batch(
                    *zip(*made, strict=True), None, pad_token_id=0, multiple_of=None, device=torch.device("cpu")
                )
                batch["num_items_in_batch"] = batch["completion_mask"].sum()
                batch["advantages"] = ours.batches[0]["advantages"]
                return batch | self._reference_points(batch, batch["completion_mask"])

        return Given

    theirs = trained(grpo_fast, tmp_path, given, **settings)
    before = build(grpo_fast, tmp_path, **settings)
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=RTOL_OURS, atol=ATOL_OURS)
    assert not torch.allclose(weights_of(ours), weights_of(before), rtol=RTOL_OURS, atol=1e-4)


def test_without_a_useful_group_nothing_is_trained(tmp_path):
    settings = {**SIX, "dataset": Dataset.from_list(rows(5, 0)), "max_steps": 1}
    trainer = trained(grpo_fast, tmp_path, watched, dynamic_sampling_rounds=3, **settings)
    assert [len(inputs) for inputs, _ in trainer.rounds[0]] == [24] * 4
    assert line_of(trainer, "dynamic_sampling/groups_seen") == [16]
    assert line_of(trainer, "dynamic_sampling/groups_silent") == [4]
    assert torch.equal(weights_of(trainer), weights_of(build(grpo_fast, tmp_path, **settings)))


def test_where_nothing_is_silent_the_run_is_the_one_without(tmp_path):
    def place(completions, **kwargs):
        return [i % 3 / 3 for i in range(len(completions))]

    on, off = (
        trained(grpo_fast, tmp_path, rewards=[place, length], dynamic_sampling_rounds=limit, beta=0.1)
        for limit in (2, 0)
    )
    assert torch.equal(weights_of(on), weights_of(off))
    for line, expected in zip(on.state.log_history, off.state.log_history, strict=True):
        ours = {name: value for name, value in line.items() if not name.startswith((*CLOCKED, "dynamic_sampling/"))}
        assert ours == {name: value for name, value in expected.items() if not name.startswith(CLOCKED)}
    assert not any("dynamic_sampling/rounds" in line for line in off.state.log_history)


def test_evaluation_is_not_refilled(tmp_path):
    trainer = build(
        grpo_fast,
        tmp_path,
        watched,
        dynamic_sampling_rounds=2,
        eval_dataset=Dataset.from_list(rows(4, 0)),
        per_device_eval_batch_size=12,
        **SIX | {"rewards": [length]},
    )
    metrics = trainer.evaluate()
    assert not any("dynamic_sampling" in name for name in metrics)
    assert metrics["eval_frac_reward_zero_std"] == 1.0
    assert all(len(rounds) <= 1 for rounds in trainer.rounds)


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_logged_means_are_of_everything_seen(tmp_path):
    """Hard prompts are solved once in 20 times, others every other time, and hard groups are mostly silent."""
    generator, chances = random.Random(5), {"h": 0.05, "e": 0.5}
    mean = sum(chances.values()) / 2

    def instantly(prompts, trainer):
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [[3, 1] for _ in prompts], "logprobs": None}

    def solved(prompts, **kwargs):
        return [float(generator.random() < chances[prompt[0]]) for prompt in prompts]

    trainer = build(
        grpo_fast,
        tmp_path,
        rewards=[solved],
        rollout_func=instantly,
        dataset=Dataset.from_list([{"prompt": f"{kind}{i}"} for i in range(20) for kind in "he"]),
        dynamic_sampling_rounds=3,
    )
    trainer.model.train()
    kept = []
    for _ in range(200):
        # two groups of four
        inputs = [{"prompt": prompt} for prompt in generator.choices("he", k=2) for _ in range(4)]
        batch = trainer._timed_rollout(inputs)
        has_signal = (batch["advantages"] != 0).view(-1, 4).any(1)
        kept.append((batch["advantages"] > 0).float().mean().item() if has_signal.any() else 0.0)
    metrics = trainer._metrics["train"]
    num_groups = sum(metrics["dynamic_sampling/groups_seen"])
    # groups differ by their prompts' chances and by luck
    variance = (0.45 / 2) ** 2 + (0.05 * 0.95 + 0.5 * 0.5) / 2 / 4
    error = math.sqrt(variance / num_groups)
    assert abs(mean_without_nan(metrics["reward"]) - mean) < 3 * error
    assert mean_without_nan(metrics["reward"]) == mean_without_nan(metrics["rewards/solved/mean"])
    silent = 1 - sum(1 - p**4 - (1 - p) ** 4 for p in chances.values()) / 2
    assert mean_without_nan(metrics["frac_reward_zero_std"]) == pytest.approx(silent, abs=0.05)
    assert mean_without_nan(metrics["reward_std"]) == pytest.approx(math.sqrt(mean * (1 - mean)), abs=0.03)
    # what would be off: the kept rows, and rollouts that count the same however many rows they had
    assert sum(kept) / len(kept) > mean + 10 * error
    assert sum(metrics["reward"]) / 200 > mean + 3 * error


# -- subclasses --------------------------------------------------------------------------------------------------------


def test_a_subclasses_advantages_of_tokens_stay(tmp_path):
    def make_class(base):
        return watched(subclasses.token_advantages(base))

    settings = {**SIX, "dataset": Dataset.from_list(rows(9, 6)), "scale_rewards": "batch", "max_steps": 1}
    trainer = trained(grpo_fast, tmp_path, make_class, dynamic_sampling_rounds=2, **settings)
    known = {}
    for _, output in trainer.rounds[0]:
        for (prompt, ids), advantages in zip(rows_of(output), output["advantages"], strict=True):
            known[tuple(prompt), tuple(ids)] = advantages[: len(ids)]
    (batch,) = trainer.batches
    assert line_of(trainer, "dynamic_sampling/groups_replaced")[0] > 0
    for (prompt, ids), advantages in zip(rows_of(batch), batch["advantages"], strict=True):
        assert torch.equal(advantages[: len(ids)], known[tuple(prompt), tuple(ids)])


def test_rows_that_a_subclass_changes_stay_and_others_are_scaled_anew(tmp_path):
    def make_class(base):
        class Edited(base):
            def _generate_and_score_completions(self, inputs):
                batch = super()._generate_and_score_completions(inputs)
                if len(inputs) == 24:
                    # a group with a signal loses it, a row of another stands out
                    batch["advantages"][:6] = 0
                    batch["advantages"][-1] = 5.0
                return batch

        return watched(Edited)

    def capped(**kwargs):
        # of equal halves the std is exactly 0
        return [min(value, 0.5) for value in score(**kwargs)]

    dataset = Dataset.from_list([{"prompt": f"{kind}{i}"} for i, kind in enumerate("ufuuuffu")])
    settings = {
        **SIX,
        "rewards": [capped],
        "dataset": dataset,
        "shuffle_dataset": False,
        "scale_rewards": "batch",
        "max_steps": 1,
    }
    trainer = trained(grpo_fast, tmp_path, make_class, dynamic_sampling_rounds=2, **settings)
    (batch,), rounds = trainer.batches, trainer.rounds[0]
    first, last = groups_of(rows_of(rounds[0][1]), 6), groups_of(rows_of(batch), 6)
    assert is_useful(first[0])
    assert last[0] != first[0]
    assert last[-1] == first[-1]
    assert batch["advantages"][-1] == 5.0
    values = [min(value_of(prompt[0], ids), 0.5) for prompt, ids in rows_of(batch)]
    rewards = torch.tensor(values, dtype=torch.float64)[:, None]
    expected = group_advantages(
        rewards, torch.ones(1), num_generations=6, scale_rewards="batch", aggregation="sum_then_normalize"
    ).advantages
    is_left = batch["advantages"] != 5.0
    assert is_left.sum() >= 18
    # the last round, a flat group, had a std of 0; all that was seen has not
    assert [len(inputs) for inputs, _ in rounds] == [24, 12, 6]
    assert line_of(trainer, "frac_reward_zero_std") == [0.0]
    torch.testing.assert_close(batch["advantages"][is_left].double(), expected[is_left], rtol=1e-5, atol=1e-5)


def test_a_signal_of_a_subclass_is_one(tmp_path):
    def make_class(base):
        class Curious(base):
            def _generate_and_score_completions(self, inputs):
                batch = super()._generate_and_score_completions(inputs)
                batch["advantages"][::6] += 0.25
                return batch

        return watched(Curious)

    settings = {**SIX, "dataset": Dataset.from_list(rows(5, 0)), "max_steps": 1}
    trainer = trained(grpo_fast, tmp_path, make_class, dynamic_sampling_rounds=3, **settings)
    assert line_of(trainer, "dynamic_sampling/rounds") == [0]
    assert trainer.batches[0]["advantages"][::6].tolist() == [pytest.approx(0.25, abs=1e-3)] * 4


def test_a_subclasses_keys_follow_their_rows(tmp_path):
    settings = {**SIX, "dataset": Dataset.from_list(rows(9, 6)), "per_device_train_batch_size": 12}
    trainer = trained(
        grpo_fast, tmp_path, subclasses.keys_of_its_own, steps_per_generation=2, dynamic_sampling_rounds=2, **settings
    )
    # it compares prompts and texts in its loss
    assert trainer.seen
    assert sum(line_of(trainer, "dynamic_sampling/groups_replaced")) > 0


def test_a_subclass_that_drops_rows_is_refused(tmp_path):
    def make_class(base):
        class Half(base):
            def _generate_and_score_completions(self, inputs):
                batch = super()._generate_and_score_completions(inputs)
                return {name: value[::2] if value.dim() else value for name, value in batch.items()}

        return Half

    with pytest.raises(ValueError, match=r"its completion_mask must be a tensor of 24 rows, .* it is 12 rows"):
        trained(grpo_fast, tmp_path, make_class, dynamic_sampling_rounds=1, **SIX)


def test_a_sampler_of_ones_own_does_not_choose_further_prompts(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    dataset = Dataset.from_list(rows(9, 3))
    trained(
        grpo_fast, tmp_path, subclasses.in_order, dataset=dataset, dynamic_sampling_rounds=1, **SIX | {"max_steps": 2}
    )
    assert caplog.text.count("_get_train_sampler of InOrder do not choose them") == 1


# -- kinds of rollouts -------------------------------------------------------------------------------------------------


def test_tools_replies_stay_out_of_the_loss(tmp_path):
    """Every other completion calls a tool, so rounds differ in width, and rows in their masks."""
    tokenizer = make_chat_tokenizer(HERMES.template, HERMES.eos)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'

    def last_letter(prompts, completions, **kwargs):
        return [
            0.0 if "flat" in prompt[0]["content"] else ord(messages[-1]["content"][-1:] or "a") / 64
            for prompt, messages in zip(prompts, completions, strict=True)
        ]

    trainer = trained(
        grpo_fast,
        tmp_path,
        lambda base: watched(subclasses.scripted_tools(base)),
        model=functools.partial(make_model, seed=SEED, vocab_size=len(tokenizer), max_position_embeddings=512),
        processing_class=tokenizer,
        dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": kind * i}] for i in range(1, 6) for kind in ("flat", "row")]}
        ),
        rewards=[last_letter],
        tools=[weather],
        script=encode(tokenizer, call),
        max_completion_length=256,
        dynamic_sampling_rounds=2,
        max_steps=2,
    )
    assert sum(line_of(trainer, "dynamic_sampling/groups_replaced")) > 0
    assert line_of(trainer, "tools/call_frequency") == [0.5, 0.5]
    for rounds, batch in zip(trainer.rounds, trainer.batches, strict=False):
        known = {}
        for _, output in rounds:
            for row, mask in zip(rows_of(output), output["tool_mask"], strict=True):
                known[str(row)] = mask[: len(row[1])].tolist()
        for row, mask in zip(rows_of(batch), batch["tool_mask"], strict=True):
            assert mask[: len(row[1])].tolist() == known[str(row)]
        counted = (batch["tool_mask"] * batch["completion_mask"]).sum()
        assert counted == batch["num_items_in_batch"] < batch["completion_mask"].sum()


class Episode:
    """Scores nothing in flat episodes."""

    def reset(self, kind, **row):
        self.kind = kind

    def press(self, times: int) -> int:
        """Press the button.

        Args:
            times: How often.
        """
        return times

    def get_reward(self):
        return 0.0 if self.kind == "flat" else torch.rand(()).item()


@pytest.mark.filterwarnings("ignore:environment_factory is experimental")
def test_environments_begin_anew_in_every_round(tmp_path):
    tokenizer = make_chat_tokenizer(HERMES.template, HERMES.eos)
    asked = [{"role": "user", "content": "go"}]
    trainer = trained(
        grpo_fast,
        tmp_path,
        model=functools.partial(make_model, seed=SEED, vocab_size=len(tokenizer), max_position_embeddings=512),
        processing_class=tokenizer,
        dataset=Dataset.from_list([{"prompt": asked, "kind": kind} for kind in ("flat", "other") * 4]),
        rewards=[],
        environment_factory=Episode,
        dynamic_sampling_rounds=4,
        max_steps=2,
    )
    assert sum(line_of(trainer, "dynamic_sampling/groups_replaced")) > 0
    assert line_of(trainer, "dynamic_sampling/groups_silent") == [0, 0]


def test_rows_with_images_take_the_places_of_rows_without(tmp_path, monkeypatch):
    def reward(prompts, completion_ids, **kwargs):
        texts = [prompt[-1]["content"][-1]["text"] for prompt in prompts]
        return [0.0 if "1" in text else sum(ids) % 7 / 7 for text, ids in zip(texts, completion_ids, strict=True)]

    monkeypatch.setattr(images, "token_reward", reward)
    shown = [images.IMAGES[0], [], images.IMAGES[1]]
    trainer, weights = images.trained(
        grpo_fast, tmp_path, "idefics3", shown, beta=0.1, dynamic_sampling_rounds=3, logging_steps=2
    )
    assert weights.isfinite().all()
    assert sum(line_of(trainer, "dynamic_sampling/groups_replaced")) > 0


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_stream", "step"), [(False, 2), (True, 4)], ids=["a set, in a generation", "a stream, after one"]
)
def test_a_resumed_run_is_the_straight_one(tmp_path, is_stream, step):
    dataset = Dataset.from_list(rows(5, 4))
    if is_stream:
        dataset = dataset.to_iterable_dataset(num_shards=2)
    settings = {
        "dataset": dataset,
        "rewards": [score],
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "dynamic_sampling_rounds": 2,
        "max_steps": 6,
    }
    straight = trained(grpo_fast, tmp_path, save_strategy="steps", save_steps=step, **settings)
    resumed = build(grpo_fast, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "grpo_fast" / f"checkpoint-{step}"))
    assert torch.equal(weights_of(resumed), weights_of(straight))
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(CLOCKED)} for line in trainer.state.log_history]
        for trainer in (straight, resumed)
    ]
    assert lines[0][:-1] == lines[1][:-1]
    # in the rollouts before the checkpoint and in those after it
    assert [value > 0 for value in line_of(straight, "dynamic_sampling/rounds")] == [True] * 2


# -- two processes -----------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from datasets import Dataset

import grpo_fast
from grpo_fast.advantages import group_advantages
from tests.test_refilling import groups_of, is_useful, line_of, rows_of, score, value_of, watched
from tests.trainer_runs import build, weights_of

folder = Path(sys.argv[1])
# three prompts a process; then two further ones a process, as the second misses two; then one
KINDS = ("fuu", "ffu", "fu", "fu", "u", "f")
kinds = "".join(KINDS) + "fufu"
dataset = Dataset.from_list([{"prompt": f"{kind * (1 + i % 4)}{i}=", "i": i} for i, kind in enumerate(kinds)])
settings = {"ddp_backend": "gloo", "rewards": [score], "per_device_train_batch_size": 6, "shuffle_dataset": False,
            "num_generations": 4, "steps_per_generation": 2, "scale_rewards": "batch", "dynamic_sampling_rounds": 2,
            "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "dataset": dataset}
trainer = build(grpo_fast, folder, watched, **settings)
rank = trainer.accelerator.process_index
trainer.train()
batch, rounds = trainer.batches[0], trainer.rounds[0]
assert [[row["i"] for row in inputs[::4]] for inputs, _ in rounds] == [
    list(range(3 * rank, 3 * rank + 3)), [6 + 2 * rank, 7 + 2 * rank], [10 + rank]
]
groups = groups_of(rows_of(batch), 4)
assert [is_useful(group) for group in groups] == ([True, True, True], [True, False, True])[rank]
counts = {"rounds": 2, "groups_seen": 12, "groups_replaced": 2, "groups_silent": 1}
assert {name: line_of(trainer, f"dynamic_sampling/{name}")[0] for name in counts} == counts
# the batch of all processes
everything = gather_object(rows_of(batch))
assert int(batch["num_items_in_batch"]) == sum(len(ids) for _, ids in everything)
rewards = torch.tensor([[value_of(p[0], ids)] for p, ids in everything], dtype=torch.float64)
expected = group_advantages(
    rewards, torch.ones(1), num_generations=4, scale_rewards="batch", aggregation="sum_then_normalize"
).advantages[12 * rank : 12 * rank + 12]
torch.testing.assert_close(batch["advantages"].double(), expected, rtol=1e-5, atol=1e-5)
seen = gather_object([row for _, output in rounds for row in rows_of(output)])
mean = sum(value_of(p[0], ids) for p, ids in seen) / len(seen)
assert line_of(trainer, "reward")[0] == pytest.approx(mean, rel=1e-5)
others = [torch.zeros_like(weights_of(trainer)) for _ in range(2)]
dist.all_gather(others, weights_of(trainer))
assert torch.equal(*others), "the processes' weights differ"

resumed = build(grpo_fast, folder, watched, **settings)
resumed.train(resume_from_checkpoint=str(folder / "grpo_fast" / "checkpoint-2"))
assert [len(inputs) for inputs, _ in resumed.rounds[0]] == [len(inputs) for inputs, _ in trainer.rounds[1]]
assert torch.equal(weights_of(resumed), weights_of(trainer)), "the resumed run differs"

with pytest.raises(ValueError, match=r"per_device_train_batch_size \\(6\\) x steps_per_generation \\(1\\) = 6 must be"):
    build(grpo_fast, folder, **settings | {"steps_per_generation": 1})
"""


def test_two_processes_refill_together(tmp_path):
    launch_text(SCRIPT, tmp_path, tmp_path)
