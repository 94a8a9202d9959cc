"""`code`: the program in a completion, compiled and run against tests in a sandbox."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from grpo_fast.rewards.code_tests import CALL_DRIVER, CHECK_DRIVER, CallTest, CheckTest, PrintedTest, Test, parse_tests
from grpo_fast.rewards.sandbox import Limits, Outcome, Report, Run, SandboxFailed, available_backend, run_in_sandbox
from grpo_fast.rewards.texts import after_thought, completion_text

COLUMNS = ("tests", "verification_info", "test_list", "test_cases", "input_output", "test")
BUILD_LIMITS = Limits(seconds=30, memory_mib=4096)
FENCE = "```"
STATUSES = ("timeout", "error", "unbuilt", "no_code", "untestable")


@dataclass(frozen=True, kw_only=True)
class Language:
    """How a language's programs are run.

    Attributes:
        names: What a fenced block may call it.
        file: The program's.
        compiler: What builds it, with arguments; None for a language that is run as it is.
        argv: What runs it.
    """

    names: tuple[str, ...]
    file: str
    compiler: tuple[str, ...] | None
    argv: tuple[str, ...]


BINARY = "/program/solution"
LANGUAGES = {
    "python": Language(
        names=("python", "python3", "py"),
        file="solution.py",
        compiler=None,
        argv=(sys.executable, "-I", "/program/solution.py"),
    ),
    "c": Language(
        names=("c",),
        file="solution.c",
        compiler=("gcc", "-O2", "-std=c17", "-o", BINARY, "solution.c", "-lm"),
        argv=(BINARY,),
    ),
    "cpp": Language(
        names=("cpp", "c++", "cc", "cxx"),
        file="solution.cpp",
        compiler=("g++", "-O2", "-std=c++17", "-o", BINARY, "solution.cpp"),
        argv=(BINARY,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Graded:
    """Of one completion: tests passed of those there are, and the first thing that went wrong."""

    status: str
    passed: int = 0
    total: int = 0
    detail: str = ""


class Code:
    """Programs against tests: a reward function, for TRL's trainer, too.

    The program is the last fenced block after the thought, closed or not; its language is the row's (a column
    `language`, or what `verification_info` says), else the block's, else Python. Tests: `grpo_fast.rewards.code_tests`.
    Programs run in a sandbox (`grpo_fast.rewards.sandbox`), one a completion, several at a time; C and C++ need gcc.

    The reward is 1 if all tests pass, else 0; with `partial` the share that passes. A completion without a program, and
    a program that does not compile, has 0; a row without tests has None.

    The share of a call's completions of each doubtful outcome is logged as `rewards/<name>/timeout` (a test ran out of
    time), `/error` (a program ended with an error, or at another limit), `/unbuilt` (it does not compile), `/no_code`
    and `/untestable` (no tests). The completions table gets the column `<name>_outcome`.
    """

    def __init__(
        self,
        *,
        column: str | None = None,
        partial: bool = False,
        seconds: float = 5.0,
        memory_mib: int = 1024,
        readable: Sequence[str] = (),
        workers: int | None = None,
        name: str = "code",
    ) -> None:
        """Nothing is run.

        Args:
            column: The data set's column of tests; None is the first there is of `COLUMNS`.
            partial: Whether a program that passes some of its tests gets their share.
            seconds: Most wall time of a test.
            memory_mib: Most address space of a program.
            readable: Folders that programs may read beside the system's and this interpreter's.
            workers: Most sandboxes at a time; None is one a processor, at most 8.
            name: In the metrics.

        Raises:
            ValueError: If a limit is not positive.
            SandboxUnavailable: Nothing on this machine can isolate a program.
        """
        self.__name__ = name
        self._column, self._partial, self._readable = column, partial, tuple(readable)
        self._limits = Limits(seconds=seconds, memory_mib=memory_mib)
        self._workers = min(8, os.cpu_count() or 1) if workers is None else workers
        if self._workers < 1:
            raise ValueError(f"{name}: workers must be at least 1, got {workers}")
        available_backend()

    def __call__(
        self,
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward a completion, as TRL calls it.

        Raises:
            ValueError: There is no column of tests, a row's cannot be read, or its language or compiler is not there.
        """
        jobs = self._jobs([completion_text(completion) for completion in completions], columns)
        with ThreadPoolExecutor(self._workers, thread_name_prefix=self.__name__) as threads:
            graded = list(threads.map(lambda job: self._grade(*job), jobs))
        if log_metric is not None and graded:
            for status in STATUSES:
                log_metric(f"rewards/{self.__name__}/{status}", sum(g.status == status for g in graded) / len(graded))
        if log_extra is not None:
            log_extra(f"{self.__name__}_outcome", [_described(g) for g in graded])
        return [self._reward(g) for g in graded]

    def _jobs(self, texts: list[str], columns: dict[str, Any]) -> list[tuple[str | None, Language, list[Test]]]:
        """Each row's program, its language and tests; all are read before anything runs."""
        column = self._column or next((name for name in COLUMNS if name in columns), None)
        if column not in columns:
            wanted = f"the column {column!r}" if column else f"one of the columns {', '.join(COLUMNS)}"
            raise ValueError(f"reward {self.__name__!r} needs {wanted} of tests (argument `column`)")
        assert column is not None
        entry_points = columns.get("entry_point") or [None] * len(texts)
        languages = columns.get("language") or [None] * len(texts)
        jobs = []
        rows = zip(texts, columns[column], languages, entry_points, strict=True)
        for row, (text, raw, wanted, entry_point) in enumerate(rows):
            tag, source = last_block(after_thought(text) or "")
            try:
                tests, named = parse_tests(raw or [], entry_point=entry_point)
                language = _language(wanted or named, tag)
                _check_tests(tests, language)
            except ValueError as error:
                raise ValueError(f"reward {self.__name__!r}, row {row}: {error}") from error
            jobs.append((source, language, tests))
        return jobs

    def _grade(self, source: str | None, language: Language, tests: list[Test]) -> _Graded:
        if not tests:
            return _Graded(status="untestable")
        if source is None:
            return _Graded(status="no_code", total=len(tests))
        report = self._run(source, language, tests)
        if report.build is not None and not report.build.is_fine:
            return _Graded(status="unbuilt", total=len(tests), detail=report.build.stderr[-300:])
        passed, status, detail = 0, "", ""
        for number, (test, outcome) in enumerate(zip(tests, report.runs, strict=False), 1):
            is_right = outcome.is_fine and test.passes(outcome.stdout)
            passed += is_right
            if not is_right and not status:
                status, detail = _why(outcome)
                detail = f"test {number}: {detail}"
        return _Graded(status=status or "passed", passed=passed, total=len(tests), detail=detail)

    def _run(self, source: str, language: Language, tests: list[Test]) -> Report:
        files = {language.file: source}
        build = None
        if language.compiler is not None:
            build = Run(argv=language.compiler, limits=BUILD_LIMITS)
        checks = [test for test in tests if isinstance(test, CheckTest)]
        files |= {"call.py": CALL_DRIVER, "check.py": CHECK_DRIVER} if language.compiler is None else {}
        files |= {f"tests{i}.py": test.code for i, test in enumerate(checks)}
        runs = [Run(argv=_argv(test, language, checks), stdin=test.input, limits=self._limits) for test in tests]
        try:
            return run_in_sandbox(files, runs, build=build, readable=self._readable, stops_early=not self._partial)
        except SandboxFailed as error:
            # what a program does to its sandbox is its own failure
            return Report(
                build=None, runs=[Outcome(reason="sandbox", code=-1, stdout="", stderr=str(error), seconds=0)]
            )

    def _reward(self, graded: _Graded) -> float | None:
        if graded.status == "untestable":
            return None
        if self._partial:
            return graded.passed / graded.total
        return float(graded.passed == graded.total)


