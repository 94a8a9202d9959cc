"""Programs of unknown intent, run behind what the kernel has: namespaces, limits and a filter over system calls.

A sandbox is a process in user, mount, process, network, IPC and host-name namespaces of its own. It sees the system's
programs and libraries, read-only, and two small folders in memory; no home, no other process, no network, not even a
socket. Each program in it has no capability, a limit on its time, memory, files and output, and may start threads but
no process. `bwrap` (bubblewrap) or `unshare` (util-linux) makes the namespaces. Where neither can, nothing runs.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

INSIDE = Path(__file__).with_name("inside.py")
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
# tools that make namespaces, the better first
BACKENDS = ("bwrap", "unshare")
SCRATCH_MIB = 64
DEVICES = ("null", "zero", "full", "random", "urandom")
# of starting and ending a sandbox, beside its programs' own
OVERHEAD_SECONDS = 10.0


class SandboxUnavailable(RuntimeError):
    """Nothing on this machine can isolate a program."""


class SandboxFailed(RuntimeError):
    """A sandbox ended without a result."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one run of a program may take; beyond that it is killed.

    Attributes:
        seconds: Wall time; processor time is limited to a second more.
        memory_mib: Address space.
        output_bytes: Of each of its two outputs.
    """

    seconds: float = 5.0
    memory_mib: int = 1024
    output_bytes: int = 2**20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a program.

    Attributes:
        argv: The program and its arguments; its path is looked up inside.
        stdin: What it reads.
        limits: What it may take.
    """

    argv: Sequence[str]
    stdin: str = ""
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        reason: The limit that ended it: "time", "output" or "size" (of a file); None if it ended by itself.
        code: Exit code; a negative number is the signal that killed it.
        stdout: What it printed, as UTF-8 with replacements, up to the limit.
        stderr: The end of what it printed there.
        seconds: Wall time.
    """

    reason: str | None
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def is_fine(self) -> bool:
        """Whether it ended by itself, with exit code 0."""
        return self.reason is None and self.code == 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened in one sandbox.

    Attributes:
        build: The build's outcome, None if there was none to run.
        runs: Outcomes in order; fewer than asked for if the build or, with `stops_early`, a run failed.
    """

    build: Outcome | None
    runs: list[Outcome] = field(default_factory=list)


def run_in_sandbox(
    files: Mapping[str, str],
    runs: Sequence[Run],
    *,
    build: Run | None = None,
    readable: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    stops_early: bool = False,
) -> Report:
    """Run programs one after another in a new sandbox, each beginning with the same files.

    Args:
        files: Names -> text, of files in the programs' folder `/program`. Programs start in an empty folder, which is
            also `/tmp`, unless what they may read lies there.
        runs: Programs to run.
        build: Runs first, in `/program`, and may start processes; what it leaves there is there for each run.
        readable: Folders that programs may read beside the system's.
        environment: Variables; nothing of this process's own is there.
        stops_early: Whether to run nothing after a run that fails.

    Returns:
        What happened.

    Raises:
        SandboxUnavailable: Nothing on this machine can isolate a program, or the kernel refuses it this time.
        SandboxFailed: The sandbox itself ended, for example when the machine was out of memory.
    """
    job = _job(runs, files=files, build=build, environment=environment or {}, stops_early=stops_early)
    backend = available_backend()
    seconds = sum(run.limits.seconds for run in [*runs, *([] if build is None else [build])])
    reply = _launch(backend, job, readable, seconds + OVERHEAD_SECONDS)
    built = reply["built"]
    return Report(
        build=None if built is None else Outcome(**built), runs=[Outcome(**result) for result in reply["results"]]
    )


