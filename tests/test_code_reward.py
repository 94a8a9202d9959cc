"""The code reward: which program is taken, what tests ask, and what honest, wrong and hostile programs get."""

import json
import pickle
import shutil
from textwrap import dedent

import pytest

from grpo_fast.rewards.code import Code, last_block
from grpo_fast.rewards.code_tests import CallTest, CheckTest, PrintedTest, parse_tests
from grpo_fast.rewards.sandbox import SandboxUnavailable, available_backend

try:
    available_backend()
except SandboxUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)

SUM = [{"input": "1 2\n", "output": "3\n"}, {"input": "40 2\n", "output": "42\n"}]
ADD = [{"function": "add", "input": [1, 2], "output": 3}, {"function": "add", "input": [40, 2], "output": 42}]
CHECK = "assert add(1, 2) == 3\nassert add(40, 2) == 42"
HUMANEVAL = "def check(candidate):\n    assert candidate(1, 2) == 3"
READS = "a, b = map(int, input().split())\n"
GOOD, GOOD_ADD = READS + "print(a + b)", "def add(a, b):\n    return a + b"
C = '#include <stdio.h>\nint main(void) {{ int a, b; scanf("%d %d", &a, &b); printf("%d\\n", {}); }}'
CPP = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"


def fenced(source, tag="python"):
    return f"Here it is:\n```{tag}\n{source}\n```\n"


def score(text, tests, *, columns=None, **options):
    """The reward, and what is said of it."""
    extra, metrics = {}, {}
    reward = Code(**{"seconds": 2.0, "workers": 1, **options})
    (value,) = reward(
        [text], log_extra=extra.__setitem__, log_metric=metrics.__setitem__, tests=[tests], **columns or {}
    )
    (outcome,) = extra["code_outcome"]
    assert {name: share for name, share in metrics.items() if share} in (
        {},
        {f"rewards/code/{outcome.split()[0]}": 1.0},
    )
    return value, outcome


