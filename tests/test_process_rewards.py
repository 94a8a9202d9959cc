"""Rewards of steps: the paper's formula written out, and whole runs whose gradients are those of the padded oracle."""

import functools
import logging
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.rewards.calling import DROP, DROPPED, RewardCall, call, call_async, gather
from grpo_fast.rewards.early import EarlyRewards
from grpo_fast.rewards.steps import StepScorer, mean_of, parsed_steps, process_reward, returns_steps
from grpo_fast.step_advantages import step_advantages
from tests.padded_loss import Inputs, Settings, padded_loss
from tests.padded_oracle import Padded, PaddedPolicy
from tests.processes import launch
from tests.tiny_lm import make_model, make_tokenizer

# float64 sums of a few dozen numbers, in another order
ATOL = 1e-12
# fp32 against float64: the tiny model's gradients, relative to their norm; see tests/test_composition.py
GRADIENT_RTOL = 2e-5
SCALES = ("group", "batch", "none")


def oracle(steps, lengths, *, num_generations, scale_rewards):
    """Section 4.1.3 of DeepSeekMath token by token, in Python's floats. A list of token advantages a completion."""

    def std(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    batch_std = std([value for row in steps for _, value in row])
    advantages = []
    for i, length in enumerate(lengths):
        start = i - i % num_generations
        rewards = [value for row in steps[start : start + num_generations] for _, value in row]
        scale = {"group": std(rewards) + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale_rewards] if rewards else 1
        normalised = [(end, (value - sum(rewards) / len(rewards)) / scale) for end, value in steps[i]]
        advantages.append([sum(z for end, z in normalised if end > t) for t in range(length)])
    return advantages


def draw_steps(lengths, seed):
    draw = random.Random(seed)
    ends = [sorted(draw.sample(range(1, n + 1), draw.randint(0, min(n, 4)))) for n in lengths]
    return [[(end, round(draw.uniform(-1, 2), 2)) for end in row] for row in ends]


@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("seed", range(5))
def test_the_formula(seed, scale_rewards):
    lengths = [random.Random(seed + 9).randint(0, 12) for _ in range(12)]
    steps = draw_steps(lengths, seed)
    # ends need not be in order, and several steps may end at one token
    steps[2] = [*steps[2][::-1], *steps[2][:1]]
    # a group whose steps are all alike
    steps[8:] = [[(end, 0.1) for end, _ in row] for row in steps[8:]]
    result = step_advantages(steps, num_generations=4, scale_rewards=scale_rewards)
    expected = oracle(steps, lengths, num_generations=4, scale_rewards=scale_rewards)
    for rows in (slice(0, 12), slice(3, 7), slice(11, 12)):
        ours = result.of_tokens(rows, 13)
        for row, values in zip(ours.tolist(), expected[rows], strict=True):
            assert row == pytest.approx(values + [0.0] * (13 - len(values)), abs=ATOL)
    assert result.is_equal.tolist() == [False] * 8 + [True] * 4
    # zeros without rounding: such rows are silent
    assert not result.of_tokens(slice(8, 12), 13).any()


def test_of_no_steps_and_of_one():
    none = step_advantages([[], []], num_generations=2, scale_rewards="batch")
    assert none.is_equal.all()
    assert none.of_tokens(slice(0, 2), 0).shape == (2, 0)
    one = step_advantages([[(1, 3.0)], []], num_generations=2, scale_rewards="batch")
    assert not one.of_tokens(slice(0, 2), 2).any()


# -- what functions return ---------------------------------------------------------------------------------------------


@process_reward
def given(completions, steps, **kwargs):
    return steps


@process_reward
async def given_async(completions, steps, **kwargs):
    return steps


def outcome(completions, score, **kwargs):
    return score


def batch_of(ids, steps, **kwargs):
    rows = {"completions": [""] * len(ids), "completion_ids": ids, "steps": steps}
    return RewardCall(rows=rows, shared={}, step=7, steps={"given": []}, **kwargs)


def test_a_call_gives_the_mean_and_keeps_the_steps():
    steps = [[(1, 1.0), (3, 0.0)], None, [], [[2, -1]]]
    for function in (given, given_async, functools.partial(given)):
        assert returns_steps(function)
        batch = batch_of([[1, 2, 3]] * 4, steps)
        if function is given_async:
            rewards = gather([call_async(function, "given", batch)])[0]
        else:
            rewards = call(function, "given", batch)
        assert [None if r != r else r for r in rewards.tolist()] == [0.5, None, None, -1.0]
        assert batch.steps == {"given": [[(1, 1.0), (3, 0.0)], [], [], [(2, -1.0)]]}
    assert mean_of([]) is None
    assert not returns_steps(outcome)


def test_drop_and_errors_that_are_forgiven():
    batch = batch_of([[1, 2]] * 2, [DROP, [(1, 3.0)]])
    assert call(given, "given", batch).tolist() == [DROPPED, 3.0]
    assert batch.steps == {"given": [[], [(1, 3.0)]]}

    @process_reward
    def fails_on_c(completions, steps, **kwargs):
        if "c" in completions:
            raise ZeroDivisionError
        return steps

    rows = {"completions": list("abcd"), "completion_ids": [[1]] * 4, "steps": [[(1, i)] for i in range(4)]}
    batch = RewardCall(rows=rows, shared={}, step=0, errors="none", steps={"given": []})
    assert call(fails_on_c, "given", batch).nan_to_num(nan=-1).tolist() == [0, 1, -1, 3]
    assert batch.steps == {"given": [[(1, 0.0)], [(1, 1.0)], [], [(1, 3.0)]]}

    @process_reward
    def fails(completions, steps, **kwargs):
        raise ZeroDivisionError

    batch = RewardCall(rows=rows, shared={}, step=0, errors="none", steps={"given": []})
    assert call(fails, "given", batch).isnan().all()
    assert batch.steps == {"given": [[]] * 4}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([(0, 1.0)], "for row 4, with ends from 1 to its 3 tokens"),
        ([(4, 1.0)], "for row 4"),
        ([(1.5, 1.0)], "for row 4"),
        ([(1, math.nan)], "finite rewards"),
        ([(1, math.inf)], "finite rewards"),
        ([(1, "a")], "for row 4"),
        ([(1, None)], "for row 4"),
        ([1.0], "for row 4"),
        (0.5, "for row 4"),
        ([(math.inf, 1.0)], "for row 4"),
    ],
)
def test_wrong_steps_are_named(row, message):
    with pytest.raises(ValueError, match=f"reward function 'given' must return pairs .*{message}"):
        call(given, "given", batch_of([[1], [1, 2, 3]], [[], row], first_row=3))


