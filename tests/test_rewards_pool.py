"""Worker processes: what hangs, crashes or eats memory costs its own item only, and nothing outlives the trainer."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_fast.rewards import DROP, in_pool
from grpo_fast.rewards.calling import RewardCall, call
from grpo_fast.rewards.pool import WorkerPool, default_workers, pickle_function
from tests import pool_functions as functions

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(workers=2, memory_bytes=1 << 30)
    yield pool
    pool.close()


def run(pool, function, values, timeout_s=30.0):
    return pool.run(pickle_function(function), [(value,) for value in values], timeout_s=timeout_s)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_results_come_in_the_order_of_the_items(pool):
    outcomes = run(pool, functions.double, range(100))
    assert [outcome.value for outcome in outcomes] == list(range(0, 200, 2))
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert run(pool, functions.double, []) == []


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ("raise", "raised"),
        ("hang", "timeout"),
        ("compute", "timeout"),
        ("crash", "died"),
        ("exit", "died"),
        ("sys.exit", "raised"),
        ("kill", "died"),
        ("memory", "memory"),
    ],
)
def test_an_item_that_fails_costs_itself_only(pool, bad, status):
    values = [*range(5), bad, *range(5, 20), bad, 20]
    start = time.monotonic()
    outcomes = run(pool, functions.odd_ones_out, values, timeout_s=0.5)
    assert time.monotonic() - start < 15
    assert [outcome.status for outcome in outcomes] == [status if value == bad else "done" for value in values]
    assert [outcome.value for outcome in outcomes if outcome.status == "done"] == list(range(0, 42, 2))


def test_an_error_says_what_it_was(pool):
    assert run(pool, functions.odd_ones_out, ["raise"])[0].value == "KeyError: 'raise'"


def test_a_worker_is_a_fork_of_a_clean_process(pool):
    ((threads, parent, has_torch),) = (
        outcome.value for outcome in pool.run(pickle_function(functions.threads_and_parent), [()], timeout_s=10.0)
    )
    assert (threads, has_torch) == (1, False)
    assert parent == pool.pids()[0] != os.getpid()


def test_an_interrupted_run_leaves_a_pool_that_works(pool, tmp_path):
    path = tmp_path / "called"

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(pool, functions.once_only, [str(path)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert path.exists()
    assert run(pool, functions.once_only, [str(path)])[0].status == "done"


def test_processes_killed_from_outside_are_replaced(pool):
    run(pool, functions.double, range(100))
    nursery, *workers = pool.pids()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not any(map(is_alive, workers)))
    assert run(pool, functions.double, [1, 2, 3])[2].value == 6
    run(pool, functions.double, range(100))
    assert pool.pids()[0] == nursery
    workers = pool.pids()[1:]
    assert all(map(is_alive, workers))
    os.kill(nursery, signal.SIGKILL)
    assert wait_for(lambda: not is_alive(nursery))
    # its workers die with it
    assert wait_for(lambda: not any(map(is_alive, workers)))
    assert run(pool, functions.double, range(100))[99].value == 198


def test_close_ends_all_processes_and_the_next_run_starts_them_again():
    pool = WorkerPool(workers=1)
    assert pool.pids() == []
    run(pool, functions.double, [1])
    pids = pool.pids()
    pool.close()
    assert wait_for(lambda: not any(map(is_alive, pids)))
    assert run(pool, functions.double, [1])[0].value == 2
    pool.close()


TRAINER = """
import os, sys, time
from grpo_fast.rewards.pool import WorkerPool, pickle_function
from tests import pool_functions
pool = WorkerPool(workers=2)
pool.run(pickle_function(pool_functions.double), [(i,) for i in range(40)], timeout_s=30.0)
{begin}
print(*pool.pids(), flush=True)
{end}
"""


def start_trainer(*, begin="", end):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER.format(begin=begin, end=end)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def test_nothing_outlives_the_trainer():
    process, pids = start_trainer(end="pass")
    assert process.wait(60) == 0
    assert len(pids) == 3
    assert wait_for(lambda: not any(map(is_alive, pids)))


OWN = """
child = os.fork()
if not child:
    # as a data loader's process does
    mine = pool.pids() == [] and pool.run(pickle_function(pool_functions.double), [(1,)], timeout_s=30.0)[0].value == 2
    os._exit(0 if mine else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_fork_of_the_trainer_has_processes_of_its_own():
    process, pids = start_trainer(
        begin=OWN, end="pool.run(pickle_function(pool_functions.double), [(1,)], timeout_s=30.0)"
    )
    assert process.wait(60) == 0
    assert wait_for(lambda: not any(map(is_alive, pids)))


# what was not told of the fork holds a copy of the socket whose end would tell the nursery
HOLDING = """
copy = os.dup(pool._control.fileno())
if not os.fork():
    time.sleep(600)
"""


@pytest.mark.parametrize("begin", ["", HOLDING], ids=["alone", "a fork lives on"])
def test_nothing_outlives_a_killed_trainer(begin):
    process, pids = start_trainer(begin=begin, end="time.sleep(600)")
    assert all(map(is_alive, pids))
    process.kill()
    process.wait(10)
    try:
        assert wait_for(lambda: not any(map(is_alive, pids)))
    finally:
        # the fork, if there is one
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("function", [lambda value: value, is_alive.__class__(is_alive.__code__, {}, "gone")])
def test_what_cannot_be_imported_is_refused(function):
    with pytest.raises(ValueError, match="cannot be run in a worker process, which must import it"):
        pickle_function(function)


def test_a_function_of_the_running_script_is_refused():
    code = (
        "from grpo_fast.rewards import in_pool\n"
        "def own(completions, **columns): return [0.0]\n"
        "try: in_pool(own)\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "own is of the running script, which a worker process cannot import: move it to a module" in done.stdout


def test_workers_are_shared_with_the_ranks_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    counts = []
    for ranks in (1, 4, 64):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        counts.append(default_workers())
    assert counts == [8, 4, 1]


# -- in_pool -----------------------------------------------------------------------------------------------------------


def batch_of(*completions, errors="raise", **shared):
    return RewardCall(rows={"completions": list(completions)}, shared=shared, step=7, errors=errors)


def test_a_function_in_a_worker_is_as_it_was():
    metrics, extra = {}, {}
    pooled = in_pool(functions.by_length)
    assert pooled.__name__ == "by_length"
    batch = batch_of(
        "a", "", "ccc", log_metric=metrics.__setitem__, log_extra=extra.__setitem__, trainer_state=object()
    )
    assert call(pooled, "by_length", batch).nan_to_num(nan=-1.0).tolist() == [1.0, -1.0, 3.0]
    assert metrics == {"longest": 3.0}
    assert extra == {"first": ["a", "", "c"]}


def test_a_function_that_hangs_is_cut_off_and_named_with_its_row():
    pooled = in_pool(functions.hangs_on_b, timeout=0.5)
    message = "'hangs_on_b' raised TimeoutError at step 7 on row 1, completion 'b': it took more than 0.5 s"
    with pytest.raises(RuntimeError, match=message):
        call(pooled, "hangs_on_b", batch_of("a", "b", "c"))
    assert call(pooled, "hangs_on_b", batch_of("a", "c")).tolist() == [1.0, 1.0]


def test_an_error_in_a_worker_is_an_error_of_the_function():
    with pytest.raises(RuntimeError, match=r"'raises_on_b' raised RuntimeError at step 7 on row 0.*KeyError: 'b'"):
        call(in_pool(functions.raises_on_b), "raises_on_b", batch_of("b", "c"))


def test_in_pool_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="an_async_one is async"):
        in_pool(functions.an_async_one)
    with pytest.raises(ValueError, match="timeout must be above 0 seconds, it is 0"):
        in_pool(functions.by_length, timeout=0)


def test_drop_is_a_number_to_those_who_do_not_know_it():
    assert repr(DROP) == "DROP"
    assert DROP != DROP
