"""A pool of worker processes that are killed at their time limit, for work that cannot be trusted to end.

A limit inside a process cannot cut off a C function (a power of big integers, a regular expression). Here the trainer
kills the worker that is late and starts another; the items that the worker had not begun are given out again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import pickle
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from grpo_fast.rewards.marks import callable_name
from grpo_fast.rewards.worker import COMMAND, FORK, KILL, LENGTH, QUIT, send

# imports of the nursery, and of a user's function in a worker; a cold disk and torch take long
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
# items a worker is given at a time: many cost few messages, few leave little to do twice
CHUNK = 16
MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one item.

    Attributes:
        status: 'done', 'raised' (the function did), 'timeout' (killed at the limit), 'memory' (more than allowed) or
            'died' (the worker ended by itself: a crash, an exit).
        value: What the function returned; the exception as text if it raised.
    """

    status: Literal["done", "raised", "timeout", "memory", "died"]
    value: Any = None


@dataclass
class _Worker:
    """A worker as the trainer sees it: what it works on and until when."""

    pid: int
    sock: socket.socket
    items: deque[int] = field(default_factory=deque)
    deadline: float = math.inf
    last_status: str = ""
    received: bytearray = field(default_factory=bytearray)

    def messages(self) -> list[list[Any]] | None:
        """Whole messages that have come; None at the end of the connection."""
        try:
            data = self.sock.recv(1 << 20)
        except ConnectionResetError:
            return None
        if not data:
            return None
        self.received += data
        found = []
        while len(self.received) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self.received)
            if len(self.received) < LENGTH.size + length:
                break
            found.append(json.loads(self.received[LENGTH.size : LENGTH.size + length]))
            del self.received[: LENGTH.size + length]
        return found


