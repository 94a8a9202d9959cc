"""`DataTrainer`: the batches a trainer gets, in one process, in each of two, from sets and from streams."""

import itertools
import json
import logging

import pytest
import torch
from accelerate.data_loader import skip_first_batches
from datasets import Dataset, IterableDataset

from grpo_fast import GRPOConfig
from grpo_fast.trainer.dataloaders import DataTrainer, settle_stream_loading
from tests.processes import launch_text
from tests.tiny_lm import make_model, make_tokenizer

ROWS = [{"prompt": f"{i}", "x": i} for i in range(10)]
# 3 prompts x 2 completions a generation of 3 micro-batches, each generation used twice
BATCHES = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "num_generations": 2,
    "steps_per_generation": 3,
    "num_iterations": 2,
    "max_steps": 1,
}


def identity(rows):
    return rows


class Feeder(DataTrainer):
    """A `DataTrainer` and nothing else."""

    def __init__(self, args, **datasets):
        self.shuffle_dataset = args.shuffle_dataset
        self.num_generations = args.num_generations
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        self.num_iterations = args.num_iterations
        super().__init__(model=torch.nn.Linear(1, 1), args=args, data_collator=identity, **datasets)


def make(tmp_path, train=None, evaluation=None, **kwargs):
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **BATCHES | kwargs)
    train = Dataset.from_list(ROWS) if train is None else train
    settle_stream_loading(args, train, evaluation)
    return Feeder(args, train_dataset=train, eval_dataset=evaluation)


def stream(rows=ROWS, shards=1):
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


def numbers(loader):
    return [[row["x"] for row in batch] for batch in loader]


def drawn(loader):
    return set(itertools.chain(*numbers(loader)))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Dataset.from_list(ROWS), stream()], ids=["set", "stream"])
def test_a_batch_is_a_generation(tmp_path, source):
    loader = make(tmp_path, source, shuffle_dataset=False).get_train_dataloader()
    chunks = ([0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [6, 6, 7, 7, 8, 8])
    # steps_per_generation x num_iterations times each; row 9 makes no whole generation
    assert numbers(loader) == [chunk for chunk in chunks for _ in range(6)]


@pytest.mark.trl
@pytest.mark.parametrize("streaming", [False, True])
def test_shuffled_batches_are_trls(tmp_path, streaming):
    import trl

    settings = BATCHES | {"seed": 7, "max_completion_length": 4}
    source = stream() if streaming else Dataset.from_list(ROWS)
    ours = make(tmp_path, source, **settings).get_train_dataloader()
    theirs = trl.GRPOTrainer(
        model=make_model(),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings),
        train_dataset=stream() if streaming else source,
        processing_class=make_tokenizer(),
    ).get_train_dataloader()
    for epoch in range(2):
        ours.set_epoch(epoch)
        assert numbers(ours) == numbers(theirs)


def test_rows_of_a_batch_are_decoded_once(tmp_path):
    decoded = []

    def note(batch):
        decoded.extend(batch["x"])
        return batch

    source = Dataset.from_list(ROWS).with_transform(note)
    batches = numbers(make(tmp_path, source, shuffle_dataset=False).get_train_dataloader())
    assert sum(map(len, batches)) == 3 * 6 * 6
    assert decoded == list(range(9))


def test_workers_give_the_same_batches(tmp_path):
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1}
    alone, helped = (numbers(make(tmp_path, **kwargs).get_train_dataloader()) for kwargs in ({}, settings))
    assert alone == helped


def test_a_subclass_sampler_sees_the_data_set(tmp_path):
    class Hardest(Feeder):
        def _get_train_sampler(self, dataset=None):
            order = sorted(range(len(dataset)), key=lambda i: -dataset["x"][i])
            return [i for i in order[:3] for _ in range(2)]

    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **BATCHES)
    assert numbers(Hardest(args, train_dataset=Dataset.from_list(ROWS)).get_train_dataloader()) == [[9, 9, 8, 8, 7, 7]]


@pytest.mark.parametrize("source", [Dataset.from_list(ROWS), stream()], ids=["set", "stream"])
def test_unused_columns_go_only_when_asked(tmp_path, source):
    for remove, columns in ((False, {"prompt", "x"}), (True, {"prompt"})):
        loader = make(tmp_path, source, remove_unused_columns=remove).get_train_dataloader()
        assert set(next(iter(loader))[0]) == columns


@pytest.mark.parametrize("source", [Dataset.from_list(ROWS), stream()], ids=["set", "stream"])
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path, source):
    """Batches are skipped as `Trainer` does, in the second epoch."""
    loader = make(tmp_path, source, seed=3).get_train_dataloader()
    loader.set_epoch(1)
    straight = numbers(loader)
    resumed = skip_first_batches(make(tmp_path, source, seed=3).get_train_dataloader(), 7)
    resumed.set_epoch(1)
    assert numbers(resumed) == straight[7:]


# -- two processes -----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from accelerate.data_loader import skip_first_batches
from datasets import Dataset
from tests.test_dataloaders import ROWS, make, numbers, stream

