"""The first process of a sandbox: builds its file system, then runs programs in it, each without any privilege.

`python -I -S inside.py` reads a job as JSON on its standard input and writes results as JSON on its standard output.
It is process 1 of a process namespace, so that what a program leaves behind ends with it. Nothing but the standard
library is there.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import selectors
import signal
import stat
import struct
import sys
import time
from contextlib import suppress
from typing import Any

WORK, SCRATCH = "/program", "/scratch"
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": SCRATCH,
    "TMPDIR": SCRATCH,
    "LANG": "C.UTF-8",
    # each of the C library's heaps takes 64 MiB of the address space, and BLAS makes a thread a core
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
MIB = 2**20
MAX_INODES = 4096

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
MS_REMOUNT, MNT_DETACH = 32, 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 28, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
# NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off; each locked
SECUREBITS = 0b00101111
CAPABILITY_VERSION_3 = 0x20080522

# system calls that are refused: their numbers on x86_64 and on aarch64, -1 where there is none
_SYSCALLS = {
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265),
    "setrlimit": (160, 164),
}
_FORKS = {"fork": (57, -1), "vfork": (58, -1)}
CLONE, CLONE3 = (56, 220), (435, 435)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
CLONE_THREAD, CLONE_NAMESPACES = 0x10000, 0x7E020000
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


# -- the file system ---------------------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = (source.encode(), target.encode(), None if kind is None else kind.encode())
    check(libc.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mounting {source} at {target}")


def make_read_only(target: str) -> None:
    """Everything mounted at and below `target`, without devices and setuid programs."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes))
    check(result, f"making {target} read-only")


def build_root(root: str, readable: list[str], devices: list[str]) -> None:
    """A root that holds `readable`, read-only, and places for two folders to write into; the old one is gone.

    Args:
        root: An empty folder, which it is built in.
        readable: Folders of the system, and links to them.
        devices: Names in /dev.

    Raises:
        OSError: the kernel refuses a step.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size=1m,nr_inodes={MAX_INODES},mode=755")
    for path in readable:
        place = root + path
        if os.path.islink(path):
            # /lib is a link to usr/lib on most systems
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.symlink(os.readlink(path), place)
        elif os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
            mount(path, place, None, MS_BIND | MS_REC)
            make_read_only(place)
    os.makedirs(f"{root}/dev")
    for name in devices:
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    os.makedirs(f"{root}/proc")
    # a container that hides parts of its own /proc may not mount another; programs do without
    with suppress(OSError):
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for folder in (WORK, SCRATCH):
        os.makedirs(root + folder, exist_ok=True)
    if not os.path.lexists(f"{root}/tmp"):
        os.symlink(SCRATCH, f"{root}/tmp")
    os.chdir(root)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "unmounting the old root")
    os.chdir("/")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def snapshot(folder: str) -> dict[str, tuple[int, bytes]]:
    """Regular files below `folder`: their modes and bytes."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(path, name)
            mode = os.lstat(file).st_mode
            if stat.S_ISREG(mode):
                with open(file, "rb") as stream:
                    found[file] = (stat.S_IMODE(mode), stream.read())
    return found


def restore(files: dict[str, tuple[int, bytes]], size_mib: int) -> None:
    """New memory for both folders, whatever is in them, with `files`."""
    for folder in (WORK, SCRATCH):
        # there is none the first time
        libc.umount2(folder.encode(), MNT_DETACH)
        limits = f"size={size_mib}m,nr_inodes={MAX_INODES},mode=777"
        mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, limits)
    for file, (mode, content) in files.items():
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(content)
        os.chmod(file, mode)


# -- a program's rights ------------------------------------------------------------------------------------------------


