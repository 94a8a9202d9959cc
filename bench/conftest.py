"""`pytest bench/`: the options, the cases, and the fixture that measures all variants of a case in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.comparing import absent_lines, by_case, entries_of, table
from bench.hardware import machine
from bench.measuring import Rounds
from bench.ops import OPS, Case, Op
from bench.running import CaseResult, extra_info, run_case

COLUMNS = ["median", "iqr", "min", "max", "rounds"]
# what of the machine must agree for two results to be compared; the rest changes from run to run
STABLE = ("cpu", "gpu", "driver", "power_limit_w", "max_sm_clock_mhz", "cores", "python", "versions")

Outcomes = dict[Case, CaseResult]
OUTCOMES = pytest.StashKey[Outcomes]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benches")
    add = group.addoption
    add("--shape", action="append", help="MODEL/TOKENS (policy-loss: tokens/N) instead of the op's own; repeatable")
    add("--dtype", action="append", help="with --shape: fp32, bf16 or autocast; repeatable; default: the op's first")
    add("--data", action="append", help="with --shape: the op's kinds of inputs; repeatable; default: the op's first")
    add("--variant", action="append", help="only this one, for example ours or trl; repeatable")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--rounds", type=int, default=50, help="most rounds of a case; a round runs every variant once")
    add("--budget", type=float, default=10.0, help="seconds of a case after which no round beyond the third begins")
    add("--threads", type=int, default=1, help="torch's threads on a CPU")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError('pytest bench/ needs pytest-benchmark: pip install -e ".[bench]"')
    config.addinivalue_line("markers", "op(name): the op that a bench measures, a key of bench.ops.OPS")
    config.stash[OUTCOMES] = {}
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = COLUMNS
    for name in ("rounds", "threads"):
        if config.getoption(name) < 1:
            raise pytest.UsageError(f"--{name} must be at least 1, got {config.getoption(name)}")
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA device, and torch finds none")
    torch.set_num_threads(config.option.threads)


def device_of(config: pytest.Config) -> torch.device:
    return torch.device(config.option.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def rounds_of(config: pytest.Config) -> Rounds:
    """As asked for; `Rounds.least` gives way to a smaller `--rounds`."""
    most = config.option.rounds
    return Rounds(least=min(Rounds.least, most), most=most, budget_s=config.option.budget)


def absent_of(op: Op, config: pytest.Config) -> dict[str, str]:
    """Why variants of an op do not run, by label."""
    on_cuda, asked = device_of(config).type == "cuda", config.option.variant
    reasons = {label: op.why_not(label, on_cuda=on_cuda, asked=asked) for label in op.providers}
    return {label: reason for label, reason in reasons.items() if reason is not None}


def cases_of(op: Op, config: pytest.Config) -> list[Case]:
    """Those asked for, else the op's own for the device."""
    on_cuda = device_of(config).type == "cuda"
    if config.option.shape is None:
        return op.cases(on_cuda=on_cuda)
    default = op.cases(on_cuda=on_cuda)[0]
    # an op of other shapes has nothing to run
    is_tokens = op.name == "policy-loss"
    shapes = [shape for shape in config.option.shape if shape.startswith("tokens/") == is_tokens]
    dtypes = [dtype for dtype in config.option.dtype or [default.dtype] if dtype in op.dtypes]
    kinds = [data for data in config.option.data or [default.data] if data in op.data]
    try:
        return [op.case(shape, dtype, data) for shape in shapes for dtype in dtypes for data in kinds]
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("op")
    if marker is None:
        return
    op = OPS[marker.args[0]]
    labels = [label for label in op.providers if label in (metafunc.config.option.variant or op.providers)]
    pairs = [
        pytest.param(case, label, id=f"{case}-{label}") for case in cases_of(op, metafunc.config) for label in labels
    ]
    metafunc.parametrize(("case", "label"), pairs)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, str], None]:
    """Check and time a variant, and hand its samples to pytest-benchmark.

    The first variant of a case to come runs all that were selected, in turn; the others find their samples.
    """

    def measure(case: Case, label: str) -> None:
        op = OPS[case.op]
        device = device_of(request.config)
        absent = absent_of(op, request.config)
        if label in absent:
            pytest.skip(f"{label}: {absent[label]}")
        outcomes = request.config.stash[OUTCOMES]
        if case not in outcomes:
            outcomes[case] = run_case(
                op,
                case,
                _selected(request.session, case),
                absent=absent,
                device=device,
                rounds=rounds_of(request.config),
                is_timed=benchmark.enabled,
            )
        result = outcomes[case]
        failure = result.failures.get(label)
        if failure is not None and failure.startswith("OutOfMemoryError") and not op.providers[label].is_ours:
            # what a peer needs more of than there is says something about it, and nothing about us
            pytest.skip(f"{label}: {failure}")
        if failure is not None:
            pytest.fail(failure, pytrace=False)
        if benchmark.enabled:
            benchmark.group = f"{op.name} {case}"
            benchmark.extra_info.update(extra_info(op, result, label))
            _record(benchmark, result.measurements[label].seconds)

    return measure


def _selected(session: pytest.Session, case: Case) -> list[str]:
    """Variants of a case that this run has not deselected."""
    parameters = (item.callspec.params for item in session.items if hasattr(item, "callspec"))
    return [found["label"] for found in parameters if found.get("case") == case]


def _record(benchmark: Any, seconds: list[float]) -> None:
    # what `benchmark.pedantic` does with the samples that it takes itself; it has no public door for given ones
    benchmark._mode = "measure"
    stats = benchmark._make_stats(1)
    for sample in seconds:
        stats.update(sample)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    found = machine()
    # its clock rate differs between any two runs, and all of them would be said to be of different machines
    machine_info.pop("cpu", None)
    machine_info.update({name: found[name] for name in STABLE if name in found})


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["machine"] = machine()


def left_out(config: pytest.Config, items: list[pytest.Item]) -> Iterator[str]:
    """What a reader could expect of this run and will not find, and why."""
    names = {marker.args[0] for item in items if (marker := item.get_closest_marker("op")) is not None}
    for op in (op for op in OPS.values() if op.name in names):
        for line in absent_lines(absent_of(op, config)):
            yield f"{op.name}: {line}"
        if device_of(config).type != "cuda" and config.option.shape is None:
            yield f"{op.name}: {', '.join(str(case) for case in op.cases(on_cuda=True))} (need CUDA)"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    entries = entries_of(bench.as_dict() for bench in (session.benchmarks if session else []) if bench)
    for case in by_case(entries):
        terminalreporter.section(f"{case[0].info['op']} {case[0].info['shape']}", sep="-")
        for line in table(case):
            terminalreporter.write_line(line)
    omitted = list(left_out(config, getattr(terminalreporter, "_session").items))  # noqa: B009
    if omitted:
        terminalreporter.section("left out", sep="-")
        for line in omitted:
            terminalreporter.write_line(line)
