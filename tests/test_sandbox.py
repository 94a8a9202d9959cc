"""What a program in the sandbox can see and do, and that all of it ends; by each tool that makes namespaces here."""

import os
import shutil
import sys
import time

import pytest

from grpo_fast.rewards.sandbox import Limits, Run, SandboxFailed, SandboxUnavailable, launching, run_in_sandbox

BACKENDS = [backend for backend in ("bwrap", "unshare") if shutil.which(backend)]
# a machine whose kernel or container forbids namespaces runs no code at all
pytestmark = pytest.mark.skipif(not BACKENDS or not sys.platform.startswith("linux"), reason="needs Linux namespaces")
PYTHON = (sys.executable, "-I", "/program/main.py")
SECONDS = 1.0


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    launching.available_backend.cache_clear()
    monkeypatch.setattr(launching, "BACKENDS", (request.param,))
    yield request.param
    launching.available_backend.cache_clear()


def run(code, *, stdin="", environment=None, **limits):
    program = Run(argv=PYTHON, stdin=stdin, limits=Limits(**{"seconds": 10.0, **limits}))
    report = run_in_sandbox({"main.py": code}, [program], environment=environment)
    (outcome,) = report.runs
    return outcome


def printed(code, **options):
    outcome = run(code, **options)
    assert outcome.is_fine, outcome
    return outcome.stdout


def test_a_program_reads_and_prints():
    assert printed("print(int(input()) + 1)\nprint('ä')", stdin="4\n") == "5\nä\n"
    outcome = run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)")
    assert (outcome.reason, outcome.code, outcome.stdout, outcome.stderr) == (None, 3, "out\n", "err\n")
    assert run("import os\nos.kill(os.getpid(), 11)").code == -11
    assert "no such program" not in run("").stderr


def test_a_program_that_is_not_there():
    (outcome,) = run_in_sandbox({}, [Run(argv=["no such program"])]).runs
    assert outcome.code == 127
    assert "No such file" in outcome.stderr


def test_nothing_of_this_process_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "of the trainer")
    (tmp_path / "weights").write_text("of the policy")
    names = printed("import os\nprint(*os.environ)", environment={"GIVEN": "1"}).split()
    assert "GIVEN" in names
    assert "SECRET" not in names
    assert (
        printed(f"import os\nprint(os.path.exists({str(tmp_path)!r}), os.path.exists({str(__file__)!r}))")
        == "False False\n"
    )
    assert printed("import os\nprint([p for p in os.listdir('/proc') if p.isdigit()])") == "['1', '2']\n"
    assert printed("import os\nprint(len(os.listdir('/proc/self/fd')))") == "4\n"
    assert printed("import os\nprint(sorted(os.listdir('/sys')) if os.path.exists('/sys') else [])") == "[]\n"


def test_it_has_no_capability():
    lines = printed("print(*(line for line in open('/proc/self/status') if line[:3] in ('Cap', 'NoN', 'Sec')), sep='')")
    fields = dict(line.split() for line in lines.split("\n") if line)
    assert {int(value, 16) for name, value in fields.items() if name.startswith("Cap")} == {0}
    assert fields["NoNewPrivs:"] == "1"
    assert fields["Seccomp:"] == "2"