def _filter(*, may_fork: bool) -> bytes:
    """A classic BPF program over `struct seccomp_data` that refuses system calls of no use to a program.

    Raises:
        OSError: on a machine whose system calls are not listed here.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(ENOSYS, f"no list of system calls for {machine}")
    column, architecture = ARCHITECTURES[machine]
    load, equal, at_least, any_of, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000

    def refuse(code: int) -> int:
        return 0x00050000 | code

    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        # another calling convention's numbers (x32)
        (at_least, 0, 1, 0x40000000),
        (give, 0, 0, kill),
    ]
    refused = _SYSCALLS | ({} if may_fork else _FORKS)
    for number in (numbers[column] for numbers in refused.values()):
        if number >= 0:
            program += [(equal, 0, 1, number), (give, 0, 0, refuse(EPERM))]
    # its flags are in memory, which a filter cannot read: the C library falls back to `clone`
    program += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse(ENOSYS))]
    program += [(equal, 0, 5, CLONE[column]), (load, 0, 0, 16), (any_of, 0, 1, CLONE_NAMESPACES)]
    program += [(give, 0, 0, refuse(EPERM))]
    program += [(any_of, 1, 0, CLONE_THREAD), (give, 0, 0, allow if may_fork else refuse(EPERM))]
    program += [(give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *line) for line in program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def drop_rights(*, may_fork: bool) -> None:
    """No capability now or after any `execve`, and a filter over system calls."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            # above the last one that the kernel knows
            break
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    check(libc.prctl(PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0), "securebits")
    header, none = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    check(libc.capset(header, none), "dropping capabilities")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    code = _filter(may_fork=may_fork)
    program = _Program(len(code) // 8, code)
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def set_limits(run: dict[str, Any]) -> None:
    seconds = int(run["seconds"]) + 1
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: run["memory_mib"] * MIB,
        resource.RLIMIT_FSIZE: run["size_mib"] * MIB,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


# -- running -----------------------------------------------------------------------------------------------------------


def become(run: dict[str, Any], environment: dict[str, str], ends: tuple[int, int, int]) -> None:
    """In the forked process: turn into the program; writes what went wrong to its standard error and ends."""
    try:
        os.setsid()
        for target, end in enumerate(ends):
            os.dup2(end, target)
        os.closerange(3, 1024)
        os.chdir(SCRATCH if run["in_scratch"] else WORK)
        set_limits(run)
        drop_rights(may_fork=run["may_fork"])
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execvpe(run["argv"][0], run["argv"], environment)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(127)


def execute(run: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Run one program to its end, or to the end of its time or of what it may print; then end all that it left."""
    started = time.monotonic()
    stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        become(run, environment, (stdin[0], stdout[1], stderr[1]))
    for end in (stdin[0], stdout[1], stderr[1]):
        os.close(end)
    outputs = {stdout[0]: bytearray(), stderr[0]: bytearray()}
    deadline = started + run["seconds"]
    reason = _transfer(stdin[1], run["stdin"].encode("utf-8", "surrogatepass"), outputs, run["output_bytes"], deadline)
    status = None
    while reason is None and status is None:
        # it may have closed its outputs and run on
        pid, state = os.waitpid(child, os.WNOHANG)
        if pid:
            status = state
        elif time.monotonic() > deadline:
            reason = "time"
        else:
            time.sleep(0.002)
    kill_all()
    if status is None:
        status = os.waitpid(child, 0)[1]
    reap()
    for end in outputs:
        os.close(end)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        reason = "time"
    elif code == -signal.SIGXFSZ:
        reason = "size"
    return {
        "reason": reason,
        "code": code,
        "stdout": outputs[stdout[0]].decode("utf-8", "replace"),
        "stderr": outputs[stderr[0]][-2000:].decode("utf-8", "replace"),
        "seconds": time.monotonic() - started,
    }


def _transfer(stdin: int, text: bytes, outputs: dict[int, bytearray], limit: int, deadline: float) -> str | None:
    """Feed a program and collect what it prints, until it closes its outputs; says what limit it met."""
    watched = selectors.DefaultSelector()
    os.set_blocking(stdin, False)
    watched.register(stdin, selectors.EVENT_WRITE)
    for end in outputs:
        watched.register(end, selectors.EVENT_READ)
    remaining, num_open = memoryview(text), len(outputs)
    try:
        while num_open:
            left = deadline - time.monotonic()
            if left <= 0:
                return "time"
            for key, _ in watched.select(left):
                if key.fd == stdin:
                    try:
                        remaining = remaining[os.write(stdin, remaining[:65536]) :]
                    except BrokenPipeError:
                        remaining = remaining[:0]
                    if not remaining:
                        watched.unregister(stdin)
                        os.close(stdin)
                        stdin = -1
                    continue
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    watched.unregister(key.fd)
                    num_open -= 1
                outputs[key.fd] += chunk
                if len(outputs[key.fd]) > limit:
                    del outputs[key.fd][limit:]
                    return "output"
        return None
    finally:
        if stdin >= 0:
            os.close(stdin)
        watched.close()


def kill_all() -> None:
    """Every process of the namespace but this one; the kernel signals all of them before one can fork."""
    # there may be none
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def reap() -> None:
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _is_fine(result: dict[str, Any]) -> bool:
    return result["code"] == 0 and result["reason"] is None


def main() -> None:
    if os.getpid() != 1:
        # `kill_all` would reach processes outside
        raise SystemExit("the first process of a sandbox must be process 1")
    # process 1 gets no signal from inside that it has no handler for
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = json.load(sys.stdin)
    try:
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if "--mounted" not in sys.argv:
            build_root(job["root"], job["readable"], job["devices"])
        if os.listdir("/proc"):
            # of a process whose user is root outside, too, the kernel's settings could be written
            mount("none", "/proc", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
        restore({}, job["size_mib"])
    except OSError as error:
        json.dump({"refused": str(error)}, sys.stdout)
        return
    environment = ENVIRONMENT | job["environment"]
    files = {f"{WORK}/{name}": (0o644, base64.b64decode(content)) for name, content in job["files"].items()}
    restore(files, job["size_mib"])
    built = None
    if job["build"] is not None:
        built = execute(job["build"], environment)
        if _is_fine(built):
            files = snapshot(WORK)
    results = []
    if built is None or _is_fine(built):
        for run in job["runs"]:
            restore(files, job["size_mib"])
            results.append(execute(run, environment))
            if job["stops_early"] and not _is_fine(results[-1]):
                break
    json.dump({"built": built, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