# a completion, its tests, the reward, how its outcome begins
CASES = {
    "prints": (fenced(GOOD), SUM, 1.0, "passed 2/2"),
    "returns": (fenced(GOOD_ADD), ADD, 1.0, "passed 2/2"),
    "returns from a method": (fenced("class Solution:\n    def add(self, a, b): return a + b"), ADD, 1.0, "passed 2/2"),
    "holds": (fenced(GOOD_ADD), CHECK, 1.0, "passed 1/1"),
    "a list of checks": (fenced(GOOD_ADD), CHECK.split("\n"), 1.0, "passed 2/2"),
    "APPS": (fenced(GOOD), json.dumps({"inputs": ["1 2"], "outputs": ["3"]}), 1.0, "passed 1/1"),
    "APPS, a function": (fenced(GOOD_ADD), {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}, 1.0, "passed 1/1"),
    "open-r1": (fenced(GOOD), {"language": "python", "test_cases": SUM}, 1.0, "passed 2/2"),
    "no tag": (fenced(GOOD, ""), SUM, 1.0, "passed"),
    "indented fence": (fenced(GOOD).replace("```", "  ```"), SUM, 1.0, "passed"),
    "unclosed": (fenced(GOOD).removesuffix("```\n"), SUM, 1.0, "passed"),
    "the last of two": (fenced("print(0)") + fenced(GOOD), SUM, 1.0, "passed"),
    "the last of two is wrong": (fenced(GOOD) + fenced("print(0)"), SUM, 0.0, "wrong 0/2"),
    "after the thought": (f"<think>{fenced('print(0)')}</think>{fenced(GOOD)}", SUM, 1.0, "passed"),
    "in the thought alone": (f"<think>{fenced(GOOD)}</think>done", SUM, 0.0, "no_code"),
    "in a thought without an end": (f"<think>{fenced(GOOD)}", SUM, 0.0, "no_code"),
    "in a second thought without an end": (f"<think>a</think><think>{fenced(GOOD)}", SUM, 0.0, "no_code"),
    "no block": (GOOD, SUM, 0.0, "no_code"),
    "inline code": ("it is ```" + GOOD + "```", SUM, 0.0, "no_code"),
    "empty": ("", SUM, 0.0, "no_code"),
    "empty block": (fenced(""), SUM, 0.0, "wrong"),
    "trailing blanks": (fenced(READS + "print(a + b, ' ', end=' \\n\\n\\n')"), SUM, 1.0, "passed"),
    "a correct prefix": (fenced(READS + "print(a + b)"), [{"input": "1 2", "output": "3\n4"}], 0.0, "wrong"),
    "a line too many": (fenced(READS + "print(a + b)\nprint('debug')"), SUM, 0.0, "wrong"),
    "leading blanks": (fenced(READS + "print(' ', a + b)"), SUM, 0.0, "wrong"),
    "one of two": (fenced(READS + "print(3)"), SUM, 0.0, "wrong 1/2: test 2: wrong output"),
    "syntax": (fenced("print("), SUM, 0.0, "error 0/2: test 1: exit code 1 SyntaxError"),
    "raises": (fenced("1 / 0"), SUM, 0.0, "error 0/2: test 1: exit code 1 ZeroDivisionError"),
    "right output, then an error": (fenced(GOOD + "\nraise SystemExit(1)"), SUM, 0.0, "error"),
    "endless": (fenced("while True: pass"), SUM, 0.0, "timeout 0/2: test 1: out of time"),
    "endless output": (
        fenced("while True: print('x' * 9999)"),
        SUM,
        0.0,
        "error 0/2: test 1: over the limit of output",
    ),
    "memory": (fenced("x = [0] * 10**10"), SUM, 0.0, "error"),
    "a fork bomb": (fenced("import os\nwhile True: os.fork()"), SUM, 0.0, "error"),
    "the network": (fenced("import urllib.request as r\nr.urlopen('http://1.1.1.1')"), SUM, 0.0, "error"),
    "disk": (fenced("f = open('/tmp/x', 'w')\nwhile True: f.write('x' * 9999)"), SUM, 0.0, "error"),
    "exits before the checks": (fenced("import sys\nsys.exit(0)"), CHECK, 0.0, "wrong 0/1"),
    "exits at once": (fenced("import os\nos._exit(0)"), CHECK, 0.0, "wrong 0/1"),
    "exits in the function": (fenced("def add(a, b):\n    import os\n    os._exit(0)"), CHECK, 0.0, "wrong 0/1"),
    "exits before the call": (fenced("import os\nprint(3, flush=True)\nos._exit(0)"), ADD, 0.0, "wrong 1/2"),
    "no assertions": (fenced("import sys\nsys.flags.optimize\ndef add(a, b): return 0"), CHECK, 0.0, "error"),
    "equal to everything": (
        fenced("class E(int):\n    __eq__ = lambda s, o: True\ndef add(a, b): return E(0)"),
        ADD,
        0.0,
        "wrong",
    ),
    "an object": (fenced("def add(a, b): return object()"), ADD, 0.0, "error 0/2: test 1: exit code 1 TypeError"),
    "prints beside": (fenced("print('hello')\n" + GOOD_ADD + "\nprint('x', end='')"), ADD, 1.0, "passed"),
    "true for 1": (
        fenced("def add(a, b): return True"),
        [{"function": "add", "input": [0, 1], "output": 1}],
        0.0,
        "wrong",
    ),
    "a tuple for a list": (
        fenced("def f(): return (1, 2)"),
        [{"function": "f", "input": [], "output": [1, 2]}],
        1.0,
        "passed",
    ),
    "a set": (fenced("def f(): return {2, 1}"), [{"function": "f", "input": [], "output": [1, 2]}], 1.0, "passed"),
    "numpy": (
        fenced("import numpy\ndef f(): return numpy.arange(2)"),
        [{"function": "f", "input": [], "output": [0, 1]}],
        1.0,
        "passed",
    ),
    "a float": (fenced("def f(): return 0.1 + 0.2"), [{"function": "f", "input": [], "output": 0.3}], 1.0, "passed"),
    "another float": (fenced("def f(): return 0.30001"), [{"function": "f", "input": [], "output": 0.3}], 0.0, "wrong"),
    "an integer above all floats": (
        fenced("def f(): return 10**400"),
        [{"function": "f", "input": [], "output": 0.3}],
        0.0,
        "wrong",
    ),
    "an integer of 5,000 digits": (
        fenced("import os\nprint('9' * 5000, flush=True)\nos._exit(0)"),
        ADD,
        0.0,
        "wrong",
    ),
    "brackets without end": (fenced("import os\nprint('[' * 10**5, flush=True)\nos._exit(0)"), ADD, 0.0, "wrong"),
    "not a number": (
        fenced("def f(): return float('nan')"),
        [{"function": "f", "input": [], "output": 0.3}],
        0.0,
        "wrong",
    ),
    "keys": (fenced("def f(): return {1: 'a'}"), [{"function": "f", "input": [], "output": {"1": "a"}}], 1.0, "passed"),
    "deep": (
        fenced("def f():\n    x = []\n    for i in range(10**5): x = [x]\n    return x"),
        [{"function": "f", "input": [], "output": 1}],
        0.0,
        "error",
    ),
    "the tests' file is gone": (
        fenced("import os\nfor n in os.listdir('/program'): os.remove('/program/' + n)"),
        CHECK,
        0.0,
        "error",
    ),
    "reads the word first": (fenced("w = input()\nprint(w)\n" + GOOD_ADD), CHECK, 0.0, "error"),
    "surrogates": (fenced("print('\\ud800')"), SUM, 0.0, "error"),
    "a null character": (fenced("print(1)\0"), SUM, 0.0, "error"),
    "a megabyte": (fenced("#" * 2**20 + "\n" + GOOD), SUM, 1.0, "passed"),
    "no tests": (fenced(GOOD), [], None, "untestable"),
    "no tests at all": (fenced(GOOD), None, None, "untestable"),
}