out = Path(sys.argv[1])
sources = {"set": Dataset.from_list(ROWS), "stream": stream(), "two shards": stream(shards=2)}
batches = {}
for name, source in sources.items():
    kwargs = {"num_generations": 4, "num_iterations": 1, "ddp_backend": "gloo", "seed": 3}
    batches[name] = numbers(make(out, source, shuffle_dataset=False, **kwargs).get_train_dataloader())
    loader = make(out, source, **kwargs).get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches[f"{name}, epoch {epoch}"] = numbers(loader)
    # as `Trainer` resumes in the second epoch
    loader = skip_first_batches(make(out, source, **kwargs).get_train_dataloader(), 4)
    loader.set_epoch(1)
    batches[f"{name}, resumed"] = numbers(loader)
trainer = make(out, evaluation={"eval": stream(ROWS[:5], shards=2)}, **kwargs)
batches["eval"] = numbers(trainer.get_eval_dataloader("eval"))
(out / f"{trainer.args.process_index}.json").write_text(json.dumps(batches))
"""


def test_two_processes_share_each_generation(tmp_path):
    """3 prompts x 4 completions on 2 processes x 3 micro-batches of 2: the middle group straddles them."""
    launch_text(SCRIPT, tmp_path, tmp_path)
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    for name in ("set", "stream", "two shards"):
        assert first[name] == [b for x in (0, 3, 6) for b in [[x] * 4 + [x + 1] * 2] * 3]
        assert second[name] == [b for x in (0, 3, 6) for b in [[x + 1] * 2 + [x + 2] * 4] * 3]
        for batches in (first, second):
            assert batches[f"{name}, resumed"] == batches[f"{name}, epoch 1"][4:]
            assert batches[f"{name}, epoch 0"] != batches[f"{name}, epoch 1"]
    # whole groups, the last batch filled up with whole groups
    assert all(len(set(batch)) == 1 and len(batch) == 4 for batch in first["eval"] + second["eval"])
    assert {batch[0] for batch in first["eval"] + second["eval"]} == {0, 1, 2, 3, 4}


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [Dataset.from_list(ROWS), stream()], ids=["set", "stream"])
def test_evaluation_repeats_prompts_and_keeps_all(tmp_path, source):
    loader = make(tmp_path, evaluation=source, num_generations_eval=2).get_eval_dataloader()
    batches = numbers(loader)
    assert list(map(len, batches)) == [4, 4, 4, 4, 4]
    flat = [x for batch in batches for x in batch]
    assert flat[::2] == flat[1::2]
    assert sorted(flat[::2]) == list(range(10))
    assert flat[::2] != list(range(10))


def test_evaluation_sets_are_found_by_key_or_given(tmp_path):
    trainer = make(tmp_path, evaluation={"a": Dataset.from_list(ROWS[:2]), "b": stream(ROWS[2:4])})
    assert drawn(trainer.get_eval_dataloader("a")) == {0, 1}
    assert drawn(trainer.get_eval_dataloader("b")) == {2, 3}
    assert drawn(trainer.get_eval_dataloader(stream(ROWS[4:6]))) == {4, 5}
    with pytest.raises(ValueError, match=r"eval_dataset holds several sets, name one of \['a', 'b'\]"):
        trainer.get_eval_dataloader()
    with pytest.raises(ValueError, match="evaluation needs an eval_dataset"):
        make(tmp_path).get_eval_dataloader()


def test_persistent_workers_keep_their_loader_and_streams_have_none(tmp_path):
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    trainer = make(tmp_path, evaluation={"a": Dataset.from_list(ROWS), "b": stream()}, **settings)
    assert trainer.get_eval_dataloader("a") is trainer.get_eval_dataloader("a")
    assert trainer.get_eval_dataloader("b").num_workers == 0
    assert trainer.args.dataloader_num_workers == 1
    assert trainer.args.dataloader_persistent_workers is True


# -- settings of streams -----------------------------------------------------------------------------------------------


def test_a_training_stream_has_no_workers(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="grpo_fast.trainer.dataloaders"):
        trainer = make(tmp_path, stream(), dataloader_num_workers=2)
    assert "dataloader_num_workers becomes 0, it was 2" in caplog.text
    assert trainer.args.dataloader_num_workers == 0
    assert trainer.get_train_dataloader().num_workers == 0


@pytest.mark.parametrize("where", ["train", "evaluation", "evaluation dict"])
def test_streams_are_not_dispatched(tmp_path, where):
    datasets = {
        "train": {"train": stream()},
        "evaluation": {"evaluation": stream()},
        "evaluation dict": {"evaluation": {"a": stream()}},
    }[where]
    assert make(tmp_path, **datasets).args.accelerator_config.dispatch_batches is False
    with pytest.raises(ValueError, match="dispatch_batches must be False or None for an IterableDataset"):
        make(tmp_path, **datasets, accelerator_config={"dispatch_batches": True})
    assert make(tmp_path).args.accelerator_config.dispatch_batches is None


def test_a_stream_given_later_is_not_dispatched(tmp_path):
    trainer = make(tmp_path, evaluation=Dataset.from_list(ROWS), dataloader_num_workers=1)
    assert numbers(trainer.get_eval_dataloader(IterableDataset.from_generator(lambda: iter(ROWS))))
    trainer.args.accelerator_config.dispatch_batches = True
    with pytest.raises(ValueError, match="dispatch_batches must be False or None"):
        trainer.get_eval_dataloader(stream())
