import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from grpo_fast.event_loop import EventLoopThread, run_coroutine

# far above what anything here takes, far below a hang
PATIENCE_S = 20


async def where():
    await asyncio.sleep(0)
    return threading.current_thread()


def test_coroutines_share_one_daemon_thread():
    thread = run_coroutine(where())
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert run_coroutine(where()) is thread


def test_works_where_a_loop_is_running_already():
    # as a notebook's cell does
    async def cell():
        return run_coroutine(where())

    assert asyncio.run(cell()) is run_coroutine(where())


def test_exceptions_come_back():
    async def fail():
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        run_coroutine(fail())


def test_waiting_for_itself_is_refused():
    async def nested():
        return run_coroutine(where())

    with pytest.raises(RuntimeError, match="own thread"):
        run_coroutine(nested())


def test_starts_again_after_a_stop():
    loop = EventLoopThread()
    first = loop.run(where())
    loop.stop()
    loop.stop()
    assert not first.is_alive()
    second = loop.run(where())
    assert second is not first
    loop.stop()


def test_a_stop_cancels_what_still_runs():
    loop, ended = EventLoopThread(), threading.Event()

    async def forever():
        try:
            await asyncio.sleep(PATIENCE_S * 10)
        finally:
            ended.set()

    tasks = []

    async def start():
        tasks.append(asyncio.ensure_future(forever()))
        await asyncio.sleep(0)

    loop.run(start())
    loop.stop()
    assert ended.wait(PATIENCE_S)


def test_ctrl_c_ends_the_coroutine():
    ended = threading.Event()

    async def forever():
        # the main thread must have begun to wait
        await asyncio.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(PATIENCE_S * 10)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_coroutine(forever())
    assert ended.wait(PATIENCE_S)


FORKING = """
import asyncio, os
from grpo_fast import event_loop
event_loop.run_coroutine(asyncio.sleep(0))
# as if another thread of the parent were starting the loop right now
with event_loop._PROCESS_LOOP._lock:
    if os.fork() == 0:
        os._exit(event_loop.run_coroutine(asyncio.sleep(0, result=7)))
_, status = os.wait()
assert os.waitstatus_to_exitcode(status) == 7, status
"""
ENDING = """
import asyncio
from grpo_fast.event_loop import run_coroutine
async def serve():
    try:
        await asyncio.sleep(1000)
    finally:
        print("closed")
async def start():
    global task
    task = asyncio.ensure_future(serve())
    await asyncio.sleep(0)
run_coroutine(start())
"""


# in processes of their own: torch and tokenizers dislike forks of this one
@pytest.mark.parametrize(("script", "output"), [(FORKING, ""), (ENDING, "closed\n")], ids=["fork", "end"])
def test_survives_a_fork_and_ends_with_the_process(script, output):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, output, "")