@pytest.mark.parametrize("case", CASES)
def test_scores(case):
    text, tests, expected, outcome = CASES[case]
    value, said = score(text, tests)
    assert value == expected, said
    assert said.startswith(outcome)


COMPILED = {
    "c": (fenced(C.format("a + b"), "c"), 1.0, "passed 2/2"),
    "c, wrong": (fenced(C.format("a - b"), "c"), 0.0, "wrong"),
    "c, crash": (fenced(C.format("*(int *)0"), "c"), 0.0, "error"),
    "c, a file of the system": (fenced('#include "/etc/passwd"', "c"), 0.0, "unbuilt"),
    "c++": (fenced(CPP, "c++"), 1.0, "passed"),
    "c++, does not compile": (fenced(CPP + "}", "cpp"), 0.0, "unbuilt"),
}


@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_compiled_programs(case):
    text, expected, outcome = COMPILED[case]
    value, said = score(text, SUM)
    assert value == expected, said
    assert said.startswith(outcome)


def test_partial_credit_runs_all_tests():
    text = fenced(READS + "if a == 1: raise ValueError\nprint(a + b)")
    assert score(text, SUM) == (0.0, "error 0/2: test 1: exit code 1 ValueError")
    assert score(text, SUM, partial=True) == (0.5, "error 1/2: test 1: exit code 1 ValueError")
    assert score("", SUM, partial=True)[0] == 0.0


def test_humaneval_s_entry_point():
    assert score(fenced(GOOD_ADD), HUMANEVAL, columns={"entry_point": ["add"]})[0] == 1.0
    assert score(fenced("def add(a, b): return 0"), HUMANEVAL, columns={"entry_point": ["add"]})[0] == 0.0


