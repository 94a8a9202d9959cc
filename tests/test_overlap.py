"""`overlap_rewards` with a real vLLM: groups are scored while others decode, and nothing else changes."""

import logging
import threading
import time

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from grpo_fast import GRPOConfig, GRPOTrainer, profiling
from grpo_fast.generation import progress
from grpo_fast.rewards import RewardCall
from grpo_fast.rewards.early import EarlyRewards
from tests.processes import launch_text
from tests.tiny_lm import CHARACTERS, make_model, make_tokenizer

G = 4
# far above what anything here takes, far below a hang
PATIENCE_S = 20
CPU = torch.device("cpu")


class Calls:
    """What reward functions saw, and where."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.rows, self.threads = [], set()

    def saw(self, name, completions):
        self.rows.append((name, len(completions)))
        self.threads.add(threading.current_thread())


CALLS = Calls()


def distinct(completions, answer, log_extra, log_metric, trainer_state, **kwargs):
    CALLS.saw("distinct", completions)
    log_extra("answers", [f"{a}:{text}" for a, text in zip(answer, completions, strict=True)])
    # halves: means of means are exact
    log_metric("half", 0.5)
    log_metric("step", trainer_state.global_step)
    return [len(set(text)) / 8 for text in completions]


def seldom(completions, answer, log_extra, **kwargs):
    CALLS.saw("seldom", completions)
    if 1 in answer:
        log_extra("ones", [a == 1 for a in answer])
    return [None if a == 0 else float(len(text) % 3) for a, text in zip(answer, completions, strict=True)]


async def awaited(prompts, completions, completion_ids, **kwargs):
    CALLS.saw("awaited", completions)
    return [len(prompt) + len(ids) / 16 for prompt, ids in zip(prompts, completion_ids, strict=True)]


def classifier():
    torch.manual_seed(9)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    trainer = GRPOTrainer(
        # vLLM's CPU attention takes heads of 32 and wider
        model=make_model(seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1),
        reward_funcs=[distinct, classifier(), seldom, awaited],
        reward_processing_classes=[None, make_tokenizer(), None, None],
        args=GRPOConfig(
            str(tmp_path_factory.mktemp("overlap")),
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            overlap_rewards=True,
            # one group at a time
            vllm_engine_kwargs={"max_num_seqs": G},
            per_device_train_batch_size=16,
            per_device_eval_batch_size=8,
            num_generations=G,
            max_completion_length=16,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            seed=5,
        ),
        train_dataset=Dataset.from_list(rows()),
        eval_dataset=Dataset.from_list(rows()[:2]),
        processing_class=make_tokenizer(),
    )
    yield trainer
    trainer.engine.close()


def rows():
    return [{"prompt": f"{'ab'[i % 2]}{i}=", "answer": i % 3} for i in range(4)]


def batch_of(rows):
    return [row for row in rows for _ in range(G)]


def rollout(trainer, inputs, *, overlap):
    """A generation batch from fixed random states, and all that it left in metrics and logs."""
    CALLS.reset()
    trainer.args.overlap_rewards = overlap
    # not in the rollout that happens to be the first
    trainer.sync_engine()
    trainer._metrics["train"].clear()
    trainer._logs["extra"].clear()
    trainer.model.train()
    torch.manual_seed(7)
    try:
        batch = trainer._timed_rollout(inputs)
    finally:
        trainer.args.overlap_rewards = True
    logs = {
        name: {key: list(values) for key, values in column.items()} if isinstance(column, dict) else list(column)
        for name, column in trainer._logs.items()
    }
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    metrics.pop("num_tokens")
    return batch, metrics, logs


def same(value, other):
    if isinstance(value, torch.Tensor):
        return torch.equal(value.nan_to_num(-1), other.nan_to_num(-1))
    # two NaNs count as one
    return repr(value) == repr(other)


def test_everything_equals_the_run_without_overlap(trainer):
    inputs = batch_of(rows())
    batch, metrics, logs = rollout(trainer, inputs, overlap=True)
    # each function once a group, away from the main thread
    assert sorted(CALLS.rows) == sorted([(name, G) for name in ("distinct", "seldom", "awaited")] * 4)
    assert threading.main_thread() not in CALLS.threads
    expected_batch, expected_metrics, expected_logs = rollout(trainer, inputs, overlap=False)
    assert CALLS.rows == [("distinct", 16), ("seldom", 16), ("awaited", 16)]
    assert batch.keys() == expected_batch.keys()
    for name, value in expected_batch.items():
        assert same(batch[name], value), name
    assert expected_batch["advantages"].unique().numel() > 8
    assert metrics.keys() == expected_metrics.keys()
    assert {"half", "step", "rewards/distinct/mean", "rewards/seldom/std"} < metrics.keys()
    assert same(metrics, expected_metrics)
    assert {name: len(values) for name, values in logs["extra"].items()} == {"answers": 16, "ones": 16}
    ones = [row["answer"] == 1 for row in inputs]
    # a column that is logged in some groups only is None in the others' rows
    assert logs["extra"].pop("ones") == [one or None for one in ones]
    assert expected_logs["extra"].pop("ones") == ones
    assert same(logs, expected_logs)
    assert len(logs["rewards"]) == 4


def test_a_slow_function_runs_while_later_groups_decode(trainer, monkeypatch):
    """Each call but the last waits until the engine has gone on; were generation over, it would wait in vain."""
    steps, spans = [], []
    step = trainer.engine.llm.llm_engine.step

    def timed_step():
        outputs = step()
        steps.append(time.monotonic())
        return outputs

    def slow(completions, **kwargs):
        start, before = time.monotonic(), len(steps)
        while len(spans) < 3 and len(steps) == before and time.monotonic() < start + PATIENCE_S:
            time.sleep(0.001)
        spans.append((start, time.monotonic()))
        return [0.0] * len(completions)

    monkeypatch.setattr(trainer.engine.llm.llm_engine, "step", timed_step)
    monkeypatch.setattr(trainer, "reward_funcs", [slow, *trainer.reward_funcs[1:]])
    rollout(trainer, batch_of(rows()), overlap=True)
    assert len(spans) == 4
    # the first call, at least, is over before the last group is decoded
    assert spans[0][1] < steps[-1]
    for start, end in spans[:1]:
        assert any(start < moment < end for moment in steps)


def test_each_function_is_profiled_once_a_batch(trainer, monkeypatch):
    def sent(overlap):
        names = []
        with monkeypatch.context() as patch:
            patch.setattr(profiling, "_send", lambda seconds, **where: names.extend(seconds))
            rollout(trainer, batch_of(rows()), overlap=overlap)
        return sorted(names)

    assert sent(True) == sent(False)
    assert sent(True).count("profiling/Time taken: GRPOTrainer.distinct") == 1


def test_neighbours_with_one_prompt_are_groups_of_their_own(trainer):
    inputs = batch_of([{"prompt": "a=", "answer": answer} for answer in (1, 2)])
    batch, _, logs = rollout(trainer, inputs, overlap=True)
    assert CALLS.rows.count(("distinct", G)) == 2
    expected, _, expected_logs = rollout(trainer, inputs, overlap=False)
    assert same(batch["advantages"], expected["advantages"])
    assert logs["extra"]["answers"] == expected_logs["extra"]["answers"]


def test_further_rounds_of_a_rollout_overlap_too(trainer, monkeypatch):
    def uneven(prompts, completions, **kwargs):
        CALLS.saw("uneven", completions)
        # two of the four prompts teach nothing
        return [0.5 if p[0] == "a" else len(set(text)) / 8 for p, text in zip(prompts, completions, strict=True)]

    for name, value in (("funcs", [uneven]), ("func_names", ["uneven"]), ("processing_classes", [None])):
        monkeypatch.setattr(trainer, f"reward_{name}", value)
    monkeypatch.setattr(trainer, "reward_weights", torch.ones(1))
    monkeypatch.setattr(trainer.args, "dynamic_sampling_rounds", 3)
    results, calls = [], []
    for overlap in (True, False):
        monkeypatch.setattr(trainer, "_further_prompts", None)
        results.append(rollout(trainer, batch_of(rows()), overlap=overlap))
        calls.append([count for _, count in CALLS.rows])
        assert (threading.main_thread() in CALLS.threads) is not overlap
    (batch, metrics, logs), (expected_batch, expected_metrics, expected_logs) = results
    assert calls[0] == [G] * int(metrics["dynamic_sampling/groups_seen"][0])
    assert calls[1][0] == 4 * G
    assert sum(calls[0]) == sum(calls[1])
    assert metrics["dynamic_sampling/groups_replaced"][0] > 0
    assert all(same(batch[name], value) for name, value in expected_batch.items())
    assert same(metrics, expected_metrics)
    assert same(logs["completion"], expected_logs["completion"])


def test_training_and_evaluation_overlap_on_one_engine(trainer, monkeypatch, capsys):
    inner = trainer.engine.llm.llm_engine
    # given by vllm_engine_kwargs; without them it would be a batch, 16
    assert inner.vllm_config.scheduler_config.max_num_seqs == G
    CALLS.reset()
    trainer.train()
    assert CALLS.rows.count(("distinct", G)) == len(CALLS.rows) / 3 == 2 * 4
    CALLS.reset()
    steps, step = [], inner.step
    # the engine's bar is due at every step
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.0)
    capsys.readouterr()
    monkeypatch.setattr(inner, "step", lambda: steps.append(1) or step())
    scores = trainer.evaluate()
    assert len(steps) > 1
    assert "/8 completions" in capsys.readouterr().err
    assert sorted(CALLS.rows) == sorted([(name, G) for name in ("distinct", "seldom", "awaited")] * 2)
    assert threading.main_thread() not in CALLS.threads
    assert scores["eval_rewards/distinct/mean"] > 0
    assert scores["eval_half"] == 0.5


# -- when something fails ----------------------------------------------------------------------------------------------


def fails(completions, answer, **kwargs):
    if 2 in answer:
        raise LookupError("no such answer")
    return [0.0] * len(completions)


async def fails_later(completions, answer, **kwargs):
    return fails(completions, answer)


def too_few(completions, answer, **kwargs):
    return [0.0] * (len(completions) - (2 in answer))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        # the third row of the data set, of four completions each
        (fails, RuntimeError, "'distinct' raised LookupError at step .* on row 8, completion .*: no such answer"),
        (fails_later, RuntimeError, "'distinct' raised LookupError at step .* on the group in rows 8 to 11: no such"),
        (too_few, ValueError, "'distinct' must return one value a completion: 4 completions, 3 values"),
    ],
)
def test_an_error_names_its_function_and_row_and_the_next_batch_is_fine(trainer, monkeypatch, function, error, message):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "reward_funcs", [function, *trainer.reward_funcs[1:]])
        with pytest.raises(error, match=message):
            rollout(trainer, batch_of(rows()), overlap=True)
    assert trainer._early_rewards is None
    batch, *_ = rollout(trainer, batch_of(rows()), overlap=True)
    assert len(batch["advantages"]) == 16


def test_an_error_in_generation_drops_what_has_not_begun():
    begun, may_end = threading.Event(), threading.Event()
    calls = []

    def slow(completions, **kwargs):
        calls.append(completions)
        begun.set()
        may_end.wait(PATIENCE_S)
        return [0.0]

    def group(first_row):
        return RewardCall(rows={"completions": [first_row]}, shared={}, step=0, first_row=first_row)

    early = EarlyRewards({0: (slow, "slow")}, CPU)

    def generate():
        with early:
            early.submit(group(0))
            early.submit(group(1))
            assert begun.wait(PATIENCE_S)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate()
    may_end.set()
    early._thread.shutdown(wait=True)
    assert calls == [[0]]


@pytest.mark.parametrize("is_grad_enabled", [True, False])
def test_scores_come_in_the_order_of_the_rows_under_the_callers_autograd(is_grad_enabled):
    modes = []

    def row(completions, **kwargs):
        modes.append(torch.is_grad_enabled())
        return completions

    with torch.set_grad_enabled(is_grad_enabled), EarlyRewards({3: (row, "row"), 5: (row, "again")}, CPU) as early:
        for first_row in (4, 0, 2):
            completions = [first_row, first_row + 1]
            early.submit(RewardCall(rows={"completions": completions}, shared={}, step=0, first_row=first_row))
        results = [
            (place, name, torch.cat([s.rewards for s in scores]).tolist()) for place, name, scores in early.results()
        ]
    assert results == [(3, "row", [0, 1, 2, 3, 4, 5]), (5, "again", [0, 1, 2, 3, 4, 5])]
    assert modes == [is_grad_enabled] * 6


# -- where overlap cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("engine", type("Other", (), {"name": "transformers"})(), "the engine is transformers, not vLLM in this"),
        ("rollout_func", print, "rollout_func generates"),
        ("tools", [print], "tools and environments act after a completion"),
        ("_is_vlm", True, "the prompts may have images"),
        ("_calculate_rewards", print, "_calculate_rewards of GRPOTrainer may change what is scored"),
        ("_generate", print, "_generate of GRPOTrainer may change"),
        ("_generate_single_turn", print, "_generate_single_turn of GRPOTrainer may change"),
        ("_generate_and_score_completions", print, "_generate_and_score_completions of GRPOTrainer may change"),
        ("reward_funcs", [torch.nn.Linear(1, 1)], "all rewards come from models"),
    ],
)
def test_what_stands_in_the_way_is_named(trainer, monkeypatch, name, value, reason):
    assert trainer._overlap_obstacle() is None
    monkeypatch.setattr(trainer, name, value)
    assert reason in trainer._overlap_obstacle()


def test_without_vllm_functions_are_called_once_a_batch_which_is_said_once(tmp_path, caplog):
    transformers_logging.get_logger("grpo_fast.trainer.overlap").warning_once.__func__.cache_clear()
    CALLS.reset()
    trainer = GRPOTrainer(
        model=make_model(),
        reward_funcs=[distinct],
        args=GRPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            overlap_rewards=True,
            per_device_train_batch_size=8,
            num_generations=G,
            max_completion_length=4,
            max_steps=2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows()),
        processing_class=make_tokenizer(),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert CALLS.rows == [("distinct", 8)] * 2
    assert CALLS.threads == {threading.main_thread()}
    assert caplog.text.count("overlap_rewards=True has no effect") == 1


TWO_PROCESSES = """
import sys
import torch
from datasets import Dataset
from grpo_fast import GRPOConfig, GRPOTrainer
from tests.tiny_lm import make_model, make_tokenizer