def last_block(text: str) -> tuple[str, str | None]:
    """The last fenced block of a text and the word behind its fence; ("", None) if there is none.

    A block ends at a line of nothing but its fence, or with the text.
    """
    lines: list[str] = []
    tag, found, is_open = "", None, False
    for line in text.split("\n"):
        stripped = line.strip()
        if is_open and stripped == FENCE:
            is_open, found = False, "\n".join(lines)
        elif not is_open and stripped.startswith(FENCE) and FENCE not in stripped[3:]:
            is_open, lines = True, []
            tag = (stripped[3:].split() or [""])[0].lower()
        elif is_open:
            lines.append(line)
    return tag, ("\n".join(lines) if is_open else found)


def _language(wanted: str | None, tag: str) -> Language:
    """The row's language, else the block's, else Python.

    Raises:
        ValueError: The row's is none of `LANGUAGES`, or its compiler is not there.
    """
    for name in (wanted, tag, "python"):
        language = next((lang for lang in LANGUAGES.values() if name and name.lower() in lang.names), None)
        if language is not None:
            break
        if name is wanted and wanted:
            raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, it is {wanted!r}")
    assert language is not None
    if language.compiler is not None and shutil.which(language.compiler[0]) is None:
        raise ValueError(f"{language.names[0]} needs {language.compiler[0]}, which is not installed")
    return language


def _check_tests(tests: list[Test], language: Language) -> None:
    if language is not LANGUAGES["python"] and not all(isinstance(test, PrintedTest) for test in tests):
        raise ValueError(f"tests of {language.names[0]} must have inputs and outputs that are read and printed")


def _argv(test: Test, language: Language, checks: list[CheckTest]) -> tuple[str, ...]:
    if isinstance(test, CallTest):
        return (sys.executable, "-I", "/program/call.py")
    if isinstance(test, CheckTest):
        place = next(i for i, check in enumerate(checks) if check is test)
        return (sys.executable, "-I", "/program/check.py", f"/program/tests{place}.py")
    return language.argv


def _why(outcome: Outcome) -> tuple[str, str]:
    if outcome.reason == "time":
        return "timeout", f"out of time ({outcome.seconds:.1f} s)"
    if outcome.reason is not None:
        return "error", f"over the limit of {outcome.reason}"
    if outcome.code != 0:
        last = (outcome.stderr.strip().splitlines() or [""])[-1]
        return "error", f"exit code {outcome.code} {last:.200}".rstrip()
    return "wrong", "wrong output"


def _described(graded: _Graded) -> str:
    detail = f": {graded.detail}" if graded.detail else ""
    return f"{graded.status} {graded.passed}/{graded.total}{detail}"
