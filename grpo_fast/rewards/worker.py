"""What runs in the processes of `grpo_fast.rewards.pool`: a nursery, and the workers that it forks.

The nursery is a fresh interpreter of one thread: it imports what workers need once, and forks. A fork of the trainer
itself would copy CUDA's, vLLM's and other threads' state. Run as a file; imports the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

FORK, KILL, QUIT = b"F", b"K", b"Q"
# a command to the nursery, and its answer: one letter and a process id
COMMAND = struct.Struct("!cq")
LENGTH = struct.Struct("!Q")

PR_SET_PDEATHSIG = 1
# seconds between two looks whether the trainer lives; the end of its socket is seen at once
LOOK_S = 1.0
# a message of an exception, in characters
MESSAGE_LIMIT = 2000


def send(sock: socket.socket, data: bytes) -> None:
    """Send one message, preceded by its length."""
    sock.sendall(LENGTH.pack(len(data)) + data)


def receive(sock: socket.socket) -> bytes:
    """Receive one message.

    Raises:
        EOFError: If the other end is closed.
    """
    (length,) = LENGTH.unpack(_receive_exactly(sock, LENGTH.size))
    return _receive_exactly(sock, length)


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def run_nursery(control: socket.socket) -> None:
    """Fork and kill workers as the trainer says, until it ends."""
    trainer = os.getppid()
    settings = pickle.loads(receive(control))
    sys.path[:] = settings["path"]
    for module in settings["preload"]:
        importlib.import_module(module)
    control.send(COMMAND.pack(FORK, os.getpid()))
    children: set[int] = set()
    while os.getppid() == trainer:
        # another process may hold a copy of the trainer's end, and would keep it open
        if not select.select([control], [], [], LOOK_S)[0]:
            continue
        data, sockets, _, _ = socket.recv_fds(control, COMMAND.size, 1)
        if not data:
            break
        command, pid = COMMAND.unpack(data)
        if command == FORK:
            pid = _fork(control, sockets[0], settings["memory"])
            children.add(pid)
            control.send(COMMAND.pack(FORK, pid))
        elif command == KILL and pid in children:
            children.discard(pid)
            # one that ended by itself is a zombie still, so the id is its own
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        elif command == QUIT:
            break
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(control: socket.socket, worker_socket: int, memory: int | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    nursery = os.getpid()
    pid = os.fork()
    if pid:
        os.close(worker_socket)
        return pid
    try:
        control.close()
        _bind_to(nursery, memory)
        run_worker(socket.socket(fileno=worker_socket))
    finally:
        os._exit(0)


def _bind_to(nursery: int, memory: int | None) -> None:
    """Die with the nursery, write no core file, take no more memory than allowed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != nursery:
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def run_worker(sock: socket.socket) -> None:
    """Work on chunks of items until the trainer hangs up; results go back one by one, as JSON.

    A chunk is a pickled (function pickled by reference, time limit in seconds, list of argument tuples).
    """
    functions: dict[bytes, Callable[..., Any]] = {}
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pickled, timeout_s, items = pickle.loads(receive(sock))
            try:
                if pickled not in functions:
                    functions[pickled] = pickle.loads(pickled)
            except Exception as error:
                _report(sock, "unusable", f"{type(error).__name__}: {error}")
                return
            _report(sock, "begun", None)
            for arguments in items:
                _limit_processor_time(timeout_s)
                status = _work(sock, functions[pickled], arguments)
                if status == "memory":
                    # what is left of the heap may not do for the next item
                    return


def _work(sock: socket.socket, function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    try:
        status, value = "done", function(*arguments)
        text = json.dumps(value)
    except MemoryError:
        status, text = "memory", "null"
    except BaseException as error:
        status, text = "raised", json.dumps(f"{type(error).__name__}: {error}"[:MESSAGE_LIMIT])
    sys.stdout.flush()
    send(sock, f'["{status}", {text}]'.encode())
    return status


def _report(sock: socket.socket, status: str, value: Any) -> None:
    send(sock, json.dumps([status, value]).encode())


def _limit_processor_time(timeout_s: float) -> None:
    """A second guard beside the trainer's clock, for a trainer that is stopped itself: SIGXCPU ends the worker."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used.ru_utime + used.ru_stime + 2 * timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    run_nursery(socket.socket(fileno=int(sys.argv[1])))
