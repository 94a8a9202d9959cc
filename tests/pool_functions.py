"""What the tests run in worker processes, which import it."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path


def double(value):
    return 2 * value


def threads_and_parent():
    return [len(os.listdir("/proc/self/task")), os.getppid(), "torch" in sys.modules]


def odd_ones_out(value):
    """Whole numbers are doubled; words make the worker fail in each way there is."""
    if value == "raise":
        raise KeyError(value)
    if value == "hang":
        time.sleep(600)
    if value == "compute":
        # a C function that no signal handler of Python interrupts
        return len(str(7 ** (10**9)))
    if value == "crash":
        ctypes.string_at(0)
    if value == "exit":
        os._exit(0)
    if value == "sys.exit":
        sys.exit(0)
    if value == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if value == "memory":
        return len(bytearray(8 << 30))
    return double(value)


def once_only(path):
    """Hangs the first time it is called with a path."""
    if not Path(path).exists():
        Path(path).touch()
        time.sleep(600)
    return os.getpid()


def by_length(completions, log_metric, log_extra, **columns):
    log_metric("longest", max(len(text) for text in completions))
    log_extra("first", [text[:1] for text in completions])
    return [float(len(text)) if text else None for text in completions]


def hangs_on_b(completions, **columns):
    if "b" in completions:
        time.sleep(600)
    return [1.0] * len(completions)


def raises_on_b(completions, **columns):
    if "b" in completions:
        raise KeyError("b")
    return [1.0] * len(completions)


async def an_async_one(completions, **columns):
    return [1.0] * len(completions)
