"""`grpo-fast demo`: held-out accuracy of a small language model before and after GRPO, with everything measured."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_fast.config import GRPOConfig
from grpo_fast.memory import peak_rss_mib
from grpo_fast.recipes import arithmetic, smollm2, tiny
from grpo_fast.recipes.evaluate import AccuracyFunc, Evaluation, evaluate
from grpo_fast.recipes.report import Summary, describe, write_report
from grpo_fast.trainer import GRPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model, a task, and the settings under which the one learns the other.

    Attributes:
        load_model: Gives the folder of the default model.
        load_task: Gives the (train, held-out) data sets.
        reward_funcs: What GRPO maximises.
        accuracy_func: The reward function that held-out accuracy is measured with.
        engine: What generates unless the user says otherwise, "vllm" or "transformers".
        num_samples: Samples a held-out problem.
        config: Fields of `GRPOConfig`.
    """

    load_model: Callable[[], Path]
    load_task: Callable[[], tuple[datasets.Dataset, datasets.Dataset]]
    reward_funcs: list[AccuracyFunc]
    accuracy_func: AccuracyFunc
    engine: str
    num_samples: int
    config: dict[str, Any]


PRESETS = {
    "smollm2": Preset(
        load_model=smollm2.load_smollm2,
        load_task=arithmetic.load_arithmetic,
        reward_funcs=[arithmetic.last_integer_reward],
        accuracy_func=arithmetic.last_integer_reward,
        engine="vllm",
        num_samples=4,
        config={
            "per_device_train_batch_size": 32,
            "num_generations": 8,
            "max_completion_length": 12,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "constant",
            "temperature": 1.0,
            "beta": 0.0,
            "loss_type": "dapo",
            "scale_rewards": "group",
            "max_steps": 25,
            "bf16": True,
            # the longest prompt has 41 tokens; vLLM sizes its cache by this
            "vllm_max_model_length": 96,
            # nothing generates while the policy trains
            "vllm_enable_sleep_mode": True,
        },
    ),
    "smoke": Preset(
        load_model=lambda: tiny.CHECKPOINT,
        load_task=tiny.load_tiny_task,
        reward_funcs=[tiny.accuracy_reward, tiny.format_reward],
        accuracy_func=tiny.accuracy_reward,
        engine="transformers",
        num_samples=1,
        config={
            "per_device_train_batch_size": 128,
            "num_generations": 8,
            "max_completion_length": 28,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 3,
            "adam_beta2": 0.95,
            "max_steps": 30,
            "bf16": False,
            "gradient_checkpointing": False,
        },
    ),
}


def run_demo(
    *,
    preset: str = "smollm2",
    model: str | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    output_dir: str | Path = "runs/demo",
    engine: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> Summary:
    """Evaluate, train, evaluate again, save; print the tables and write them into `output_dir`.

    Without vLLM the `vllm` engine falls back to transformers' generate, which is logged and stands in the summary.

    Args:
        preset: "smollm2", or "smoke" for the one-minute run of a 0.8 M model.
        model: A folder or hub id that takes the place of the preset's model.
        seed: Seeds training and the samples of the evaluations.
        max_steps: Optimizer steps; None means the preset's.
        output_dir: Gets `summary.json`, `report.md`, `curves.png` and the trained model in `model/`.
        engine: "vllm" or "transformers"; None means the preset's.
        overrides: Fields of `GRPOConfig` that win over all of the above.

    Returns:
        The figures of the run.

    Raises:
        ValueError: For an unknown preset or engine, a package that is not installed, or a setting `GRPOConfig` refuses.
    """
    _quiet()
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; it is {preset!r}")
    chosen = PRESETS[preset]
    folder = Path(output_dir)
    args = _make_config(chosen, seed=seed, max_steps=max_steps, folder=folder, engine=engine, overrides=overrides)
    train_dataset, heldout = chosen.load_task()
    path = model or str(chosen.load_model())
    print(f"{Path(path).name}: {len(train_dataset)} problems to train on, {len(heldout)} held out, seed {args.seed}")
    trainer = GRPOTrainer(path, list(chosen.reward_funcs), args, train_dataset, callbacks=[_StepPrinter()])
    trainer.remove_callback(PrinterCallback)
    before = _measure(trainer, chosen, heldout)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = _measure(trainer, chosen, heldout)
    trainer.save_model(str(folder / "model"))
    summary = Summary.of_run(
        preset=preset,
        model=Path(path).name,
        engine=trainer.engine.name,
        seed=args.seed,
        before=before,
        after=after,
        history=trainer.state.log_history,
        steps=trainer.state.global_step,
        train_seconds=wall,
        cpu_seconds=cpu,
        peak_rss_mb=peak_rss_mib(trainer.timer.meter) * 2**20 / 1e6,
    )
    write_report(folder, summary, before=before, after=after, heldout=heldout)
    print(f"\n{describe(summary)}\nwritten to {folder}: summary.json, report.md, curves.png, model/")
    return summary


def _measure(trainer: GRPOTrainer, preset: Preset, heldout: datasets.Dataset) -> Evaluation:
    trainer.sync_engine()
    result = evaluate(
        trainer.engine,
        trainer.processing_class,
        heldout,
        preset.accuracy_func,
        max_tokens=trainer.max_completion_length,
        num_samples=preset.num_samples,
        seed=trainer.args.seed,
    )
    print(f"held out: greedy {result.greedy.share:.0%}, sampled pass@1 {result.sampled.share:.0%}", flush=True)
    return result


def _make_config(
    preset: Preset,
    *,
    seed: int,
    max_steps: int | None,
    folder: Path,
    engine: str | None,
    overrides: dict[str, Any] | None,
) -> GRPOConfig:
    engine = engine or preset.engine
    if engine not in ("vllm", "transformers"):
        raise ValueError(f"engine must be vllm or transformers, it is {engine!r}")
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        logger.warning("vLLM is not installed: transformers' generate takes its place")
        engine = "transformers"
    is_vllm = engine == "vllm"
    settings: dict[str, Any] = {
        **{name: value for name, value in preset.config.items() if is_vllm or not name.startswith("vllm_")},
        "output_dir": str(folder),
        "seed": seed,
        "use_vllm": is_vllm,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if max_steps is not None:
        settings["max_steps"] = max_steps
    return GRPOConfig(**settings | (overrides or {}))


class _StepPrinter(TrainerCallback):
    """One line a step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "reward" in logs:
            # None where no group had a signal, and nothing was run
            entropy = "    -" if logs["entropy"] is None else f"{logs['entropy']:5.2f}"
            print(
                f"step {state.global_step:3d}/{state.max_steps}   reward {logs['reward']:5.2f}   "
                f"length {logs['completions/mean_length']:5.1f}   entropy {entropy}   "
                f"{logs['step_time']:6.2f} s",
                flush=True,
            )


def _quiet() -> None:
    """No progress bars between the demo's own lines."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