sizes = []


def distinct(completions, answer, log_extra, **kwargs):
    sizes.append(len(completions))
    assert len(set(answer)) == 1
    log_extra("answer", answer)
    return [len(set(text)) / 8 for text in completions]


trainer = GRPOTrainer(
    model=make_model(seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=1),
    reward_funcs=distinct,
    args=GRPOConfig(
        sys.argv[1], use_cpu=True, ddp_backend="gloo", bf16=False, use_vllm=True, overlap_rewards=True,
        per_device_train_batch_size=6, num_generations=4, max_completion_length=8, report_to="none", disable_tqdm=False,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"{i}=", "answer": i} for i in range(3)]),
    processing_class=make_tokenizer(),
)
rows = [{"prompt": f"{i}=", "answer": i} for i in range(3) for _ in range(4)]
rank = trainer.accelerator.process_index
# of the main process alone
assert trainer.engine._shows_progress == (rank == 0)
results = []
for overlap in (True, False):
    sizes.clear()
    trainer.args.overlap_rewards = overlap
    torch.manual_seed(rank)
    if not overlap:
        trainer.reward_funcs[0] = lambda completions, **kwargs: [len(set(text)) / 8 for text in completions]
    batch = trainer._timed_rollout(rows[6 * rank : 6 * rank + 6])
    results.append(batch["advantages"])
    if overlap:
        assert sorted(sizes) == [2, 4], sizes
        assert list(trainer._logs["extra"]["answer"]) == [row["answer"] for row in rows]
assert torch.equal(*results) and results[0].any(), results
trainer.engine.close()
"""


@pytest.mark.slow
def test_each_process_overlaps_its_own_rows_of_groups_that_straddle(tmp_path):
    launch_text(TWO_PROCESSES, tmp_path, tmp_path / "out")
