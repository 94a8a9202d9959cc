"""Optimizer steps on one sequence length, in a process of its own: what memory they took, or that it was not enough."""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.longest import Point
from bench.models import CONFIGS, make_model
from bench.profile_rows import EOS, FIRST_WORD, Row
from bench.profiles_child import make_trainer

# tokens of the prompt; all others are the completion's
PROMPT = 16
# a group of one has no advantage; each row is a micro-batch of its own
GENERATIONS = 2
# on CUDA; the optimizer's state, which is nothing for the model that a CPU runs, is there from the second on
STEPS = 2


def make_rows(length: int, *, vocabulary: int) -> list[list[Row]]:
    """One group of rows that have `length` tokens each, prompt included.

    Raises:
        ValueError: If there is no room for a completion.
    """
    if length < PROMPT + 2:
        raise ValueError(f"length must be at least {PROMPT + 2}, got {length}")
    draw = random.Random(0)
    words = range(FIRST_WORD, vocabulary)
    prompt = draw.choices(words, k=PROMPT)
    completions = [[*draw.choices(words, k=length - PROMPT - 1), EOS] for _ in range(GENERATIONS)]
    return [[Row(prompt=prompt, completion=row, reward=float(i)) for i, row in enumerate(completions)]]


def leave_free(budget_mib: float) -> tuple[Any, float]:
    """Occupy all of the GPU but a budget, which then includes what CUDA itself takes.

    A limit of torch's allocator would not do: who plans with the memory that the driver calls free would not see it.

    Returns:
        What must be kept, and the budget, which is no more than the device has.
    """
    import torch

    _, total = torch.cuda.mem_get_info()
    budget = min(total, int(budget_mib * 2**20))
    return torch.empty(total - budget, dtype=torch.uint8, device="cuda"), budget / 2**20


def measure(label: str, *, model: str, length: int, budget_mib: float, settings: dict[str, Any]) -> Point:
    """Whether steps on sequences of one length fit.

    Args:
        label: "trl" or "grpo-fast".
        model: A key of `models.CONFIGS`; its weights are bf16.
        length: Tokens of a sequence.
        budget_mib: CUDA: of the whole device. CPU: what the steps may add to the process's resident size.
        settings: More fields of the configuration.
    """
    import torch

    from bench.measuring import Memory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.type == "cuda"
    steps = STEPS if on_cuda else 1
    ballast, budget_mib = leave_free(budget_mib) if on_cuda else (torch.empty(0), budget_mib)
    with TemporaryDirectory() as folder:
        policy = make_model(model, dtype=torch.bfloat16, device=device)
        rows = make_rows(length, vocabulary=policy.config.vocab_size)
        fields = {"bf16": True, "gradient_checkpointing": True, "max_steps": steps} | settings
        trainer = make_trainer(label, policy, rows, folder=folder, seed=0, micro_batch=1, **fields)
        memory = Memory(device)
        started = time.perf_counter()
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return Point(length=length, fits=False, budget_mib=budget_mib)
        seconds = (time.perf_counter() - started) / steps
    # on CUDA the weights count, too
    peak_mib = (torch.cuda.max_memory_allocated() - ballast.numel()) / 2**20 if on_cuda else memory.extra_mib()
    # on a GPU nothing but running out says that it was too much
    fits = on_cuda or peak_mib <= budget_mib
    return Point(length=length, fits=fits, budget_mib=budget_mib, peak_mib=peak_mib, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=("trl", "grpo-fast"))
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--budget-mib", type=float, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="more fields of the configuration, as JSON")
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args())
    out = options.pop("out")
    out.write_text(json.dumps(asdict(measure(**options))))


if __name__ == "__main__":
    main()
