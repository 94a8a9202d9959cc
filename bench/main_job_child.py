"""One trainer on the main job, in a process of its own: times its phases and writes a `Run` as JSON.

Phases are timed alike for every trainer, by wrapping methods that TRL and grpo_fast both have. A wrapped call inside
another is charged to the inner phase only, so the phases of a step add up to the step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.main_job_table import PHASES, Run, Step

# the job of both trainers; field names are TRL's, and what is not named here is each trainer's default
JOB: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 12,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant",
    "temperature": 1.0,
    "beta": 0.0,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "bf16": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

# Not the loss or the scoring methods, and of ours not what hands a rollout on: replacing those changes the path that a
# trainer takes. A rollout is what the first of `ROLLOUTS` that a trainer has returns.
PHASE_OF_METHOD = {
    "training_step": "train",
    "_timed_rollout": "generation",
    "_generate_and_score_completions": "generation",
    "_calculate_rewards": "rewards",
    "sync_engine": "weight sync",
}
ROLLOUTS = ("_timed_rollout", "_generate_and_score_completions")
# TRL's transformers path has no engine to update
OPTIONAL_METHODS = {"sync_engine", *ROLLOUTS}


def _now() -> tuple[float, float]:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


class Probe:
    """Charges the seconds between two events to the innermost phase; `end_step` closes a step's account.

    A step lasts from the end of the one before it, so that data loading and logging belong to it (as "other").
    """

    def __init__(self, phases: Sequence[str] = PHASES) -> None:
        self.steps: list[dict[str, Any]] = []
        self._phases = phases
        self._stack = ["other"]
        self._open()

    def _open(self) -> None:
        self._cpu_s = dict.fromkeys(self._phases, 0.0)
        self._wall_s = dict.fromkeys(self._phases, 0.0)
        self._tokens = 0
        self._prompts = hashlib.sha256()
        self._mark = _now()

    def _charge(self) -> None:
        cpu, wall = _now()
        self._cpu_s[self._stack[-1]] += cpu - self._mark[0]
        self._wall_s[self._stack[-1]] += wall - self._mark[1]
        self._mark = cpu, wall

    def timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """`method`, charged to `phase` while it runs."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return method(*args, **kwargs)
            finally:
                self.leave()

        return call

    def enter(self, phase: str) -> None:
        """Charge to `phase` from here on."""
        self._charge()
        self._stack.append(phase)

    def leave(self) -> None:
        """Charge to the phase before the last `enter` again."""
        self._charge()
        self._stack.pop()

    def observed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """A rollout, with its prompts and completion tokens noted."""

        def call(rows: list[dict[str, Any]]) -> Any:
            self._prompts.update(json.dumps([row["prompt"] for row in rows]).encode())
            batch = generate(rows)
            self._tokens += int(batch["completion_mask"].sum())
            return batch

        return call

    def watch(self, trainer: Any) -> None:
        """Wrap the bound methods of `trainer` and start the first step's account."""
        rollout = next(name for name in ROLLOUTS if hasattr(trainer, name))
        setattr(trainer, rollout, self.observed(getattr(trainer, rollout)))
        for name, phase in PHASE_OF_METHOD.items():
            is_there = name == rollout if name in ROLLOUTS else hasattr(trainer, name)
            if is_there or name not in OPTIONAL_METHODS:
                setattr(trainer, name, self.timed(getattr(trainer, name), phase))

    def begin(self) -> None:
        """Start the first step's account."""
        self._open()

    def end_step(self) -> None:
        """Close the step's account and open the next."""
        self._charge()
        step = {"cpu_s": self._cpu_s, "wall_s": self._wall_s, "tokens": self._tokens}
        self.steps.append({**step, "prompts": self._prompts.hexdigest()[:16]})
        self._open()


def measure(label: str, *, model: str, steps: int, seed: int, gradient_checkpointing: bool) -> Run:
    """Train for `steps` steps with the trainer that `label` names.

    Args:
        label: "trl", "grpo-fast-vllm" or "grpo-fast-transformers".
        model: Folder of the model and its tokenizer.
        steps: Optimizer steps.
        seed: Seed of the prompt order and of the sampling.
        gradient_checkpointing: Recompute activations in the backward pass; the default of both trainers, but not the
            job's, since 1,500 tokens need no saving.

    Returns:
        The steps and the process's peak memory.
    """
    started = time.perf_counter()
    library = import_module("trl" if label == "trl" else "grpo_fast")

    import psutil  # type: ignore[import-untyped]
    import torch
    from transformers import TrainerCallback

    from grpo_fast.recipes.arithmetic import last_integer_reward, load_arithmetic

    probe = Probe()

    class StepEnds(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            probe.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            probe.end_step()

    on_cuda = torch.cuda.is_available()
    with TemporaryDirectory() as folder:
        config = library.GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            seed=seed,
            use_cpu=not on_cuda,
            gradient_checkpointing=gradient_checkpointing,
            use_vllm=label == "grpo-fast-vllm",
            # as the demo has them: the longest prompt has 41 tokens
            vllm_enable_sleep_mode=label == "grpo-fast-vllm",
            vllm_max_model_length=96 if label == "grpo-fast-vllm" else None,
            **JOB,
        )
        trainer = library.GRPOTrainer(
            model=model,
            reward_funcs=last_integer_reward,
            args=config,
            train_dataset=load_arithmetic()[0],
            callbacks=[StepEnds()],
        )
        probe.watch(trainer)
        startup_s = time.perf_counter() - started
        loaded_rss_mib = _peak_rss_mib()
        trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    return Run(
        label=label,
        steps=[
            Step(**step, reward=row["reward"], zero_std=row["frac_reward_zero_std"])
            for step, row in zip(probe.steps, logs, strict=True)
        ],
        peak_rss_mib=_peak_rss_mib(),
        loaded_rss_mib=loaded_rss_mib,
        peak_cuda_mib=torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None,
        device=torch.cuda.get_device_name() if on_cuda else "cpu",
        startup_s=startup_s,
        threads=torch.get_num_threads(),
        children=len(psutil.Process().children(recursive=True)),
    )


def _peak_rss_mib() -> float:
    # KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label")
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args())
    out = options.pop("out")
    out.write_text(json.dumps(asdict(measure(**options))))


if __name__ == "__main__":
    main()
