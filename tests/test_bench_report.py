"""The report: what stands beside what, what is said of a bad file, and the page on canned results."""

import json
import sys
from dataclasses import asdict

import pytest

from bench import profiles_table, report, results_file
from bench.report_tables import from_markdown, tables_of
from bench.results_file import BadResult, read_result

MACHINE = {
    "commit": "c0ffee",
    "date": "2026-11-27T20:00:00+00:00",
    "cpu": "AMD EPYC",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "power_limit_w": 700.0,
    "cores": 16,
    "memory_mib": 131072,
    "versions": {"torch": "2.11.0", "trl": "1.16.0", "vllm": None},
}


def make_benchmark(label, seconds, *, op="scoring", shape="Qwen3-8B/8192", **info):
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.1 * seconds, "rounds": 7}
    fields = {"op": op, "shape": shape, "dtype": "bf16", "data": "peaked", "label": label, "is_ours": label == "ours"}
    return {"name": f"{op}[{label}]", "stats": stats, "extra_info": fields | info}


def write(folder, name, benchmarks, **machine):
    content = {"benchmarks": benchmarks, "machine": MACHINE | machine, "datetime": "2026-11-27T21:00:00"}
    path = folder / name
    path.write_text(json.dumps(content))
    return path


FLOOR = {"floor_seconds": 0.5, "peak_source": "published: H200", "memory_lower_bound_mib": 100.0}


@pytest.fixture
def kernels(tmp_path):
    return write(
        tmp_path,
        "kernels.json",
        [
            make_benchmark(
                "ours", 1.0, **FLOOR, peak_mib=150.0, share_of_floor=0.5, tflops=400.0, absent={"cce": "needs CUDA"}
            ),
            make_benchmark("trl", 2.5, **FLOOR, peak_mib=1000.0, share_of_floor=0.2, failed={"liger": "OutOfMemory"}),
            make_benchmark("ours", 3.0, shape="Qwen3-1.7B/8192"),
        ],
    )


def test_a_case_is_a_table_with_ratios_and_what_is_absent(kernels):
    first, second = tables_of(read_result(kernels))
    assert first.title == "scoring: Qwen3-8B/8192, bf16, peaked"
    assert first.head == [
        "", "median s (quartiles, rounds)", "/ ours", "of the floor", "TFLOP/s", "peak MiB", "/ memory's lower bound"
    ]  # fmt: skip
    assert first.rows == [
        ["ours", "1 (0.9 - 1.1, 7)", "1.00", "50%", "400", "150.0", "1.50"],
        ["trl", "2.5 (2.25 - 2.75, 7)", "2.50", "20%", "", "1000.0", "10.00"],
        ["cce", "absent: needs CUDA", "", "", "", "", ""],
        ["liger", "failed: OutOfMemory", "", "", "", "", ""],
    ]
    assert first.notes == ("floor: 0.5 s (published: H200)",)
    assert second.rows == [["ours", "3 (2.7 - 3.3, 7)", "1.00"]]


def test_steps_show_their_phases_and_sequences_what_is_published(tmp_path):
    phases = {"train": 1.0, "backward": 2.0, "generation": 0.0}
    published = {"label": "TRL 1.15", "tokens": 114688, "source": "https://example.org"}
    path = write(
        tmp_path,
        "step.json",
        [
            make_benchmark("ours", 3.0, op="step", shape="rag", phases_seconds=phases, tokens=1500, clock="wall"),
            make_benchmark(
                "ours", 3.0, op="longest sequence", shape="G", tokens=8000, published=published, compared="tokens"
            ),
            make_benchmark("trl", 1.0, op="longest sequence", shape="G", tokens=2000, compared="tokens"),
        ],
    )
    step, memory = tables_of(read_result(path))
    assert step.rows == [["ours", "3 (2.7 - 3.3, 7)", "1.00", "1500", "train 1, backward 2"]]
    assert step.notes == ("clock: wall",)
    assert memory.head == ["", "median s (quartiles, rounds)", "tokens / ours", "tokens"]
    assert [row[2:] for row in memory.rows] == [["1.00", "8000"], ["0.25", "2000"]]
    assert memory.notes == ("published by others, another run: TRL 1.15: 114688 tokens, https://example.org",)


def test_plots_are_of_what_has_a_floor(kernels):
    ((op, panels),) = report.plots_of(read_result(kernels).figures)
    shape = "Qwen3-8B/8192 bf16 peaked"
    assert op == "scoring"
    assert panels["time / floor"] == {"ours": {shape: 2.0}, "trl": {shape: 5.0}}
    assert panels["peak memory / lower bound"] == {"ours": {shape: 1.5}, "trl": {shape: 10.0}}
    assert report.plots_of([]) == []


@pytest.mark.parametrize(
    "other",
    [{"commit": "decaf"}, {"gpu": "NVIDIA H100"}, {"power_limit_w": 400.0}, {"driver": "570"}, {"commit": None}],
    ids=lambda other: str(*other),
)
def test_other_machines_and_commits_stand_apart(tmp_path, kernels, other):
    same = write(tmp_path, "same.json", [make_benchmark("ours", 7.0)], date="2026-11-28T20:00:00+00:00")
    apart = write(tmp_path, "apart.json", [make_benchmark("ours", 9.0)], **other)
    results = [read_result(path) for path in (kernels, apart, same)]
    sections = report.by_origin(results)
    assert [[file.path.name for file in files] for files in sections.values()] == [
        ["kernels.json", "same.json"],
        ["apart.json"],
    ]


def test_uncommitted_changes_may_be_others_each_time(tmp_path):
    paths = [write(tmp_path, name, [], commit="c0ffee-dirty") for name in ("a.json", "b.json")]
    assert len(report.by_origin([read_result(path) for path in paths])) == 2