@functools.cache
def available_backend() -> str:
    """The first of `BACKENDS` that works here.

    Raises:
        SandboxUnavailable: Neither does; says why.
    """
    reasons = []
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"code runs in a sandbox of Linux namespaces only; this is {sys.platform}")
    for backend in BACKENDS:
        if shutil.which(backend) is None:
            reasons.append(f"{backend} is not installed")
            continue
        probe = _job([Run(argv=["true"])], files={}, build=None, environment={}, stops_early=False)
        try:
            (result,) = _launch(backend, probe, (), OVERHEAD_SECONDS)["results"]
        except (SandboxFailed, SandboxUnavailable) as error:
            reasons.append(f"{backend}: {error}")
            continue
        # what takes a program's rights away may not be there, such as the filter
        if Outcome(**result).is_fine:
            return backend
        reasons.append(f"{backend}: a program does not run: {result['stderr'].strip()}")
    raise SandboxUnavailable(
        "no code is run, since nothing here can isolate it: "
        + "; ".join(reasons)
        + ". Install bubblewrap, or allow user namespaces (kernel.unprivileged_userns_clone, "
        "user.max_user_namespaces; in a container seccomp and AppArmor profiles that permit them)"
    )


def _job(
    runs: Sequence[Run],
    *,
    files: Mapping[str, str],
    build: Run | None,
    environment: Mapping[str, str],
    stops_early: bool,
) -> dict[str, Any]:
    """What `inside.py` reads, but for what the tool that makes the namespaces decides."""
    return {
        "devices": DEVICES,
        "files": {
            name: base64.b64encode(text.encode("utf-8", "surrogatepass")).decode() for name, text in files.items()
        },
        "size_mib": SCRATCH_MIB,
        "environment": dict(environment),
        "build": None if build is None else _fields(build, is_build=True),
        "runs": [_fields(run) for run in runs],
        "stops_early": stops_early,
    }


def _fields(run: Run, *, is_build: bool = False) -> dict[str, Any]:
    return {
        "argv": list(run.argv),
        "stdin": run.stdin,
        **asdict(run.limits),
        "size_mib": SCRATCH_MIB,
        "may_fork": is_build,
        "in_scratch": not is_build,
    }


def _launch(backend: str, job: dict[str, Any], readable: Sequence[str], seconds: float) -> dict[str, Any]:
    folders = [path for path in (*SYSTEM_FOLDERS, *_python_folders(), *readable) if os.path.lexists(path)]
    with TemporaryDirectory(prefix="sandbox-") as root:
        command = {"bwrap": _bwrap_command, "unshare": _unshare_command}[backend](folders)
        text = json.dumps(job | {"root": root, "readable": folders})
        return _reply_of(command, text, seconds)


def _reply_of(command: Sequence[str], text: str, seconds: float) -> dict[str, Any]:
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # in a session of its own: Ctrl-C is for the trainer
    process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
    try:
        stdout, stderr = process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise SandboxFailed(f"a sandbox did not end within {seconds:.0f} s") from None
    finally:
        # its end is the end of everything inside
        process.kill()
        process.communicate()
    try:
        reply: dict[str, Any] = json.loads(stdout)
    except json.JSONDecodeError:
        last = (stderr.strip().splitlines() or ["no message"])[-1]
        raise SandboxFailed(f"a sandbox ended with exit code {process.returncode}: {last}") from None
    if "refused" in reply:
        raise SandboxUnavailable(reply["refused"])
    return reply


def _python_folders() -> list[str]:
    """Where the interpreter and its packages are."""
    paths = {sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")}
    return sorted(path for path in paths if not path.startswith("/usr/") and path != "/usr")


def _unshare_command(folders: Sequence[str]) -> list[str]:
    namespaces = ["--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts"]
    return ["unshare", *namespaces, "--fork", "--kill-child", "--", *_inside_command()]


def _bwrap_command(folders: Sequence[str]) -> list[str]:
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--as-pid-1", "--new-session", "--clearenv"]
    # to mount folders anew for each program, and to drop all capabilities before it
    command += ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]
    for folder in folders:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind", folder, folder]
    for device in DEVICES:
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    command += ["--ro-bind", str(INSIDE), "/inside.py", "--proc", "/proc", "--dir", "/program", "--dir", "/scratch"]
    if not any(folder.startswith("/tmp/") for folder in folders):
        command += ["--symlink", "/scratch", "/tmp"]
    return [*command, "--remount-ro", "/", "--", sys.executable, "-I", "-S", "/inside.py", "--mounted"]


def _inside_command() -> list[str]:
    return [sys.executable, "-I", "-S", str(INSIDE)]
