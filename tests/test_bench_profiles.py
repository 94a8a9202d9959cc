"""The length profiles' bench: rows, tables on canned runs, and the counts of both trainers on short rows."""

import subprocess
import sys
import tempfile

import pytest

from bench import profile_rows as rows_of
from bench import profiles_child as child
from bench import profiles_table as table

# tokens over those of the true rows; sigmas are multiples of 0.05, which comes this close
PADDED = {"math": 2.71, "cot": 2.67, "r1": 3.16, "rag": 2.02, "agent": 1.92}
SHARED = {"math": 0.77, "cot": 0.91, "r1": 0.97, "rag": 0.26, "agent": 0.22}
RATIO_RTOL = 0.04


def make_measured(label, *, passes, cpu_s, rows="rows", profile="rag", true_tokens=1000, peak=1000.0, cuda=None):
    return table.Measured(
        label=label,
        profile=profile,
        scale=0.5,
        layers=3,
        vocabulary=64,
        rows=rows,
        true_tokens=true_tokens,
        longest=(90, 40),
        passes=passes,
        cpu_s=cpu_s,
        wall_s=[2 * s for s in cpu_s],
        peak_rss_mib=peak,
        loaded_rss_mib=500.0,
        peak_cuda_mib=cuda,
        threads=1,
    )


def cells(text, profile):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {profile} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("name", rows_of.PROFILES)
def test_rows_have_the_profile_s_ratios(name):
    groups = rows_of.draw_rows(rows_of.PROFILES[name], scale=1.0, vocabulary=64, seed=0)
    assert [len(rows) for rows in groups] == [8] * 8
    assert all(row.prompt == rows[0].prompt for rows in groups for row in rows)
    assert len({tuple(rows[0].prompt) for rows in groups}) == 8
    padded = 64 * sum(rows_of.longest(groups))
    shared = sum(len(rows[0].prompt) + sum(len(row.completion) for row in rows) for rows in groups)
    true = rows_of.true_tokens(groups)
    assert padded / true == pytest.approx(PADDED[name], rel=RATIO_RTOL)
    assert shared / true == pytest.approx(SHARED[name], rel=RATIO_RTOL)
    assert round(padded / shared, 1) >= rows_of.PROFILES[name].target


def test_rows_depend_on_the_seed_in_order_only():
    draws = [rows_of.draw_rows(rows_of.PROFILES["math"], scale=0.1, vocabulary=64, seed=seed) for seed in (0, 0, 1)]
    assert rows_of.digest(draws[0]) == rows_of.digest(draws[1]) != rows_of.digest(draws[2])
    lengths = [sorted(len(row.completion) for rows in draw for row in rows) for draw in draws]
    assert lengths[0] == lengths[2]
    # no group is without signal, and every completion ends
    assert all([row.reward for row in rows] == [0.0, 1.0] * 4 for rows in draws[0])
    assert all(row.completion[-1] == rows_of.EOS for rows in draws[0] for row in rows)


def test_lengths_are_quantiles_cut_and_then_scaled():
    assert rows_of.quantile_lengths(100, 0.5, 1, scale=1.0) == [100]
    low, high = rows_of.quantile_lengths(100, 0.5, 2, scale=1.0)
    # one and three quarters of the normal distribution lie at -+0.6745 sigma
    assert (low, high) == (71, 140)
    assert rows_of.quantile_lengths(100, 0.5, 2, scale=0.5, limit=120) == [36, 60]


def test_micro_batches_that_were_not_run_cost_what_the_later_ones_do():
    assert table.window([30.0, 10.0, 20.0]) == 60.0 + 13 * 15.0
    assert table.window([30.0]) == 16 * 30.0
    assert table.window([1.0] * 16) == 16.0


def test_tables_compare_tokens_and_seconds():
    peer = make_measured("trl", passes=[[300], [300]], cpu_s=[8.0, 6.0], peak=3000.0)
    ours = make_measured("grpo-fast", passes=[[200, 300], *[[]] * 14, [100]], cpu_s=[9.0, *[0.0] * 14, 1.0])
    text = table.tokens_table([peer, ours])
    assert cells(text, "rag") == ["90 + 40", "1000", "4.80", "0.60", "4800", "600", "8.00", "7.8 (met)"]
    # 98 s for TRL, 10 s for ours
    text = table.seconds_table([peer, ours])
    assert cells(text, "rag") == [
        *("x 0.5", "4800", "600", "8.00", "98 (2 of 16 run)", "10", "9.80", "123% (met)", "3000", "1000"),
    ]


