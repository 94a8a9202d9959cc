"""The demo's figures: `summary.json`, `report.md` with completions before and after, `curves.png`."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from grpo_fast.recipes.evaluate import Accuracy, Evaluation

MEAN_OVER = 5
NUM_EXAMPLES = 10
# log key, title, colour; dark enough to read on white, apart for colour-blind eyes too
PANELS = (
    ("reward", "Reward", "#0072B2"),
    ("completions/mean_length", "Completion length (tokens)", "#D55E00"),
    ("entropy", "Entropy (nats a token)", "#009E73"),
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `summary.json` holds.

    Accuracies are shares of the `num_heldout` held-out problems: `accuracy_*` greedy, `pass_at_1_*` the mean of
    `num_samples` samples each; `*_interval` are their 95 % intervals. `phase_seconds` are wall seconds a step.
    """

    preset: str
    model: str
    engine: str
    seed: int
    steps: int
    num_heldout: int
    num_samples: int
    accuracy_before: float
    accuracy_before_interval: tuple[float, float]
    accuracy_after: float
    accuracy_after_interval: tuple[float, float]
    pass_at_1_before: float
    pass_at_1_before_interval: tuple[float, float]
    pass_at_1_after: float
    pass_at_1_after_interval: tuple[float, float]
    train_seconds: float
    seconds_per_step: float
    cpu_seconds: float
    phase_seconds: dict[str, float]
    peak_rss_mb: float
    curves: dict[str, list[float]]

    @staticmethod
    def of_run(
        *,
        preset: str,
        model: str,
        engine: str,
        seed: int,
        before: Evaluation,
        after: Evaluation,
        history: list[dict[str, Any]],
        steps: int,
        train_seconds: float,
        cpu_seconds: float,
        peak_rss_mb: float,
    ) -> Summary:
        """The summary of a run from its evaluations and the trainer's log."""
        # the last entry sums the run up and has no reward
        logged = [entry for entry in history if "reward" in entry]
        return Summary(
            preset=preset,
            model=model,
            engine=engine,
            seed=seed,
            steps=steps,
            num_heldout=before.num_problems,
            num_samples=before.num_samples,
            accuracy_before=before.greedy.share,
            accuracy_before_interval=_interval(before.greedy),
            accuracy_after=after.greedy.share,
            accuracy_after_interval=_interval(after.greedy),
            pass_at_1_before=before.sampled.share,
            pass_at_1_before_interval=_interval(before.sampled),
            pass_at_1_after=after.sampled.share,
            pass_at_1_after_interval=_interval(after.sampled),
            train_seconds=train_seconds,
            seconds_per_step=train_seconds / max(steps, 1),
            cpu_seconds=cpu_seconds,
            phase_seconds=_phase_seconds(logged, train_seconds / max(steps, 1)),
            peak_rss_mb=peak_rss_mb,
            curves={key: _series(logged, key) for key in ("step", *(key for key, _, _ in PANELS))},
        )


def describe(summary: Summary) -> str:
    """The tables of a run as Markdown that reads well in a terminal too."""
    samples = summary.num_heldout * summary.num_samples
    accuracy = _table(
        ["held out", "n", "before", "95 %", "after", "95 %", "change"],
        [
            _accuracy_row(
                "greedy",
                str(summary.num_heldout),
                (summary.accuracy_before, summary.accuracy_before_interval),
                (summary.accuracy_after, summary.accuracy_after_interval),
            ),
            _accuracy_row(
                "sampled pass@1, T=1",
                str(samples) if summary.num_samples == 1 else f"{summary.num_heldout} x {summary.num_samples}",
                (summary.pass_at_1_before, summary.pass_at_1_before_interval),
                (summary.pass_at_1_after, summary.pass_at_1_after_interval),
            ),
        ],
    )
    per_step = [
        [phase, f"{seconds:.2f}", f"{seconds / summary.seconds_per_step:.0%}"]
        for phase, seconds in summary.phase_seconds.items()
    ]
    time = _table(["seconds a step", "wall", "share"], [*per_step, ["step", f"{summary.seconds_per_step:.2f}", "100%"]])
    run = _table(
        ["run", ""],
        [
            ["model", summary.model],
            ["engine", summary.engine],
            ["seed", str(summary.seed)],
            ["steps", str(summary.steps)],
            ["training, wall", f"{summary.train_seconds:.1f} s"],
            ["training, CPU", f"{summary.cpu_seconds:.1f} s"],
            ["peak memory", f"{summary.peak_rss_mb:.0f} MB"],
        ],
    )
    return f"{accuracy}\n{time}\n{run}"


def reward_table(summary: Summary) -> str:
    """Reward, completion length and entropy of each step as a Markdown table."""
    columns = summary.curves.values()
    rows = [[f"{step:.0f}", *(f"{value:.2f}" for value in row)] for step, *row in zip(*columns, strict=True)]
    return _table(["step", "reward", "length", "entropy"], rows)


