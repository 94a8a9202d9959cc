"""The script for a GPU machine: its order and limits, what it does with failures, and how a second run goes on."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
# answers every command as an interpreter would that has all modules; `fail` in a command's words fails it
STUB = """#!/bin/bash
case "$*" in
    *{fails}*) exit 3 ;;
    *{hangs}*) exec sleep 60 ;;
    *find_spec*) for word in "$@"; do [ "$word" = "{lacks}" ] && exit 1; done ;;
esac
echo "ran $*"
"""


def gpu_run(*options, **environment):
    command = ["bash", str(BENCH / "gpu_run.sh"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def make_stub(folder, *, fails="no such word", hangs="no such word", lacks="no_such_module"):
    stub = folder / "python"
    stub.write_text(STUB.format(fails=fails.replace(" ", "\\ "), hangs=hangs.replace(" ", "\\ "), lacks=lacks))
    stub.chmod(0o755)
    return str(stub)


def summary(out):
    lines = (out / "summary.txt").read_text().splitlines()
    return {line.split()[0]: line.split(" s  ", 1)[1] for line in lines}


def listed():
    found = {}
    for line in gpu_run("--list", PYTHON="python").stdout.splitlines():
        name, limit, command = line.split(maxsplit=2)
        found[name] = int(limit), command
    return found


def test_the_steps_fit_their_time_and_correctness_comes_first():
    steps = listed()
    names = list(steps)
    assert names[:3] == ["machine", "offline", "tests-kernels"]
    limits = [limit for limit, _ in steps.values()]
    assert sum(limits) <= 25 * 60
    # a machine lent for ten minutes answers these
    assert sum(limits[: names.index("memory") + 1]) <= 580
    assert {"step", "head"} <= set(names[: names.index("memory")])


def test_every_command_names_what_is_there():
    for name, (_, command) in listed().items():
        for file in re.findall(r"(?:tests|bench)/[\w/]+\.py", command):
            assert (ROOT / file).exists(), f"{name}: {file}"
        for module in re.findall(r"-m ((?:bench|grpo_kernels)[\w.]*)", command):
            path = module.replace(".", "/")
            assert any(root.with_suffix(".py").exists() for root in (ROOT / path, ROOT / "kernels" / path)), name


def test_a_script_takes_the_options_that_it_is_given():
    options = set(re.findall(r" (--[\w-]+)", listed()["adamw"][1]))
    command = [sys.executable, "-m", "bench.bench_adamw", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert options
    assert all(option in done.stdout for option in options)


def test_all_steps_run_and_a_failure_stops_nothing(tmp_path):
    out = tmp_path / "out"
    done = gpu_run(out, PYTHON=make_stub(tmp_path, fails="bench_adamw", lacks="vllm"))
    assert done.returncode == 1
    ends = summary(out)
    expected = dict.fromkeys(listed(), "ok") | {"adamw": "failed", "tests-vllm": "left out: needs pytest vllm datasets"}
    assert ends.pop("counters") in ("ok", "left out: needs ncu")
    expected.pop("counters")
    assert ends == expected
    assert "ran -m grpo_kernels.offline" in (out / "offline.log").read_text()


def test_what_is_left_out_is_no_failure(tmp_path):
    done = gpu_run(tmp_path / "out", "tests-vllm", PYTHON=make_stub(tmp_path, lacks="vllm"))
    assert done.returncode == 0
    assert summary(tmp_path / "out") == {"tests-vllm": "left out: needs pytest vllm datasets"}


def test_a_step_that_hangs_is_stopped_and_the_rest_has_no_time(tmp_path):
    out = tmp_path / "out"
    done = gpu_run(out, "offline", "adamw", PYTHON=make_stub(tmp_path, hangs="offline"), BUDGET="5")
    assert done.returncode == 1
    assert summary(out) == {"offline": "out of time", "adamw": "no time left"}
    # the budget ends it, long before the step's own limit
    assert int((out / "summary.txt").read_text().split()[1]) < 20


def test_a_second_run_does_what_the_first_did_not(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lines = ["machine 1 s  ok", "offline 1 s  failed", "tests-kernels 130 s  out of time", "step 0 s  no time left"]
    (out / "status.txt").write_text("\n".join(lines) + "\n")
    done = gpu_run("--resume", out, PYTHON=make_stub(tmp_path))
    # what failed, failed: it is done again only by its name
    assert done.returncode == 1
    assert not (out / "machine.log").exists()
    assert not (out / "offline.log").exists()
    assert (out / "tests-kernels.log").exists()
    ends = summary(out)
    assert (ends["offline"], ends["tests-kernels"], ends["step"], ends["adamw"]) == ("failed", "ok", "ok", "ok")
    assert list(ends)[:4] == ["machine", "offline", "tests-kernels", "step"]
    assert gpu_run(out, "offline", PYTHON=make_stub(tmp_path)).returncode == 0
    assert summary(out)["offline"] == "ok"


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--again"], {}, "unknown option --again: --list and --resume are known"),
        (["OUT", "no-step"], {}, "unknown step no-step: --list names them"),
        (["OUT"], {"BUDGET": "ten"}, "BUDGET must be a whole number of seconds, got 'ten'"),
        (["OUT"], {"WHEELS": "/nowhere"}, "WHEELS=/nowhere has no wheels"),
    ],
)
def test_wrong_calls_are_refused(tmp_path, options, environment, message):
    options = [tmp_path if option == "OUT" else option for option in options]
    done = gpu_run(*options, PYTHON=make_stub(tmp_path), **environment)
    assert done.returncode == 2
    assert message in done.stderr


def test_wheels_are_there_for_this_run_alone(tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm_of_a_test.py", "")
        wheel.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr("brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("brought-1.0.dist-info/RECORD", "")
    stub = tmp_path / "python"
    # the real one, but for the step: it says what it finds
    stub.write_text(
        f'#!/bin/bash\n[[ $* == *bench_adamw* ]] || exec {sys.executable} "$@"\n'
        f"exec {sys.executable} -c 'import vllm_of_a_test; print(vllm_of_a_test.__file__)'\n"
    )
    stub.chmod(0o755)
    done = gpu_run(out, "adamw", PYTHON=str(stub), WHEELS=str(wheels))
    assert done.returncode == 0, done.stdout + done.stderr
    installed = Path((out / "adamw.log").read_text().strip())
    assert installed.name == "vllm_of_a_test.py"
    assert not installed.exists()


def test_wheels_are_pinned_and_those_of_the_bench_extra():
    lines = (BENCH / "gpu_wheels.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["trl"] == "1.16.0"
    assert pins["liger-kernel"] == "0.8.5"
    assert {"cut-cross-entropy", "datasets", "pytest-benchmark", "nvidia-ml-py", "peft", "accelerate"} <= pins.keys()


def test_too_many_wheels_are_refused(tmp_path):
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/bash\nfor word in "$@"; do [ "$last" = -d ] && folder=$word; last=$word; done\n'
                   "head -c 2097152 /dev/zero > $folder/a-1-py3-none-any.whl\n")  # fmt: skip
    pip.chmod(0o755)
    command = ["bash", str(BENCH / "gpu_wheels.sh"), str(tmp_path / "to")]
    for limit, code in (("3", 0), ("1", 1)):
        environment = os.environ | {"PYTHON": str(pip), "LIMIT_MIB": limit}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == code, done.stderr
    assert "the wheels are larger than 1 MiB" in done.stderr
