"""What the system and the control groups around this process leave."""

import ctypes
import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_fast import free_memory
from grpo_fast.free_memory import free_bytes

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A made-up system: MiB available, lines of /proc/self/cgroup, and files of control groups."""

    def make(available, groups="", files=None):
        (tmp_path / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {available * 1024} kB\n")
        (tmp_path / "own").write_text(groups)
        for name, text in (files or {}).items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(free_memory, "OWN_CGROUPS", tmp_path / "own")
        monkeypatch.setattr(free_memory, "CGROUPS", tmp_path / "groups")
        monkeypatch.setattr(free_memory, "STATUS", tmp_path / "no status")
        return free_bytes(CPU)

    return make


def group_2(folder, limit, used, file_pages=0):
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": used,
        f"{folder}memory.stat": f"anon 5\ninactive_file {file_pages}",
    }


def test_without_groups_what_the_system_has(system):
    assert system(100) == 100 * MIB


def test_version_2(system):
    assert system(100, "0::/job", group_2("job/", 50 * MIB, 20 * MIB)) == 30 * MIB
    # pages of files go when memory is short
    assert system(100, "0::/job", group_2("job/", 50 * MIB, 20 * MIB, 7 * MIB)) == 37 * MIB
    assert system(10, "0::/job", group_2("job/", 50 * MIB, 20 * MIB)) == 10 * MIB
    assert system(100, "0::/job", group_2("job/", "max", 20 * MIB)) == 100 * MIB
    assert system(100, "0::/job", group_2("job/", 20 * MIB, 50 * MIB)) == 0


def test_the_tightest_group_around_counts(system):
    files = group_2("a/b/", 90 * MIB, 1 * MIB) | group_2("a/", 40 * MIB, 1 * MIB) | group_2("c/", 2 * MIB, MIB)
    assert system(100, "0::/a/b", files) == 39 * MIB


def test_a_container_sees_its_own_group_as_the_root(system):
    assert system(100, "0::/outside/path", group_2("", 50 * MIB, 20 * MIB)) == 30 * MIB


def test_version_1(system):
    files = {
        "memory/job/memory.limit_in_bytes": 60 * MIB,
        "memory/job/memory.usage_in_bytes": 20 * MIB,
        "memory/job/memory.stat": f"cache 3\ninactive_file 1\ntotal_inactive_file {5 * MIB}",
        "memory/memory.limit_in_bytes": 2**63 - 4096,
        "memory/memory.usage_in_bytes": 30 * MIB,
        "memory/memory.stat": "total_inactive_file 0",
        # of another controller
        "job/memory.max": 1,
    }
    assert system(100, "7:cpu,cpuacct:/job\n4:memory:/job\n", files) == 45 * MIB


def test_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "nothing")
    assert free_bytes(CPU) is None


@linux
def test_real_pages_are_missed():
    """Others on the machine take and free memory meanwhile: once in some tries that is less than half of this."""
    size = 256 * MIB

    def difference():
        before = free_bytes(CPU)
        pages = mmap.mmap(-1, size)
        for place in range(0, size, mmap.PAGESIZE):
            pages[place] = 1
        after = free_bytes(CPU)
        pages.close()
        return before - after

    assert any(abs(difference() - size) < size / 2 for _ in range(10))


@linux
@pytest.mark.skipif(free_memory._mallinfo() is None, reason="not the C library that keeps count")
def test_memory_that_the_c_library_keeps_counts_as_free(tmp_path):
    """In a process of its own: what Python has beside the C library's memory cannot be told from what that keeps."""
    root = Path(__file__).parents[1]
    (tmp_path / "meminfo").write_text("MemAvailable: 0 kB\n")
    code = f"from tests.test_free_memory import free_blocks; free_blocks({str(tmp_path / 'meminfo')!r})"
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def free_blocks(meminfo):
    """In blocks too small for pages of their own, held down by one that lives."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.free.argtypes = (ctypes.c_void_p,)
    gc.collect()
    libc.malloc_trim(0)
    size, before = 1024 * MIB, free_memory._kept_by_c_library()
    blocks = [libc.malloc(2**16) for _ in range(size // 2**16)]
    for block in blocks:
        libc.memset(block, 1, 2**16)
    # what others allocate meanwhile may lie in between
    assert free_memory._kept_by_c_library() - before < size / 4
    last = blocks.pop()
    for block in blocks:
        libc.free(block)
    assert free_memory._kept_by_c_library() - before > size * 3 / 4
    free_memory.MEMINFO = Path(meminfo)
    assert free_bytes(CPU) - before > size * 3 / 4
    libc.malloc_trim(0)
    assert free_memory._kept_by_c_library() - before < size / 2
    libc.free(last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_the_allocator_keeps_is_free():
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = free_bytes(device)
    held = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) == pytest.approx(256 * MIB, abs=32 * MIB)
    del held
    assert free_bytes(device) == pytest.approx(before, abs=32 * MIB)
