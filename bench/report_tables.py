"""The tables of a report: from pytest-benchmark's figures, and from the scripts' files by their own tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import main_job_table, profiles_table
from bench.results_file import BadResult, Figure, ResultFile

Row = list[str]


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        title: What was measured.
        head: Names of the columns.
        rows: As many cells each.
        notes: Lines below it.
    """

    title: str
    head: Row
    rows: list[Row]
    notes: tuple[str, ...] = ()


def tables_of(result: ResultFile) -> list[Table]:
    """All tables of one file; a ratio or a row is of this file alone.

    Raises:
        BadResult: If a script's file lacks what its table needs.
    """
    if result.kind == "pytest-benchmark":
        cases: dict[tuple[str, str, str, str], list[Figure]] = {}
        for figure in result.figures:
            cases.setdefault(figure.case, []).append(figure)
        return [_case_table(figures) for figures in cases.values()]
    try:
        return SCRIPTS[result.kind](result.content)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration, ZeroDivisionError) as error:
        fields = ", ".join(name for name in result.content)
        raise BadResult(f"{result.path}: not what {result.kind} writes (fields: {fields}): {error!r}") from error


# -- pytest-benchmark --------------------------------------------------------------------------------------------------

Cell = Callable[[Figure], str]
# (name, its cell); a column that is empty in all rows is left out
COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("tokens", lambda figure: _number(figure, "tokens", "{:.0f}")),
    ("of the floor", lambda figure: _number(figure, "share_of_floor", "{:.0%}")),
    ("TFLOP/s", lambda figure: _number(figure, "tflops", "{:.3g}")),
    ("GB/s", lambda figure: _number(figure, "gbps", "{:.3g}")),
    ("peak MiB", lambda figure: _number(figure, "peak_mib", "{:.1f}")),
    (
        "/ memory's lower bound",
        lambda figure: _over(figure.number("peak_mib"), figure.number("memory_lower_bound_mib")),
    ),
    ("phases, s", lambda figure: _phases(figure.info.get("phases_seconds"))),
    ("largest error", lambda figure: _worst(figure.info.get("errors"))),
)


def _case_table(figures: list[Figure]) -> Table:
    op, shape, dtype, data = figures[0].case
    # of several of ours, the default: the first
    ours = next((figure for figure in figures if figure.is_ours), None)
    columns = [(name, cell) for name, cell in COLUMNS if any(cell(figure) for figure in figures)]
    # what is compared: seconds, unless a figure of more worth is named
    compared = figures[0].info.get("compared", "seconds")
    against = "/ ours" if compared == "seconds" else f"{compared} / ours"
    head = ["", "median s (quartiles, rounds)", *([] if ours is None else [against]), *(name for name, _ in columns)]
    rows = []
    for figure in figures:
        first, third = figure.quartiles
        time = f"{figure.median:.4g} ({first:.4g} - {third:.4g}, {figure.rounds})"
        ratio = [] if ours is None else [_over(_value(figure, compared), _value(ours, compared))]
        rows.append([figure.label, time, *ratio, *(cell(figure) for _, cell in columns)])
    shown = {figure.label for figure in figures}
    why = {
        label: f"{word}: {reason}"
        for word in ("absent", "failed")
        for figure in figures
        for label, reason in figure.info.get(word, {}).items()
        if label not in shown
    }
    rows += [[label, reason, *[""] * (len(head) - 2)] for label, reason in why.items()]
    return Table(f"{op}: {', '.join(part for part in (shape, dtype, data) if part)}", head, rows, _notes(figures))


def _notes(figures: list[Figure]) -> tuple[str, ...]:
    info = figures[0].info
    notes = [f"clock: {info['clock']}"] if info.get("clock") else []
    notes += [f"operations: {info['flop_convention']}"] if info.get("flop_convention") else []
    floor = figures[0].number("floor_seconds")
    notes += [] if floor is None else [f"floor: {floor:.4g} s ({info.get('peak_source', 'source not given')})"]
    published = info.get("published")
    if isinstance(published, dict):
        notes.append(f"published by others, another run: {published.get('label')}: {published.get('tokens')} tokens, "
                     f"{published.get('source')}")  # fmt: skip
    return tuple(notes)


def _number(figure: Figure, name: str, form: str) -> str:
    value = figure.number(name)
    return "" if value is None else form.format(value)


def _value(figure: Figure, compared: str) -> float | None:
    return figure.median if compared == "seconds" else figure.number(compared)


def _over(value: float | None, other: float | None) -> str:
    return "" if value is None or not other else f"{value / other:.2f}"


def _phases(phases: Any) -> str:
    if not isinstance(phases, dict):
        return ""
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in phases.items() if seconds)


def _worst(errors: Any) -> str:
    if not isinstance(errors, dict) or not errors:
        return ""
    name = max(errors, key=lambda name: float(errors[name]))
    return f"{errors[name]:.1e} ({name})"


# -- the scripts' own --------------------------------------------------------------------------------------------------


def from_markdown(title: str, text: str) -> list[Table]:
    """The pipe tables in a text; the other lines are the notes of the table before them, or part of the title."""
    tables: list[Table] = []
    lines: list[Row] = []
    notes: list[str] = []

    def close() -> None:
        if lines:
            # below the names of the columns there is a rule
            tables.append(Table(title, lines[0], lines[2:]))
            lines.clear()

    for line in text.splitlines():
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")])
        else:
            close()
            notes += [line] if line.strip() else []
    close()
    if tables and notes:
        tables[-1] = Table(tables[-1].title, tables[-1].head, tables[-1].rows, tuple(notes))
    return tables


def _main_job(content: dict[str, Any]) -> list[Table]:
    runs = [
        main_job_table.Run(**run | {"steps": [main_job_table.Step(**step) for step in run["steps"]]})
        for run in content["runs"]
    ]
    checkpointing = ", gradient checkpointing" if content["gradient_checkpointing"] else ""
    title = f"the main job, seed {content['seed']}, {content['threads']} thread(s){checkpointing}"
    return from_markdown(title, main_job_table.markdown(runs))


def _profiles(content: dict[str, Any]) -> list[Table]:
    counted, timed = (
        [profiles_table.Measured(**run) for run in content[name] if isinstance(run, dict)]
        for name in ("counted", "timed")
    )
    tables = from_markdown("tokens of one optimizer step at true lengths", profiles_table.tokens_table(counted))
    if timed:
        model = f"{timed[0].layers} layers of {timed[0].model}"
        tables += from_markdown(f"the training phase of one step, {model}", profiles_table.seconds_table(timed))
    return tables


def _tiles(content: dict[str, Any]) -> list[Table]:
    rows = []
    for line in content["lines"]:
        rate = line["amount"] / (line["ms"] / 1000) / (1e12 if line["unit"] == "TFLOP/s" else 1e9)
        rows.append(
            [line["what"], *(str(line[name]) for name in "RDVC"), f"{line['ms']:.4g}", f"{rate:.4g} {line['unit']}"]
        )
    return [Table("the parts of the head's sweep", ["", "R", "D", "V", "C", "ms", "rate"], rows)]


def _adamw(content: dict[str, Any]) -> list[Table]:
    from statistics import median

    rows = [[name, f"{min(taken):.4g}", f"{median(taken):.4g}"] for name, taken in content["seconds"].items()]
    title = f"the optimizer step with the engine's copy of the weights, {content['model']}"
    return [Table(title, ["", "least, s", "median, s"], rows)]


SCRIPTS: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "bench_main_job": _main_job,
    "bench_profiles": _profiles,
    "bench_tiles": _tiles,
    "bench_adamw": _adamw,
}
