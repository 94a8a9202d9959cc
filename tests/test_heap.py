"""Memory that the C library keeps is given back before a training step takes more than ever."""

import copy
import io
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from grpo_fast import heap
from grpo_fast.heap import kept_peak, resident_bytes, trim_heap
from tests.processes import ROOT

pytestmark = pytest.mark.skipif(heap._malloc_trim() is None, reason="the C library has no malloc_trim")

MIB = 2**20


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """Layers with a head."""

    def __init__(self, width=512, depth=66):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def kept(model):
    return kept_peak(model, model.layers, model.head)


def peak_of_training(is_kept):
    """MiB above the beginning that some steps need; to be run in a process of its own."""
    torch.manual_seed(0)
    model = Model()
    start = resident_bytes()
    with kept(model) if is_kept else nullcontext():
        for i in range(4):
            # packs of several lengths, smaller than a weight and its gradient
            x = torch.randn(200 + 20 * (i % 3), 512)
            model(x).square().mean().backward()
            model.zero_grad()
    # that of getrusage is at least what the process had that this one was forked from
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1024 - start / MIB


def peak_in_process(is_kept):
    code = f"from tests.test_heap import peak_of_training; print(peak_of_training({is_kept}))"
    # tensors come from the heap, as they do in a process that has freed larger ones
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 * MIB),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    return float(done.stdout)


def test_activations_and_gradients_do_not_lie_side_by_side():
    # measured: 167 and 85 MiB, of which the gradients alone are 68
    assert peak_in_process(True) < 0.7 * peak_in_process(False)


def step(model, width=64):
    model(torch.randn(4, width)).sum().backward()


@pytest.fixture
def looked(monkeypatch):
    """A hooked model of small tensors, and what each look expected."""
    looks = []
    monkeypatch.setattr(heap, "MIN_BYTES", 1)
    monkeypatch.setattr(heap, "MIN_TENSOR_BYTES", 1)
    check = heap.PeakKeeper.check
    monkeypatch.setattr(
        heap.PeakKeeper, "check", lambda self, expected=0: looks.append(expected) or check(self, expected)
    )
    return Model(width=64, depth=3), looks


def test_layers_head_and_gradients_are_looked_at(looked):
    model, looks = looked
    with kept(model) as keeper:
        step(model)
        # three layers, the head, whose gradient is expected, and four gradients
        assert looks == [0, 0, 0, model.head.weight.nbytes, 0, 0, 0, 0]
        # the first look does
        assert 1 <= keeper.num_trims <= len(looks)
        model.head.weight.requires_grad = False
        looks.clear()
        step(model)
        assert looks == [0] * 7


def test_passes_without_gradients_and_later_ones_are_not_looked_at(looked):
    model, looks = looked
    with kept(model):
        with torch.no_grad():
            model(torch.randn(4, 64))
        twin = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            twin(torch.randn(4, 64))
        torch.save(model, io.BytesIO())
    step(model)
    assert looks == []


def test_small_models_and_other_systems_have_no_hooks(monkeypatch):
    model = Model(width=64, depth=3)
    with kept(model) as keeper:
        assert keeper is None
    monkeypatch.setattr(heap, "MIN_BYTES", 1)
    for name, value in (("_malloc_trim", lambda: None), ("STATM", "/nowhere")):
        with monkeypatch.context() as patch:
            patch.setattr(heap, name, value)
            with kept(model) as keeper:
                assert keeper is None
                step(model)
            heap.trim_heap()


def test_it_is_trimmed_only_where_it_would_grow():
    keeper = heap.PeakKeeper(slack=64 * MIB)
    keeper.check()
    for _ in range(3):
        keeper.check()
        keeper.check(expected=8 * MIB)
    assert keeper.num_trims == 1
    keeper.check(expected=128 * MIB)
    assert keeper.num_trims == 2
    # as large as that once was
    keeper.check(expected=128 * MIB)
    assert keeper.num_trims == 2


def test_free_pages_go_back():
    trim_heap()
    before = resident_bytes()
    # small enough for the heap, with living objects between them
    pieces = [(torch.ones(24_000), torch.ones(16)) for _ in range(1000)]
    grown = resident_bytes() - before
    assert grown > 80 * MIB
    pieces = [alive for _, alive in pieces]
    trim_heap()
    assert resident_bytes() - before < grown / 2
    assert len(pieces) == 1000
