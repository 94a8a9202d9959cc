"""The memory bench: its search on a known memory curve, its rows, and one real length."""

import json
import os
import subprocess
import sys

import pytest

from bench import bench_memory, longest, memory_child, models, shapes
from bench.longest import GRANULE, PRECISION, Point, find_longest


def curve(*, slope, fixed=0.0, square=0.0, budget=1000.0, shown="all"):
    """A measure function; what does not fit has a peak on a CPU ("all"), and none on a GPU that ran out ("fitting")."""
    asked = []

    def measure(length):
        asked.append(length)
        peak = fixed + slope * length + square * length**2
        fits = peak <= budget
        return Point(
            length=length,
            fits=fits,
            budget_mib=budget,
            peak_mib=peak if shown == "all" or (fits and shown == "fitting") else None,
        )

    return measure, asked


@pytest.mark.parametrize("shown", ["all", "fitting", "none"])
@pytest.mark.parametrize("start", [64, 1024, 20_000, 300_000])
@pytest.mark.parametrize(
    "memory", [{"slope": 0.05, "fixed": 100.0}, {"slope": 0.001, "square": 1e-6}], ids=["line", "curve"]
)
def test_the_boundary_is_found_to_two_percent(memory, start, shown):
    measure, asked = curve(**memory, shown=shown)
    found = find_longest(measure, start=start, limit=1_000_000)
    fits = [point.length for point in found.points if point.fits]
    too_long = [point.length for point in found.points if not point.fits]
    assert found.is_bounded
    assert found.longest.length == max(fits)
    assert max(fits) < min(too_long) <= max(max(fits) * (1 + PRECISION), max(fits) + GRANULE)
    assert len(set(asked)) == len(asked)
    assert all(length % GRANULE == 0 for length in asked)


def test_peaks_save_measurements():
    counts = {}
    for shown in ("all", "fitting", "none"):
        measure, asked = curve(slope=0.05, fixed=100.0, shown=shown)
        find_longest(measure, start=4096, limit=1_000_000)
        counts[shown] = len(asked)
    # without peaks: 4096, twice 2, and halves of 16384 to 2 %
    assert counts == {"all": 5, "fitting": 5, "none": 10}


def test_peaks_that_scatter_cost_little():
    asked = []

    def measure(length):
        asked.append(length)
        # steps of 6 MiB up and down
        peak = 34.0 + 0.0072 * length + (6.0 if length // GRANULE % 2 else 0.0)
        return Point(length=length, fits=peak <= 96.0, budget_mib=96.0, peak_mib=peak)

    found = find_longest(measure, start=4096, limit=16_384)
    assert len(asked) <= 7
    # either peak of that length could have been
    assert 7700 < found.longest.length < 8700


def test_a_limit_ends_the_search():
    measure, asked = curve(slope=0.0)
    found = find_longest(measure, start=1000, limit=3000)
    assert not found.is_bounded
    assert found.longest.length == 2944
    assert asked == [960, 1920, 2944]


def test_nothing_may_fit():
    measure, asked = curve(slope=1.0, fixed=2000.0)
    found = find_longest(measure, start=256, limit=1024)
    assert found.longest is None
    assert asked == [256, 128, 64]


@pytest.mark.parametrize(("start", "limit"), [(63, 1000), (2000, 1000)])
def test_a_start_outside_the_lengths_is_refused(start, limit):
    with pytest.raises(ValueError, match=f"start must be between 64 and limit={limit}, got {start}"):
        find_longest(curve(slope=1.0)[0], start=start, limit=limit)


def test_rows_have_the_length_and_both_rewards():
    (rows,) = memory_child.make_rows(100, vocabulary=64)
    assert [len(row.prompt) + len(row.completion) for row in rows] == [100, 100]
    assert [row.reward for row in rows] == [0.0, 1.0]
    assert rows[0].completion != rows[1].completion
    with pytest.raises(ValueError, match="length must be at least 18, got 17"):
        memory_child.make_rows(17, vocabulary=64)


def test_the_published_figure_is_of_the_same_case():
    assert bench_memory.CUDA_CASE.model == "Gemma-3-1B"
    assert bench_memory.CUDA_CASE.budget_mib == 79 * 1024
    assert bench_memory.PUBLISHED["tokens"] == 114_688
    # its own length is one that the search can find
    assert bench_memory.PUBLISHED["tokens"] % longest.GRANULE == 0


def test_models_have_their_heads():
    for name in shapes.HEADS.keys() & models.CONFIGS.keys():
        config = models.make_config(name)
        assert (config.hidden_size, config.vocab_size) == (shapes.HEADS[name].hidden, shapes.HEADS[name].vocab)
        heads = shapes.ATTENTION[name]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert (config.num_attention_heads, config.num_key_value_heads, width) == (
            heads.num_heads,
            heads.num_kv_heads,
            heads.width,
        )


@pytest.mark.parametrize(("name", "millions"), [("Gemma-3-1B", 1000), ("Qwen3-0.6B", 596), ("Qwen3-8B", 8191)])
def test_models_have_their_parameters(name, millions):
    model = models.make_model(name, device="meta")
    assert round(sum(param.numel() for param in model.parameters()) / 1e6) == millions


def test_a_slice_keeps_its_part_of_the_vocabulary():
    config = models.make_config("Qwen3-0.6B", layers=7)
    assert (config.num_hidden_layers, config.vocab_size) == (7, 151936 // 4)
    with pytest.raises(ValueError, match=r"layers must be 1 to 28 for Qwen3-0\.6B, got 29"):
        models.make_config("Qwen3-0.6B", layers=29)
    with pytest.raises(ValueError, match=r"model must be one of tiny, .*, got 'GPT'"):
        models.make_config("GPT")


def test_one_length_is_measured(tmp_path):
    out = tmp_path / "point.json"
    command = [sys.executable, "-m", "bench.memory_child", "grpo-fast", "--model", "tiny", "--length", "256"]
    command += ["--budget-mib", "1", "--settings", '{"checkpointed_layers": 2}', "--out", str(out)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    point = Point(**json.loads(out.read_text()))
    # a step of 256 tokens takes more than 1 MiB: gradients and moments of 0.4 M bf16 parameters alone do
    assert not point.fits
    assert 1 < point.peak_mib < 400
    assert point.seconds > 0