@pytest.mark.parametrize(
    ("values", "message"), [([[]], "2 completions, 1 lists"), (1.0, "it returned float 1.0"), ("ab", "it returned str")]
)
def test_wrong_lists_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        parsed_steps(values, "given", [[1], [1]])


def test_groups_that_are_scored_early_keep_their_steps():
    functions = {0: (given, "given"), 1: (given_async, "given_async")}
    with EarlyRewards(functions, torch.device("cpu")) as early:
        for first_row in (2, 0):
            rows = {"completions": [""] * 2, "completion_ids": [[1, 1]] * 2, "steps": [[(1, first_row)], None]}
            steps = {"given": [], "given_async": []}
            early.submit(RewardCall(rows=rows, shared={}, step=0, first_row=first_row, steps=steps))
        results = [[score.steps for score in scores] for _, _, scores in early.results()]
    assert results == [[[[(1, 0.0)], []], [[(1, 2.0)], []]]] * 2


def test_a_batch_of_groups_that_were_scored_early(tmp_path):
    trainer, _ = run(tmp_path, [outcome, given], STEPS, SCORES, max_steps=1)
    ids = completions_of(0)
    inputs = [{"prompt": PROMPTS[i // G], "steps": STEPS[i], "score": SCORES[i]} for i in range(8)]
    prompts, texts = [row["prompt"] for row in inputs], [""] * 8
    with EarlyRewards({1: (given, "given")}, torch.device("cpu")) as early:
        for part in (slice(4, 8), slice(0, 4)):
            group = trainer._reward_call(inputs[part], prompts[part], texts[part], ids[part], first_row=part.start)
            early.submit(group)
        trainer._early_rewards = early
        rewards = trainer._calculate_rewards(inputs, prompts, texts, ids)
    trainer._early_rewards = None
    assert trainer._steps == {"given": STEPS}
    torch.testing.assert_close(
        rewards[:, 1].tolist(), [math.nan if not s else mean_of(s) for s in STEPS], equal_nan=True
    )


def test_steps_of_texts():
    tokenizer = make_tokenizer()
    texts = ["ab\n\ncd\n\n", "\n\nab", "", "a\nb", "a\n\n\n\nb\n\n"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    ids[0].append(tokenizer.eos_token_id)
    seen = []

    def lengths(steps, completion_ids, **kwargs):
        seen.extend(steps)
        return [None if not row else [len(text) for text in row] for row in steps]

    reward = StepScorer(lengths, tokenizer)
    assert (reward.__name__, returns_steps(reward)) == ("lengths", True)
    result = reward(completion_ids=ids, completions=texts)
    assert seen == [["ab", "cd"], ["ab"], [], ["a\nb"], ["a", "b"]]
    assert result == [[(4, 2.0), (9, 2.0)], [(4, 2.0)], None, [(3, 3.0)], [(3, 1.0), (8, 1.0)]]
    with pytest.raises(ValueError, match="lengths returned 1 rewards for the 2 steps of row 0"):
        StepScorer(lambda steps, **_: [[1.0]] * len(steps), tokenizer, name="lengths")(completion_ids=ids[:1])
    with pytest.raises(ValueError, match="separator must not be empty"):
        StepScorer(lengths, tokenizer, separator="")


# -- whole runs --------------------------------------------------------------------------------------------------------

G, LENGTH = 4, 8
PROMPTS = ["ab=", "c="]


@dataclass
class Recorder(TrainerCallback):
    """Weights before each optimizer step, its micro-batches and its gradients."""

    weights: list = field(default_factory=list)
    micro_batches: list = field(default_factory=list)
    gradients: list = field(default_factory=list)

    def on_step_begin(self, *args, **kwargs):
        self.weights.append({k: v.detach().clone() for k, v in self.trainer.model.state_dict().items()})
        self.micro_batches.append([])

    def on_substep_end(self, *args, **kwargs):
        trainer = self.trainer
        inputs = trainer._buffered_inputs[(trainer._step - 1) % trainer.steps_per_generation]
        self.micro_batches[-1].append({k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)})

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.on_substep_end()
        self.gradients.append([p.grad.double().clone() for p in self.trainer.model.parameters()])


def completions_of(seed):
    """Two groups: lengths from 1 to the longest, one completion twice."""
    draw = random.Random(seed)
    rows = [[draw.randint(3, 30) for _ in range(n)] for n in (LENGTH, 3, 1, 5, 6, 6, 4, LENGTH)]
    return [*rows[:5], list(rows[4]), *rows[6:]]


def run(folder, reward_funcs, steps, scores, *, callbacks=(), subclass=GRPOTrainer, **kwargs):
    """A trainer after some steps on the same two groups, and what was recorded."""
    tokenizer, ids = make_tokenizer(), completions_of(0)

    def roll_out(prompts, trainer):
        places = [PROMPTS.index(prompt) * G + i % G for i, prompt in enumerate(prompts)]
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [ids[place] for place in places],
            "logprobs": None,
            "steps": [steps[place] for place in places],
            "score": [scores[place] for place in places],
            "place": places,
        }

    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": G,
        "max_completion_length": LENGTH,
        "max_tokens_per_pack": 16,
        "max_steps": 2,
        "learning_rate": 0.05,
        "max_grad_norm": 1e9,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
    } | kwargs
    recorder = Recorder()
    trainer = subclass(
        model=make_model(seed=1),
        reward_funcs=reward_funcs,
        args=GRPOConfig(str(folder), use_cpu=True, bf16=False, **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        rollout_func=roll_out,
        callbacks=[recorder, *callbacks],
    )
    recorder.trainer = trainer
    trainer.train()
    return trainer, recorder


def expected_advantages(steps, scores, weights=(1.0, 1.0), scale_rewards="group"):
    """Of each of the 8 completions' tokens: outcome and process."""
    ids = completions_of(0)
    tokens = oracle(steps, [len(row) for row in ids], num_generations=G, scale_rewards=scale_rewards)
    expected = []
    for i, row in enumerate(tokens):
        group = [s * weights[0] for s in scores[i - i % G : i - i % G + G] if s is not None]
        offset = 0.0
        if scores[i] is not None and scale_rewards == "group":
            mean = sum(group) / len(group)
            std = math.sqrt(sum((s - mean) ** 2 for s in group) / (len(group) - 1))
            offset = (scores[i] * weights[0] - mean) / (std + 1e-4)
        expected.append([offset + weights[1] * value for value in row])
    return expected


STEPS = draw_steps([len(row) for row in completions_of(0)], 3)
# the second of two equal completions has the same steps: rows are told apart by their tokens
STEPS[5] = STEPS[4]
SCORES = [1.0, 0.0, 0.0, 1.0, 0.5, 0.5, 2.0, 1.0]


def oracle_gradients(recorder, i, advantages, settings):
    """The gradients of the i-th optimizer step, in float64; old log-probs are of the weights that generated."""
    old = PaddedPolicy(make_model(seed=1), recorder.weights[0 if settings.num_iterations > 1 else i])
    policy = PaddedPolicy(make_model(seed=1), recorder.weights[i])
    ref = PaddedPolicy(make_model(seed=1), recorder.weights[0])
    by_ids = {tuple(ids): values for ids, values in zip(completions_of(0), advantages, strict=True)}
    micro_batches = recorder.micro_batches[i]
    num_items = sum(int(m["completion_mask"].sum()) for m in micro_batches)
    for inputs in micro_batches:
        prompts, completions = (
            [tuple(t for t, keep in zip(ids, mask, strict=True) if keep) for ids, mask in zip(*rows, strict=True)]
            for rows in (
                (inputs[f"{part}_ids"].tolist(), inputs[f"{part}_mask"].tolist()) for part in ("prompt", "completion")
            )
        )
        padded = Padded.of(prompts, completions, [True] * len(prompts))
        width = padded.is_scored.shape[1]
        rows = [by_ids[completion] for completion in completions]
        logps, entropies, _ = policy.score(padded, 1.0)
        with torch.no_grad():
            old_logps, ref_logps = old.score(padded, 1.0)[0], ref.score(padded, 1.0)[0]
        loss = padded_loss(
            logps,
            entropies,
            None,
            Inputs(
                mask=padded.is_scored,
                advantages=torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64),
                old_logps=old_logps,
                ref_logps=ref_logps,
                num_items=num_items,
                accumulation=2,
                steps_per_generation=2,
            ),
            Settings(
                loss_type=settings.loss_type,
                epsilon_low=settings.epsilon,
                epsilon_high=settings.epsilon_high or settings.epsilon,
                beta=settings.beta,
                use_bias_correction_kl=settings.use_bias_correction_kl,
                max_completion_length=LENGTH,
            ),
        )
        loss.value.backward()
    return [p.grad for p in policy.model.parameters()]


def assert_gradients(recorder, i, advantages, settings):
    expected = oracle_gradients(recorder, i, advantages, settings)
    size = torch.stack([g.norm() for g in expected]).norm()
    assert size > 1e-3
    difference = torch.stack([(a - b).norm() for a, b in zip(recorder.gradients[i], expected, strict=True)]).norm()
    assert difference <= GRADIENT_RTOL * size


CASES = {
    "dapo": {},
    "grpo, kl": {"loss_type": "grpo", "beta": 0.1},
    "iterations": {"num_iterations": 2, "epsilon": 0.05, "loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "num_iterations": 2, "epsilon_high": 1.2},
    "sapo, unshared": {"loss_type": "sapo", "share_prompts": False},
    "vespo": {"loss_type": "vespo", "num_iterations": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_oracles(name, tmp_path):
    trainer, recorder = run(
        tmp_path, [outcome, given], STEPS, SCORES, reward_weights=[1.0, 0.5], num_train_epochs=9, **CASES[name]
    )
    advantages = expected_advantages(STEPS, SCORES, weights=(1.0, 0.5))
    assert all(m["advantages"].shape == (4, LENGTH) for ms in recorder.micro_batches for m in ms)
    for i in range(2):
        assert_gradients(recorder, i, advantages, trainer.args)


def test_steps_alone_and_some_that_do_not_apply(tmp_path):
    steps = [None if i in (1, 6) else row for i, row in enumerate(STEPS)]
    trainer, recorder = run(tmp_path, given_async, steps, [None] * 8)
    advantages = expected_advantages([row or [] for row in steps], [None] * 8)
    assert_gradients(recorder, 1, advantages, trainer.args)
    line = trainer.state.log_history[0]
    means = [mean_of(row) for row in steps if row]
    assert line["rewards/given_async/mean"] == pytest.approx(sum(means) / len(means))
    assert line["reward"] == line["rewards/given_async/mean"]
    assert line["frac_reward_zero_std"] == 0
    shown = sorted(trainer._logs["advantages"])
    assert shown == pytest.approx(sorted(sum(row) / len(row) for row in advantages), abs=1e-5)


def test_a_dropped_completion_leaves_the_mean_of_its_groups_steps(tmp_path):
    steps, scores = [*STEPS], [*SCORES]
    scores[4] = scores[5] = DROP
    trainer, recorder = run(tmp_path, [outcome, given], steps, scores)
    kept = [[] if i in (4, 5) else row for i, row in enumerate(steps)]
    advantages = expected_advantages(kept, [None if score is DROP else score for score in scores])
    assert_gradients(recorder, 0, advantages, trainer.args)


def test_a_group_of_equal_steps_and_outcomes_is_silent(tmp_path):
    steps = [*STEPS[:4], *([(end, 0.1) for end, _ in row] for row in STEPS[4:])]
    scores = [*SCORES[:4], 0.1, 0.1, 0.1, 0.1]
    trainer, recorder = run(tmp_path, [outcome, given], steps, scores, skip_zero_gradient_rows=True)
    line = trainer.state.log_history[0]
    assert line["frac_reward_zero_std"] == 0.5
    assert line["rows/skipped"] == 4
    advantages = expected_advantages(steps, [*scores[:4], None, None, None, None])
    assert_gradients(recorder, 0, advantages, trainer.args)
    # a single token's advantage is enough
    steps[7] = [(1, 5.0)]
    trainer, recorder = run(tmp_path, [outcome, given], steps, scores, skip_zero_gradient_rows=True)
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 0
    assert_gradients(recorder, 0, expected_advantages(steps, [*scores[:4], *[None] * 4]), trainer.args)


def test_a_function_of_weight_0_only_watches(tmp_path):
    _, recorder = run(tmp_path, [outcome, given], STEPS, SCORES, reward_weights=[1.0, 0.0], max_steps=1)
    _, plain = run(tmp_path, [outcome], STEPS, SCORES, max_steps=1)
    for ours, theirs in zip(recorder.gradients[0], plain.gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
def test_scales(scale_rewards, tmp_path):
    _, recorder = run(tmp_path, given, STEPS, [None] * 8, scale_rewards=scale_rewards, max_steps=1)
    expected = expected_advantages(STEPS, [None] * 8, scale_rewards=scale_rewards)
    by_ids = {tuple(ids): values for ids, values in zip(completions_of(0), expected, strict=True)}
    for inputs in recorder.micro_batches[0]:
        columns = (inputs[name].tolist() for name in ("completion_ids", "completion_mask", "advantages"))
        for ids, mask, row in zip(*columns, strict=True):
            values = by_ids[tuple(ids[: sum(mask)])]
            assert row == pytest.approx(values + [0.0] * (LENGTH - len(values)), abs=1e-5)


def test_dynamic_sampling_replaces_groups_whose_steps_are_equal(tmp_path):
    steps = [*([(end, 0.1) for end, _ in row] for row in STEPS[:4]), *STEPS[4:]]
    trainer, recorder = run(tmp_path, [outcome, given], steps, [0.1] * 8, dynamic_sampling_rounds=2, max_steps=1)
    line = trainer.state.log_history[0]
    assert line["dynamic_sampling/groups_silent"] == 0
    assert line["dynamic_sampling/groups_replaced"] == 1
    assert all(m["advantages"].shape == (4, LENGTH) for m in recorder.micro_batches[0])
    assert all((m["advantages"] != 0).any(1).sum() >= 2 for m in recorder.micro_batches[0])


def test_evaluation_with_one_completion_a_prompt(tmp_path):
    trainer, _ = run(tmp_path, [outcome, given], STEPS, SCORES, max_steps=1, num_generations_eval=1)
    metrics = trainer.evaluate(eval_dataset=Dataset.from_dict({"prompt": PROMPTS}))
    assert math.isfinite(metrics["eval_loss"])
    assert "eval_rewards/given/mean" in metrics


class InParts(GRPOTrainer):
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        halves = [slice(0, 4), slice(4, 8)]
        return torch.cat(
            [
                super(InParts, self)._calculate_rewards(inputs[h], prompts[h], completions[h], completion_ids_list[h])
                for h in halves
            ]
        )


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'given' gives rewards of steps, which needs importance_sampling_level"):
        run(tmp_path, given, STEPS, SCORES, importance_sampling_level="sequence", loss_type="grpo")
    with pytest.raises(ValueError, match="'given' gives rewards of steps, which needs multi_objective_aggregation"):
        run(tmp_path, [outcome, given], STEPS, SCORES, multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ValueError, match="2 reward functions that give rewards of steps are named 'given'"):
        run(tmp_path, [given, functools.partial(given)], STEPS, SCORES)
    with pytest.raises(ValueError, match="'given' gives rewards of steps, so it must be called for all 8 completions"):
        run(tmp_path, given, STEPS, SCORES, subclass=InParts)


def main():
    """Two processes, each with half of every group of eight; the advantages must be those of the groups."""
    import sys

    logging.disable()
    steps, scores = STEPS[:4] * 2, SCORES[:4] * 2
    _, recorder = run(
        sys.argv[1],
        [outcome, given],
        steps,
        scores,
        max_steps=1,
        num_generations=8,
        ddp_backend="gloo",
        gradient_accumulation_steps=1,
    )
    (inputs,) = recorder.micro_batches[0]
    torch.save(inputs, f"{sys.argv[1]}.{torch.distributed.get_rank()}")


@pytest.mark.slow
def test_groups_in_two_processes(tmp_path):
    launch("-m", "tests.test_process_rewards", tmp_path / "out")
    lengths = [len(row) for row in completions_of(0)][:4] * 2
    tokens = oracle(STEPS[:4] * 2, lengths, num_generations=8, scale_rewards="group")
    group = SCORES[:4] * 2
    mean = sum(group) / 8
    std = math.sqrt(sum((s - mean) ** 2 for s in group) / 7)
    expected = sorted([v + (s - mean) / (std + 1e-4) for v in row] for row, s in zip(tokens, group, strict=True))
    ours = []
    for rank in range(2):
        inputs = torch.load(f"{tmp_path}/out.{rank}")
        lengths = inputs["completion_mask"].sum(1).tolist()
        ours += [row[:n] for row, n in zip(inputs["advantages"].tolist(), lengths, strict=True)]
    for row, values in zip(sorted(ours), expected, strict=True):
        assert row == pytest.approx(values, abs=1e-5)


if __name__ == "__main__":
    main()