def write_report(folder: Path, summary: Summary, *, before: Evaluation, after: Evaluation, heldout: Dataset) -> None:
    """Write `summary.json`, `report.md` and, if matplotlib is installed, `curves.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    has_curves = importlib.util.find_spec("matplotlib") is not None
    if has_curves:
        draw_curves(summary, folder / "curves.png")
    curves = "![Reward, completion length and entropy by step](curves.png)" if has_curves else ""
    report = (
        f"# GRPO on {summary.model}\n\n{describe(summary)}\n{curves}\n\n{_examples(heldout, before, after)}\n"
        f"## Every step\n\n{reward_table(summary)}"
    )
    (folder / "report.md").write_text(report, encoding="utf-8")


def draw_curves(summary: Summary, path: Path) -> None:
    """One PNG: held-out accuracy before and after, then reward, completion length and entropy by step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    first, *panels = figure.subplots(1, 1 + len(PANELS))
    _draw_accuracy(first, summary)
    for axes, (key, title, colour) in zip(panels, PANELS, strict=True):
        steps, values = summary.curves["step"], summary.curves[key]
        axes.scatter(steps, values, s=18, color=colour, alpha=0.35, linewidths=0)
        axes.plot(steps, trailing_means(values), color=colour, linewidth=2)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel(f"optimizer step (line: mean of the last {MEAN_OVER})", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_ylim(bottom=0)
    for axes in (first, *panels):
        axes.tick_params(labelsize=9, length=0)
        axes.grid(axis="y", color="#e0e0e0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#999999")
    figure.suptitle(
        f"GRPO on {summary.model}, {summary.steps} steps, seed {summary.seed}", fontsize=13, x=0.01, ha="left"
    )
    figure.savefig(path)


def _draw_accuracy(axes: Any, summary: Summary) -> None:
    """Bars for greedy and sampled accuracy, before and after, with their 95 % intervals."""
    series = (
        (
            "before",
            "#b8c4d0",
            (summary.accuracy_before, summary.pass_at_1_before),
            (summary.accuracy_before_interval, summary.pass_at_1_before_interval),
        ),
        (
            "after",
            "#4b5d70",
            (summary.accuracy_after, summary.pass_at_1_after),
            (summary.accuracy_after_interval, summary.pass_at_1_after_interval),
        ),
    )
    width = 0.36
    for offset, (label, colour, shares, intervals) in zip((-width / 2, width / 2), series, strict=True):
        places = [index + offset for index in range(len(shares))]
        axes.bar(places, shares, width=width - 0.03, color=colour, label=label)
        below = [share - low for share, (low, _) in zip(shares, intervals, strict=True)]
        above = [high - share for share, (_, high) in zip(shares, intervals, strict=True)]
        axes.errorbar(places, shares, yerr=[below, above], fmt="none", ecolor="#222222", elinewidth=1, capsize=3)
        for place, share in zip(places, shares, strict=True):
            axes.text(
                place, 0.02, f"{share:.0%}", ha="center", fontsize=9, color="white" if label == "after" else "#222222"
            )
    axes.set_title("Held-out accuracy (95 % interval)", fontsize=11, loc="left")
    axes.set_xticks(range(2), ["greedy", "sampled"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_ylim(0, 1)
    axes.legend(fontsize=9, frameon=False, loc="upper left", ncols=2)


def trailing_means(values: list[float]) -> list[float]:
    """The mean of each value and the up to `MEAN_OVER - 1` before it."""
    windows = [values[max(0, end - MEAN_OVER) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def _series(logged: list[dict[str, Any]], key: str) -> list[float]:
    """A metric of each step; a step that ran no row has no entropy, and keeps the one before."""
    values: list[float] = []
    for entry in logged:
        values.append((values[-1] if values else 0.0) if entry[key] is None else entry[key])
    return values


def _phase_seconds(logged: list[dict[str, Any]], seconds_per_step: float) -> dict[str, float]:
    """Mean wall seconds a step of each phase the trainer timed, then of everything else."""
    keys = dict.fromkeys(key for entry in logged for key in entry if key.startswith("time/"))
    seconds = {key.removeprefix("time/"): sum(entry.get(key, 0.0) for entry in logged) / len(logged) for key in keys}
    return {**seconds, "rest": max(0.0, seconds_per_step - sum(seconds.values()))}


def _interval(accuracy: Accuracy) -> tuple[float, float]:
    return accuracy.low, accuracy.high


def _accuracy_row(
    name: str, count: str, before: tuple[float, tuple[float, float]], after: tuple[float, tuple[float, float]]
) -> list[str]:
    cells = [cell for share, (low, high) in (before, after) for cell in (f"{share:.1%}", f"{low:.0%} - {high:.0%}")]
    return [name, count, *cells, f"{100 * (after[0] - before[0]):+.1f} points"]


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up: the first to the left, the others to the right."""
    widths = [max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    lines = [
        " | ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [header, *rows]
    ]
    return "".join(f"{line}\n" for line in [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _examples(heldout: Dataset, before: Evaluation, after: Evaluation) -> str:
    """A section with the first held-out problems and their completions."""
    shown = heldout.to_list()[:NUM_EXAMPLES]
    questions = [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] for row in shown]
    # the words all questions begin with are said once
    words = zip(*(question.split(" ") for question in questions), strict=False)
    opening = " ".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, words))
    texts = (before.greedy_texts, after.greedy_texts, before.sampled_texts, after.sampled_texts)
    rows = [
        [_code(question.removeprefix(opening).strip()), str(row["answer"]), *(_code(column[i]) for column in texts)]
        for i, (question, row) in enumerate(zip(questions, shown, strict=True))
    ]
    table = _table(["problem", "answer", "greedy before", "greedy after", "sample before", "sample after"], rows)
    begins = f" Every one begins with {_code(opening)}." if opening else ""
    return (
        f"## Held-out completions before and after\n\nThe first {len(rows)} held-out problems; none was trained on."
        f"{begins}\n\n{table}"
    )


def _code(text: str) -> str:
    """Text as a Markdown code span that fits a table cell: tags and newlines show, nothing is rendered."""
    shown = text.replace("\n", "\\n").replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown else "(empty)"