# each ends by itself, refused
REFUSED = {
    "a socket": "import socket\nsocket.socket()",
    "a socket of another family": "import socket\nsocket.socket(socket.AF_UNIX)",
    "a process": "import os\nos.fork()",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a shell": "import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    "writing to the system": "open('/usr/new', 'w')",
    "writing to the root": "open('/new', 'w')",
    "writing to a device": "open('/dev/sda', 'w')",
    "memory of the first process": "open('/proc/1/mem', 'rb').read(1)",
    "files of the first process": "import os\nos.open('/proc/1/fd/1', os.O_WRONLY)",
    "its root": "import os\nos.listdir('/proc/1/root')",
    "memory": "x = bytearray(2**34)",
    "a large file": "f = open('x', 'wb')\nwhile True: f.write(bytes(2**20))",
    "many files": "for i in range(10**6): open(str(i), 'w').close()",
    "many threads": "import threading as t, time\nwhile True: t.Thread(target=time.sleep, args=(2,)).start()",
    "another root": "import os\nos.chroot('/tmp')",
    "setuid": "import os\nos.setuid(1)",
    "a namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "tracing": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**50, 2**50))",
    "the kernel's settings": "open('/proc/sys/kernel/hostname', 'w').write('x')",
    "a deep folder": "import os\nfor i in range(10**6): os.mkdir('x'); os.chdir('x')",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    outcome = run(REFUSED[case], memory_mib=512)
    assert not outcome.is_fine
    assert outcome.seconds < 9, outcome


# each would go on for ever
ENDLESS = {
    "a loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "sleep with closed outputs": "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(1000)",
    "no reader of its input": "import signal\nsignal.pause()",
    "signals that are ignored": """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
while True: pass
""",
    "a big power": "x = 10 ** 10 ** 10",
    "a stopped process": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "a new session": "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(1000)",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_endless(case):
    started = time.monotonic()
    assert run(ENDLESS[case], seconds=SECONDS, memory_mib=512, stdin="x" * 10**6).reason == "time"
    # a busy machine starts and ends the sandbox slowly
    assert time.monotonic() - started < SECONDS + 8


def test_endless_output_ends_at_its_limit():
    outcome = run("while True: print('x' * 999)", output_bytes=10_000)
    assert (outcome.reason, len(outcome.stdout)) == ("output", 10_000)
    assert run("import sys\nwhile True: print('x' * 999, file=sys.stderr)", output_bytes=10_000).reason == "output"


def test_the_first_process_survives():
    assert (
        printed("import os\nfor sig in range(1, 65):\n  try: os.kill(1, sig)\n  except OSError: pass\nprint('on')")
        == "on\n"
    )


def test_threads_and_numpy_work():
    code = """
import threading
threads = [threading.Thread(target=print, args=(i,)) for i in range(20)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    assert sorted(map(int, printed(code).split())) == list(range(20))
    assert printed("import numpy\nprint(numpy.ones(3).sum())") == "3.0\n"


def test_runs_begin_alike():
    """What a run leaves, even under a folder that nobody may enter, is gone in the next."""
    leave = """
import os
print(os.listdir('.'), sorted(os.listdir('/program')))
os.makedirs('a/b')
os.chmod('a', 0)
os.remove('/program/main.py')
open('/program/other', 'w')
"""
    report = run_in_sandbox({"main.py": leave}, [Run(argv=PYTHON)] * 3)
    assert [outcome.stdout for outcome in report.runs] == ["[] ['main.py']\n"] * 3


def test_a_build_may_start_processes_and_leaves_its_files():
    build = Run(argv=["sh", "-c", "cat source | tr a-z A-Z > built"])
    report = run_in_sandbox({"source": "word"}, [Run(argv=["cat", "/program/built"])], build=build)
    assert report.build is not None
    assert report.build.is_fine
    assert report.runs[0].stdout == "WORD"


def test_no_run_follows_a_failed_build_or_an_early_stop():
    report = run_in_sandbox({}, [Run(argv=["true"])], build=Run(argv=["false"]))
    assert (report.build.code, report.runs) == (1, [])
    runs = [Run(argv=["true"]), Run(argv=["false"]), Run(argv=["true"])]
    assert [outcome.code for outcome in run_in_sandbox({}, runs).runs] == [0, 1, 0]
    assert [outcome.code for outcome in run_in_sandbox({}, runs, stops_early=True).runs] == [0, 1]


def test_a_fork_bomb_in_a_build_ends():
    started = time.monotonic()
    report = run_in_sandbox(
        {}, [], build=Run(argv=["sh", "-c", "f() { f | f & }; f; sleep 9"], limits=Limits(seconds=1))
    )
    assert not report.build.is_fine
    assert time.monotonic() - started < 10
    assert run("").is_fine


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(os.listdir("/proc"))
    run("import time\ntime.sleep(100)", seconds=0.3)
    assert os.listdir(tmp_path) == []
    mine = [p for p in set(os.listdir("/proc")) - before if p.isdigit() and "inside.py" in _command(p)]
    assert mine == []


def _command(process):
    try:
        with open(f"/proc/{process}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


@pytest.mark.parametrize("name", ["seconds", "memory_mib", "output_bytes"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        Limits(**{name: 0})


def test_without_a_tool_nothing_runs(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    launching.available_backend.cache_clear()
    with pytest.raises(SandboxUnavailable, match=r"is not installed.*Install bubblewrap"):
        run("print()")


def test_without_namespaces_nothing_runs(monkeypatch):
    monkeypatch.setattr(launching, "_inside_command", lambda: ["sh", "-c", "echo no namespaces here >&2; exit 1"])
    monkeypatch.setattr(
        launching, "_bwrap_command", lambda folders: ["sh", "-c", "echo no namespaces here >&2; exit 1"]
    )
    launching.available_backend.cache_clear()
    with pytest.raises(SandboxUnavailable, match=r"no code is run.*no namespaces here"):
        run("print()")


def test_without_a_filter_nothing_runs(monkeypatch, tmp_path):
    """A machine whose system calls nobody has listed: else every program would fail there, and score 0."""
    inside = tmp_path / "inside.py"
    listed, unlisted = "if machine not in ARCHITECTURES", "if machine"
    assert listed in launching.INSIDE.read_text()
    inside.write_text(launching.INSIDE.read_text().replace(listed, unlisted))
    monkeypatch.setattr(launching, "INSIDE", inside)
    with pytest.raises(SandboxUnavailable, match=r"a program does not run: .*no list of system calls"):
        run("print()")


def test_what_the_kernel_refuses_later_is_not_the_program_s_fault(monkeypatch, tmp_path):
    assert launching.available_backend()
    inside = tmp_path / "inside.py"
    text = launching.INSIDE.read_text()
    inside.write_text(
        text.replace("        restore({}, job", "        raise OSError('no space')\n        restore({}, job")
    )
    monkeypatch.setattr(launching, "INSIDE", inside)
    with pytest.raises(SandboxUnavailable, match="no space"):
        run("print()")


def test_the_first_process_refuses_to_be_another():
    with pytest.raises(SandboxFailed, match="must be process 1"):
        launching._reply_of([sys.executable, "-I", "-S", str(launching.INSIDE)], "{}", 5)
