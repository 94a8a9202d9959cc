"""What a program is tested with: forms in which data sets write tests, the runs they ask for, and when a run passes.

A row's tests are one of these, or JSON text of one:

- `[{"input": "3 4", "output": "7"}]`: the program reads `input` and must print `output`.
- `[{"function": "add", "input": [3, 4], "output": 7}]`, also with `fn_name`: its function, or a method of its
  `Solution`, must return `output`.
- `{"inputs": [...], "outputs": [...], "fn_name": ...}`: either of them, as in APPS and TACO, where a returned value may
  be wrapped in a list.
- `{"language": ..., "test_cases": [...]}`: the first two, as in open-r1's `verification_info`.
- `"assert add(3, 4) == 7"`, or a list of such texts: Python that must run to its end after the program, as in MBPP
  and HumanEval.

Printed output must be equal as a whole: lines without their trailing blanks, the last empty lines left out. Returned
values are compared as JSON (a tuple is a list), numbers to 1e-9 relative; what the program thinks of `==` is never
asked. Expected values stay outside the sandbox. Assertions run in the program's own process: one that ends before them
fails, but one that makes every `==` true, or looks for the word that its end is told by, passes.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

# reads a request, and the program, whose prints come before the last line
CALL_DRIVER = """
import json, sys

def plain(value):
    for name in ("tolist", "item"):
        if hasattr(value, name):
            return getattr(value, name)()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} is returned")

request = json.loads(sys.stdin.readline())
names = {"__name__": "solution"}
exec(compile(open("/program/solution.py", encoding="utf-8").read(), "solution.py", "exec"), names)
name = request["function"]
function = names[name] if name in names else getattr(names["Solution"](), name)
text = json.dumps(function(*request["arguments"]), default=plain)
sys.__stdout__.write("\\n" + text + "\\n")
sys.__stdout__.flush()
"""
# the word waits where the program's own input is not
CHECK_DRIVER = """
import os, sys

kept = os.dup(0)
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
names = {"__name__": "solution"}
exec(compile(open("/program/solution.py", encoding="utf-8").read(), "solution.py", "exec"), names)
exec(compile(open(sys.argv[1], encoding="utf-8").read(), "tests.py", "exec"), names)
sys.__stdout__.write("\\n" + os.read(kept, 100).decode() + "\\n")
sys.__stdout__.flush()
"""


@dataclass(frozen=True, kw_only=True)
class PrintedTest:
    """The program reads `input` and must print `output`."""

    input: str
    output: str

    def passes(self, printed: str) -> bool:
        """Whether that is what it printed."""
        return _lines(printed) == _lines(self.output)


@dataclass(frozen=True, kw_only=True)
class CallTest:
    """A function of the program, called with `arguments`, must return one of `outputs`."""

    function: str
    arguments: list[Any]
    outputs: list[Any]

    @property
    def input(self) -> str:
        """What `CALL_DRIVER` reads."""
        return json.dumps({"function": self.function, "arguments": self.arguments}) + "\n"

    def passes(self, printed: str) -> bool:
        """Whether the last line is such a value."""
        value = _last_json(printed)
        return any(_is_equal(value, json.loads(json.dumps(output))) for output in self.outputs)


@dataclass(frozen=True, kw_only=True)
class CheckTest:
    """Python that must run to its end after the program; `word` is printed then, and known to nobody before."""

    code: str
    word: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def input(self) -> str:
        """What `CHECK_DRIVER` reads."""
        return self.word + "\n"

    def passes(self, printed: str) -> bool:
        """Whether its end was reached."""
        return printed.rstrip("\n").split("\n")[-1] == self.word


Test: TypeAlias = PrintedTest | CallTest | CheckTest


def parse_tests(tests: Any, *, entry_point: str | None = None) -> tuple[list[Test], str | None]:
    """A row's tests and the language that they name, from any of the forms above.

    Args:
        tests: As in the data set.
        entry_point: The function that HumanEval's `check` is called with.

    Raises:
        ValueError: They have none of these forms; says what was found.
    """
    if isinstance(tests, str):
        # else it is Python
        with suppress(json.JSONDecodeError):
            tests = json.loads(tests)
    if isinstance(tests, str):
        call = f"\ncheck({entry_point})\n" if entry_point else ""
        return ([CheckTest(code=tests + call)] if tests.strip() else []), None
    if isinstance(tests, Mapping) and "test_cases" in tests:
        return parse_tests(tests["test_cases"])[0], tests.get("language")
    if isinstance(tests, Mapping) and "inputs" in tests and "outputs" in tests:
        return _paired(tests["inputs"], tests["outputs"], tests.get("fn_name")), tests.get("language")
    if isinstance(tests, Sequence):
        return [_parse_test(test) for test in tests], None
    raise ValueError(f"tests must be a list, a text or a mapping of inputs and outputs, they are {tests!r:.100}")


def _parse_test(test: Any) -> Test:
    if isinstance(test, str):
        return CheckTest(code=test)
    if isinstance(test, Mapping) and "code" in test:
        return CheckTest(code=test["code"])
    if isinstance(test, Mapping) and "input" in test and "output" in test:
        (made,) = _paired([test["input"]], [test["output"]], test.get("function") or test.get("fn_name"))
        return made
    raise ValueError(f"a test must be a text or have `input` and `output`, it is {test!r:.100}")


def _paired(inputs: Any, outputs: Any, function: str | None) -> list[Test]:
    if len(inputs) != len(outputs):
        raise ValueError(f"tests must have one output an input: {len(inputs)} inputs, {len(outputs)} outputs")
    if function is None:
        return [PrintedTest(input=_text(i), output=_text(o)) for i, o in zip(inputs, outputs, strict=True)]
    return [_call_test(function, arguments, output) for arguments, output in zip(inputs, outputs, strict=True)]


def _call_test(function: str, arguments: Any, output: Any) -> CallTest:
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
        output = json.loads(output) if isinstance(output, str) else output
    if not isinstance(arguments, Sequence):
        raise ValueError(f"the input of a test of {function!r} must list its arguments, it is {arguments!r:.100}")
    outputs = [output]
    if isinstance(output, list) and len(output) == 1:
        outputs.append(output[0])
    return CallTest(function=function, arguments=list(arguments), outputs=outputs)


def _text(value: Any) -> str:
    """Input or output as text; a list's entries are lines."""
    return value if isinstance(value, str) else "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


class _Nothing:
    """Equal to nothing."""


def _last_json(printed: str) -> Any:
    try:
        return json.loads(printed.rstrip("\n").split("\n")[-1])
    except (ValueError, RecursionError):
        # no JSON, an integer of thousands of digits, brackets without end
        return _Nothing()


def _is_equal(value: Any, expected: Any) -> bool:
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return value == expected or (float in (type(value), type(expected)) and _is_close(value, expected))
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_is_equal, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_is_equal(value[key], expected[key]) for key in expected)
    return type(value) is type(expected) and bool(value == expected)


def _is_close(value: float, expected: float) -> bool:
    # an integer may be larger than any float
    with suppress(OverflowError):
        return math.isclose(value, expected, rel_tol=1e-9)
    return False
