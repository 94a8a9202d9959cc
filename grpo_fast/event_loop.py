"""One event loop on a daemon thread, for the async tools, environments and reward functions of the process.

A thread of its own, because a notebook's main thread already runs a loop.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

# how long the end of the process waits for tasks to be cancelled
STOP_TIMEOUT_S = 5.0


class EventLoopThread:
    """An asyncio loop on a daemon thread, started by its first coroutine and again after a fork or a stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run `coroutine` on the loop and wait for its result.

        Raises:
            RuntimeError: If called from a coroutine that this loop is running: it would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run_coroutine was called on the event loop's own thread; await the coroutine instead")
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            # Ctrl-C ends the wait, not the coroutine; after a result this does nothing
            future.cancel()

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start `coroutine` on the loop; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop())

    def stop(self) -> None:
        """Cancel what still runs and end the thread; a second call does nothing."""
        with self._lock:
            thread, loop = self._thread, self._loop
            self._thread = self._loop = None
        if thread is not None and loop is not None and thread.is_alive():
            loop.call_soon_threadsafe(loop.stop)
            thread.join(STOP_TIMEOUT_S)

    def forget(self) -> None:
        """Drop a thread that exists in the parent process only, and its lock in whatever state it was copied."""
        self.__init__()  # type: ignore[misc]

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or self._thread is None or not self._thread.is_alive():
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name="grpo-fast-async", daemon=True)
                self._thread.start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()


# module state: a thread a process, not one a trainer
_PROCESS_LOOP = EventLoopThread()
atexit.register(_PROCESS_LOOP.stop)
os.register_at_fork(after_in_child=_PROCESS_LOOP.forget)


def run_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run `coroutine` on the process's daemon event loop, which its first call starts, and return its result.

    Raises:
        RuntimeError: If called from a coroutine that this loop is running.
    """
    return _PROCESS_LOOP.run(coroutine)


def start_coroutine(coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Start `coroutine` on the same loop without waiting for it; cancelling the future cancels it."""
    return _PROCESS_LOOP.start(coroutine)