def test_targets_can_be_missed():
    peer = make_measured("trl", passes=[[30]] * 16, cpu_s=[1.0] * 16)
    ours = make_measured("grpo-fast", passes=[[10]] * 16, cpu_s=[0.5] * 16)
    assert cells(table.tokens_table([peer, ours]), "rag")[-2:] == ["3.00", "7.8 (missed)"]
    assert cells(table.seconds_table([peer, ours]), "rag")[-3] == "67% (missed)"


def test_on_a_gpu_seconds_are_the_wall_clock_s_and_memory_the_device_s():
    peer = make_measured("trl", passes=[[30]] * 16, cpu_s=[1.0] * 16, cuda=700.0)
    ours = make_measured("grpo-fast", passes=[[10]] * 16, cpu_s=[0.25] * 16, cuda=200.0)
    text = table.seconds_table([peer, ours])
    assert "TRL wall s" in text
    assert cells(text, "rag")[4:] == ["32", "8", "4.00", "133% (met)", "700", "200"]


def test_a_part_of_a_step_is_no_count_where_micro_batches_differ():
    with pytest.raises(ValueError, match=r"grpo-fast's micro-batches differ \(\[30, 20\] tokens\): run all 16"):
        _ = make_measured("grpo-fast", passes=[[30], [20]], cpu_s=[1.0, 1.0]).tokens


def test_rows_are_compared():
    runs = [make_measured(label, passes=[[1]] * 16, cpu_s=[1.0] * 16) for label in ("trl", "grpo-fast")]
    assert table.same_rows(runs)
    assert not table.same_rows([runs[0], make_measured("grpo-fast", passes=[[1]], cpu_s=[1.0], rows="others")])


def count(label, *, micro_batches=16, **settings):
    return child.measure(label, "rag", scale=0.02, layers=None, micro_batches=micro_batches, settings=settings, seed=0)


@pytest.mark.filterwarnings("ignore:.*rollout_func:UserWarning")
def test_our_tokens_are_those_of_the_packs():
    never, always = (count("grpo-fast", share_prompts=share) for share in ("never", "always"))
    # a row's last completion token is not run
    assert never.tokens == never.true_tokens - 64
    assert always.tokens < never.tokens
    assert never.micro_batches == 16
    assert len(never.cpu_s) == 16
    assert never.seconds > 0


@pytest.mark.filterwarnings("ignore:.*rollout_func:UserWarning")
def test_a_step_s_phases_are_told_apart():
    step = child.Step(last=2, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        model = child.make_counted_model(attends=True)
        (rows, *_) = rows_of.draw_rows(rows_of.PROFILES["rag"], scale=0.02, vocabulary=64, seed=0)
        trainer = child.make_trainer(
            "grpo-fast", model, [rows], folder=folder, seed=0, bf16=False, max_steps=2, share_prompts="never"
        )
        step.watch(trainer)
        trainer.train()
    # the warm-up step is not in it: eight rows in micro-batches of four, without each row's last token
    assert step.begun == 2
    assert sum(map(sum, step.passes)) == sum(len(row.prompt) + len(row.completion) - 1 for row in rows)
    spent = {name: sum(seconds) for name, seconds in step.phases("cpu").items()}
    assert {name for name, seconds in spent.items() if seconds > 0} >= {"train", "backward", "optimizer"}
    assert [len(seconds) for seconds in step.phases("cpu").values()] == [2] * len(child.PHASES)
    assert sum(step.seconds("cpu")) == pytest.approx(spent["train"] + spent["backward"])


@pytest.mark.trl
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trl_s_tokens_are_those_of_its_padded_micro_batches():
    part, ours = count("trl", micro_batches=2), count("grpo-fast")
    assert part.passes == [[4 * sum(part.longest)]] * 2
    assert part.tokens == 64 * sum(part.longest)
    assert part.rows == ours.rows
    assert part.true_tokens == ours.true_tokens


def test_help_names_the_options():
    command = [sys.executable, "-m", "bench.bench_profiles", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for option in ("--profile", "--scale", "--layers", "--threads", "--whole-step", "--tokens-only", "--out"):
        assert option in done.stdout