def test_the_row_s_language_wins():
    assert score(fenced(GOOD, "cpp"), SUM, columns={"language": ["python"]})[0] == 1.0
    with pytest.raises(ValueError, match=r"reward 'code', row 0: language must be one of .*, it is 'cobol'"):
        score(fenced(GOOD), SUM, columns={"language": ["cobol"]})
    # a block may call itself anything
    assert score(fenced(GOOD, "pseudocode"), SUM)[0] == 1.0


def test_messages_and_several_rows():
    def message(text):
        return [{"role": "assistant", "content": text}]

    completions = [message(fenced(GOOD)), message(fenced("print(0)")), message("none")]
    assert Code(seconds=5, workers=3)(completions, tests=[SUM, SUM, SUM]) == [1.0, 0.0, 0.0]
    assert Code()([], tests=[]) == []


def test_folders_may_be_made_readable(tmp_path):
    (tmp_path / "data").write_text("3")
    text = fenced(f"print(open({str(tmp_path / 'data')!r}).read())")
    assert score(text, SUM[:1])[0] == 0.0
    assert score(text, SUM[:1], readable=[str(tmp_path)])[0] == 1.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="reward 'code' needs one of the columns tests"):
        Code()(["x"])
    with pytest.raises(ValueError, match="reward 'code' needs the column 'cases'"):
        Code(column="cases")(["x"], tests=[SUM])
    with pytest.raises(ValueError, match="row 1: a test must be a text or have `input` and `output`, it is 3"):
        Code()(["x", "x"], tests=[SUM, [3]])
    with pytest.raises(ValueError, match="tests of c must have inputs and outputs"):
        Code()([fenced("", "c")], tests=[CHECK], language=["c"])
    for name in ("seconds", "memory_mib"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            Code(**{name: 0})
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Code(workers=0)


def test_it_is_pickled_with_its_name():
    reward = pickle.loads(pickle.dumps(Code(name="unit_tests")))
    assert reward.__name__ == "unit_tests"
    assert reward([fenced(GOOD)], tests=[SUM]) == [1.0]


def test_the_last_block():
    assert last_block("```py\na\n```\n```c x\nb\nc\n") == ("c", "b\nc\n")
    assert last_block("no ``` block ```") == ("", None)
    # backticks inside a line do not end it
    assert last_block("```\na = '```'\n```") == ("", "a = '```'")
    assert last_block("```python\n" * 10**5)[1] is not None


def test_forms_of_tests():
    assert parse_tests([{"input": ["1", "2"], "output": 3}])[0] == [PrintedTest(input="1\n2", output="3")]
    # as LeetCode's data sets write a call
    (test,) = parse_tests([{"input": "[1, 2]\n3", "output": "4", "fn_name": "f"}])[0]
    assert test == CallTest(function="f", arguments=[[1, 2], 3], outputs=[4])
    assert parse_tests({"inputs": [[1]], "outputs": [[[2]]], "fn_name": "f"})[0][0].outputs == [[[2]], [2]]
    assert isinstance(parse_tests([{"code": "assert True"}])[0][0], CheckTest)
    assert parse_tests(json.dumps({"language": "c", "test_cases": SUM}))[1] == "c"
    assert parse_tests("  ")[0] == []
    for wrong, message in (
        ({"inputs": [1], "outputs": []}, "1 inputs, 0 outputs"),
        ([{"input": 1, "output": 1, "function": "f"}], "must list its arguments"),
        (5, "tests must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_tests(wrong)


def test_a_driver_s_words_are_not_the_program_s():
    source = dedent("""
        import sys
        sys.stdout = None
        def add(a, b):
            return a + b
    """)
    assert score(fenced(source), ADD)[0] == 1.0
    assert score(fenced(source), CHECK)[0] == 1.0