class WorkerPool:
    """Runs a function on many items in worker processes; nothing is started before the first `run`.

    One call of `run` at a time: others wait for it. The processes end with `close`, with the interpreter, and when
    the process that started them is killed.
    """

    def __init__(
        self, *, preload: Sequence[str] = (), memory_bytes: int | None = None, workers: int | None = None
    ) -> None:
        """Nothing is started.

        Args:
            preload: Modules that are imported once, before workers are forked; they must start no threads.
            memory_bytes: Most address space of a worker (RLIMIT_AS); None is no limit.
            workers: Most workers; None is one a processor of this process, at most 8, shared with the other ranks of
                the machine.
        """
        self._preload = list(preload)
        self._memory = memory_bytes
        self._most = default_workers() if workers is None else workers
        self._lock = threading.Lock()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._workers: list[_Worker] = []
        _POOLS.append(self)

    def run(self, function: bytes, items: Sequence[tuple[Any, ...]], *, timeout_s: float) -> list[Outcome]:
        """Call a function once an item, in any order.

        Args:
            function: Pickled by reference (`pickle_function`); its results must be JSON.
            items: The arguments of each call.
            timeout_s: Most seconds of a call; the import of the function's module is not counted.

        Raises:
            ValueError: If a worker cannot import the function.
            RuntimeError: If no worker can be started.
        """
        with self._lock:
            try:
                return _Run(self, function, items, timeout_s).outcomes()
            except BaseException:
                # an interrupted or failed run leaves workers in the middle of its items
                for worker in self._workers[:]:
                    self._kill(worker)
                raise

    def close(self) -> None:
        """End all processes; the next `run` would start them again."""
        with self._lock:
            self._stop()

    def pids(self) -> list[int]:
        """The process ids of the nursery and the workers that run."""
        return [] if self._nursery is None else [self._nursery.pid, *(worker.pid for worker in self._workers)]

    def _stop(self) -> None:
        nursery, control, workers = self._nursery, self._control, self._workers
        self._nursery, self._control, self._workers = None, None, []
        for worker in workers:
            worker.sock.close()
        if nursery is None or control is None:
            return
        with contextlib.suppress(OSError):
            control.send(COMMAND.pack(QUIT, 0))
        control.close()
        try:
            nursery.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            nursery.kill()
            nursery.wait()

    def _forget(self) -> None:
        """In a forked child: the processes are the parent's, and the lock may have been copied while held."""
        for worker in self._workers:
            worker.sock.close()
        if self._control is not None:
            self._control.close()
        if self._nursery is not None:
            # not this process's child: there is nothing to wait for
            self._nursery.returncode = 0
        self._nursery, self._control, self._workers = None, None, []
        self._lock = threading.Lock()

    def _start_nursery(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        path = Path(__file__).with_name("worker.py")
        self._nursery = subprocess.Popen(
            # -P: the folder of worker.py must not hide the standard library's modules
            [sys.executable, "-P", str(path), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # Ctrl-C is the trainer's to handle
            start_new_session=True,
        )
        theirs.close()
        ours.settimeout(START_TIMEOUT_S)
        self._control = ours
        # "" is the working directory to an interpreter, and may be another one to the nursery later
        path_entries = [entry or os.getcwd() for entry in sys.path]
        send(ours, pickle.dumps({"path": path_entries, "preload": self._preload, "memory": self._memory}))
        self._answer()
        return ours

    def _answer(self) -> int:
        """The process id in the nursery's answer."""
        assert self._control is not None
        try:
            data = self._control.recv(COMMAND.size)
        except OSError as error:
            self._stop()
            raise RuntimeError(f"the processes that score rewards did not start: {error}") from error
        if not data:
            self._stop()
            raise RuntimeError("the processes that score rewards ended at once; their output above says why")
        return int(COMMAND.unpack(data)[1])

    def _start_worker(self) -> _Worker:
        control = self._start_nursery()
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(control, [COMMAND.pack(FORK, 0)], [theirs.fileno()])
        except OSError:
            # the nursery was killed from outside; a new one is started once
            self._stop()
            socket.send_fds(self._start_nursery(), [COMMAND.pack(FORK, 0)], [theirs.fileno()])
        theirs.close()
        ours.settimeout(START_TIMEOUT_S)
        worker = _Worker(self._answer(), ours)
        self._workers.append(worker)
        return worker

    def _kill(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.sock.close()
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.send(COMMAND.pack(KILL, worker.pid))


class _Run:
    """One call of `WorkerPool.run`."""

    def __init__(self, pool: WorkerPool, function: bytes, items: Sequence[tuple[Any, ...]], timeout_s: float) -> None:
        self._pool, self._function, self._items, self._timeout_s = pool, function, items, timeout_s
        self._results: list[Outcome | None] = [None] * len(items)
        self._queue = deque(range(len(items)))
        self._chunk = max(1, min(CHUNK, math.ceil(len(items) / (2 * pool._most))))

    def outcomes(self) -> list[Outcome]:
        with selectors.DefaultSelector() as selector:
            while True:
                self._give_out(selector)
                busy = [worker for worker in self._pool._workers if worker.items]
                if not busy:
                    break
                nearest = min(worker.deadline for worker in busy)
                for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                    self._take(key.data, selector)
                for worker in [worker for worker in busy if worker.items and worker.deadline <= time.monotonic()]:
                    self._end(worker, Outcome(status="timeout"), selector)
        assert all(result is not None for result in self._results)
        return [result for result in self._results if result is not None]

    def _give_out(self, selector: selectors.BaseSelector) -> None:
        idle = [worker for worker in self._pool._workers if not worker.items]
        while self._queue:
            if idle:
                worker = idle.pop()
            elif len(self._pool._workers) < self._pool._most:
                worker = self._pool._start_worker()
            else:
                return
            indices = [self._queue.popleft() for _ in range(min(self._chunk, len(self._queue)))]
            message = pickle.dumps((self._function, self._timeout_s, [self._items[i] for i in indices]))
            try:
                send(worker.sock, message)
            except OSError:
                # it was killed from outside while it had nothing to do
                self._queue.extendleft(reversed(indices))
                self._pool._kill(worker)
                continue
            worker.items.extend(indices)
            worker.deadline = time.monotonic() + START_TIMEOUT_S
            selector.register(worker.sock, selectors.EVENT_READ, worker)

    def _take(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        messages = worker.messages()
        if messages is None:
            self._end(worker, Outcome(status="died"), selector)
            return
        for status, value in messages:
            if status == "unusable":
                raise ValueError(f"the function cannot be imported in a worker process: {value}")
            worker.deadline = time.monotonic() + self._timeout_s
            worker.last_status = status
            if status != "begun":
                self._results[worker.items.popleft()] = Outcome(status=status, value=value)
        if not worker.items:
            selector.unregister(worker.sock)

    def _end(self, worker: _Worker, outcome: Outcome, selector: selectors.BaseSelector) -> None:
        """A worker that is late or has ended: the first of its items is the one that it was at."""
        selector.unregister(worker.sock)
        # after "memory" the item has its outcome and the worker ends: the rest goes to others
        if not (outcome.status == "died" and worker.last_status == "memory"):
            self._results[worker.items.popleft()] = outcome
        self._queue.extendleft(reversed(worker.items))
        self._pool._kill(worker)


def default_workers() -> int:
    """One a processor that this process may use, shared with the other ranks of the machine; 1 to 8."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun's
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, processors // ranks))


def pickle_function(function: Callable[..., Any], *, name: str | None = None) -> bytes:
    """A function as a worker can import it; `name` is what errors call it.

    Raises:
        ValueError: If it is of the running script, a lambda or otherwise not importable.
    """
    name = name or callable_name(function)
    try:
        pickled = pickle.dumps(function)
    except Exception as error:
        raise ValueError(f"{name} cannot be run in a worker process, which must import it: {error}") from error
    if b"__main__" in pickled:
        raise ValueError(f"{name} is of the running script, which a worker process cannot import: move it to a module")
    return pickled


# module state: processes must be ended with the interpreter, and forgotten in a fork of it
_POOLS: list[WorkerPool] = []


def _close_all() -> None:
    for pool in _POOLS:
        pool.close()


def _forget_all() -> None:
    for pool in _POOLS:
        pool._forget()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
