"""`python -m bench.report`: results as one self-contained HTML page, tables and roofline plots.

Figures stand beside each other, in a row, a ratio or a plot, only if they are of the same commit and the same machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from bench.report_tables import Table, tables_of
from bench.results_file import BadResult, Figure, Origin, ResultFile, read_result

RESULTS = Path(__file__).resolve().parent / "results"
NO_PLOTS = "no plots: matplotlib is not installed (the `report` extra brings it)"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .2em .7em; text-align: right }
th:first-child, td:first-child { text-align: left }
h3 { margin-bottom: .2em } p.note { color: #666; margin: .1em 0 } div.wide { overflow-x: auto }
svg { max-width: 100%; height: auto }
"""


def page(results: Sequence[ResultFile]) -> str:
    """The whole page: a section for each commit on each machine.

    Raises:
        BadResult: If a script's file lacks what its table needs.
    """
    can_plot = find_spec("matplotlib") is not None
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Benches of grpo-fast</title>"]
    parts += [f"<style>{STYLE}</style><h1>Benches of grpo-fast</h1>"]
    parts += [] if can_plot else [f"<p>{escape(NO_PLOTS)}</p>"]
    for origin, files in by_origin(results).items():
        parts.append(f"<h2>Commit {escape(origin.commit)}, {escape(origin.machine)}</h2>")
        if can_plot:
            parts += [_svg(plot) for plot in plots_of([figure for file in files for figure in file.figures])]
        for file in files:
            versions = ", ".join(f"{name} {found}" for name, found in file.versions.items())
            source = f"{file.path.name}, {file.date}; {versions}"
            for table in tables_of(file):
                parts += _table_html(table, source)
    return "\n".join(parts) + "\n"


def by_origin(results: Sequence[ResultFile]) -> dict[Origin, list[ResultFile]]:
    """Files by commit and machine, in the order in which these first come."""
    found: dict[Origin, list[ResultFile]] = {}
    for result in results:
        found.setdefault(result.origin, []).append(result)
    return found


def _table_html(table: Table, source: str) -> list[str]:
    head = "".join(f"<th>{escape(name)}" for name in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in table.rows)
    notes = [f"<p class=note>{escape(note)}</p>" for note in (*table.notes, source)]
    return [f"<h3>{escape(table.title)}</h3>", f"<div class=wide><table><tr>{head}{rows}</table></div>", *notes]


Points = dict[str, dict[str, float]]


def plots_of(figures: Sequence[Figure]) -> list[tuple[str, dict[str, Points]]]:
    """For each op: time over the floor and memory over the lower bound, by label and by shape.

    A figure without a floor or a bound has no point there. Of several of one shape and label the last counts.
    """
    plots = []
    for op in dict.fromkeys(figure.op for figure in figures):
        panels: dict[str, Points] = {"time / floor": {}, "peak memory / lower bound": {}}
        for figure in (figure for figure in figures if figure.op == op):
            shape = " ".join(part for part in figure.case[1:] if part)
            floor, bound = figure.number("floor_seconds"), figure.number("memory_lower_bound_mib")
            peak = figure.number("peak_mib")
            if floor:
                panels["time / floor"].setdefault(figure.label, {})[shape] = figure.median / floor
            if bound and peak and peak > 0:
                panels["peak memory / lower bound"].setdefault(figure.label, {})[shape] = peak / bound
        panels = {name: points for name, points in panels.items() if points}
        if panels:
            plots.append((op, panels))
    return plots


def _svg(plot: tuple[str, dict[str, Points]]) -> str:
    import matplotlib

    matplotlib.use("svg")
    # the same figures give the same page; words stay words
    matplotlib.rcParams.update({"svg.hashsalt": "grpo-fast", "svg.fonttype": "none"})
    from matplotlib import pyplot

    op, panels = plot
    chart, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, (name, points) in zip(axes[0], panels.items(), strict=True):
        shapes = list(dict.fromkeys(shape for found in points.values() for shape in found))
        for label, found in points.items():
            at = [shapes.index(shape) for shape in found]
            axis.plot(at, list(found.values()), marker="o", linestyle="", label=label)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", fontsize=8)
        axis.set_title(f"{op}: {name}", fontsize=10)
        axis.grid(axis="y", which="both", alpha=0.25)
        axis.legend(fontsize=8)
    text = StringIO()
    chart.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(chart)
    # without the declaration of a document of its own
    return text.getvalue()[text.getvalue().index("<svg") :]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files; default: all of bench/results")
    parser.add_argument("--out", type=Path, default=Path("bench_report.html"), help="default: %(default)s")
    args = parser.parse_args(argv)
    paths = args.results or sorted(RESULTS.glob("*.json"))
    try:
        if not paths:
            raise BadResult(f"{RESULTS}: no JSON file was found")
        text = page([read_result(path) for path in paths])
    except BadResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    if find_spec("matplotlib") is None:
        print(NO_PLOTS, file=sys.stderr)
    print(f"{args.out}: {len(paths)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