def test_scripts_and_pytest_name_a_machine_alike(tmp_path, kernels):
    script = MACHINE | {"gpu": "NVIDIA H200, 580.1, 700.00 W", "lines": []}
    script = {name: value for name, value in script.items() if name not in ("driver", "power_limit_w")}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(script))
    assert read_result(path).origin == read_result(kernels).origin


def test_the_page_holds_all_of_it(tmp_path, kernels, capsys):
    out = tmp_path / "pages" / "report.html"
    assert report.main([str(kernels), "--out", str(out)]) == 0
    text = out.read_text()
    for part in (
        "c0ffee",
        "NVIDIA H200, 16 cores",
        "kernels.json, 2026-11-27T21:00:00",
        "torch 2.11.0",
        "2.50",
        "<svg",
    ):
        assert part in text
    assert "vllm" not in text
    # of nothing outside it
    assert "<img" not in text
    assert "<link" not in text
    assert report.main([str(kernels), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == text
    assert capsys.readouterr().err == ""


def test_without_matplotlib_there_are_tables_and_one_word_of_it(tmp_path, kernels, capsys, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    out = tmp_path / "report.html"
    assert report.main([str(kernels), str(kernels), "--out", str(out)]) == 0
    text = out.read_text()
    assert text.count(report.NO_PLOTS) == 1
    assert "<svg" not in text
    assert "2.50" in text
    assert capsys.readouterr().err == report.NO_PLOTS + "\n"


def test_words_of_a_result_are_no_markup(tmp_path):
    path = write(tmp_path, "a.json", [make_benchmark("<b>ours", 1.0)], commit="<script>")
    text = report.page([read_result(path)])
    assert "<b>" not in text
    assert "<script>" not in text
    assert "&lt;b&gt;ours" in text


def without(record, *path):
    if len(path) == 1:
        return {name: value for name, value in record.items() if name != path[0]}
    return record | {path[0]: without(record[path[0]], *path[1:])}


GOOD = {"benchmarks": [make_benchmark("ours", 1.0)], "machine": MACHINE, "datetime": "2026-11-27"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "an object was needed at the top, got an array"),
        ({"a": 1, "b": 2}, "field benchmarks, or those of a script .* were needed, got a, b"),
        (without(GOOD, "machine"), "field machine is missing: only what `pytest bench/` wrote"),
        (without(GOOD, "datetime"), "field datetime is missing"),
        (without(GOOD, "machine", "commit"), "field machine.commit is missing"),
        (GOOD | {"machine": MACHINE | {"cores": "16"}}, "field machine.cores: a whole number was needed, got a string"),
        (GOOD | {"benchmarks": {}}, "field benchmarks: an array was needed, got an object"),
        (GOOD | {"benchmarks": [1]}, r"field benchmarks\[0\]: an object was needed, got a whole number"),
        (
            GOOD | {"benchmarks": [without(make_benchmark("ours", 1.0), "extra_info", "op")]},
            r"field benchmarks\[0\].extra_info.op is missing",
        ),
        (
            GOOD
            | {"benchmarks": [make_benchmark("ours", 1.0), make_benchmark("trl", 1.0) | {"stats": {"median": None}}]},
            r"field benchmarks\[1\].stats.median: a number was needed, got null",
        ),
        (
            GOOD | {"benchmarks": [make_benchmark("ours", 1.0, absent=["cce"])]},
            r"field benchmarks\[0\].extra_info.absent: an object was needed, got an array",
        ),
        (MACHINE | {"lines": [{"what": "product"}]}, "not what bench_tiles writes .*'amount'"),
    ],
)
def test_a_bad_file_is_named_with_its_field(tmp_path, capsys, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BadResult, match=f"bad.json: .*{message}"):
        report.page([read_result(path)])
    assert report.main([str(path), "--out", str(tmp_path / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")
    assert not (tmp_path / "report.html").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadResult, match=r"nowhere.json: cannot be read: No such file"):
        read_result(tmp_path / "nowhere.json")


def test_our_own_results_can_be_read(tmp_path):
    out = tmp_path / "report.html"
    assert report.main(["--out", str(out)]) == 0
    assert "the main job, seed 0" in out.read_text()


def test_length_profiles_are_shown(tmp_path):
    fields = {"profile": "rag", "scale": 1.0, "layers": 3, "vocabulary": 64, "rows": "rows", "true_tokens": 1000}
    fields |= {"longest": (90, 40), "wall_s": [1.0] * 16, "peak_rss_mib": 9.0, "loaded_rss_mib": 5.0, "threads": 1}
    runs = [
        asdict(profiles_table.Measured(label=label, passes=[[n]] * 16, cpu_s=[n] * 16, peak_cuda_mib=None, **fields))
        for label, n in (("trl", 80), ("grpo-fast", 10))
    ]
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(MACHINE | {"counted": runs, "timed": runs}))
    tokens, seconds = tables_of(read_result(path))
    assert tokens.rows[0][-2:] == ["8.00", "7.8 (met)"]
    assert seconds.title == "the training phase of one step, 3 layers of SmolLM2-135M"
    assert "8.00" in seconds.rows[0]


def test_pipe_tables_become_tables():
    text = "intro\n\n| a | b |\n|---|---|\n| 1 | x, y |\n\nnote\n| c |\n|---|\n| 2 |\n"
    first, second = from_markdown("title", text)
    assert (first.head, first.rows) == (["a", "b"], [["1", "x, y"]])
    assert (second.head, second.rows, second.notes) == (["c"], [["2"]], ("intro", "note"))


def test_the_command_is_a_module(tmp_path):
    assert report.main.__module__ == "bench.report"
    assert results_file.KINDS.keys() == sys.modules["bench.report_tables"].SCRIPTS.keys()
