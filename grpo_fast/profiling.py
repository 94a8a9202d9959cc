"""Wall time of named blocks, sent to the loggers that TRL sends it to, in TRL's names."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from transformers import Trainer

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def profiling_context(trainer: Trainer, name: str) -> Iterator[None]:
    """Send the seconds of the block as `profiling/Time taken: {trainer's class}.{name}`.

    They go to Weights & Biases, MLflow and trackio where the run reports to them and has begun there, from the main
    process; to nobody otherwise.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        report_seconds(trainer, name, time.perf_counter() - start)


def report_seconds(trainer: Trainer, name: str, seconds: float) -> None:
    """Send seconds that were measured elsewhere as `profiling_context` does."""
    if trainer.accelerator.is_main_process:
        _send(
            {f"profiling/Time taken: {type(trainer).__name__}.{name}": seconds},
            report_to=trainer.args.report_to or [],
            step=trainer.state.global_step,
        )


def profiling_decorator(func: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """A trainer's method under `profiling_context`, by its own name; what is no trainer's runs as it is."""

    @functools.wraps(func)
    def timed(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        is_trainer = all(hasattr(self, name) for name in ("args", "accelerator", "state"))
        with profiling_context(cast(Trainer, self), func.__name__) if is_trainer else nullcontext():
            return func(self, *args, **kwargs)

    return timed


def _send(metrics: dict[str, float], *, report_to: list[str], step: int) -> None:
    # a backend that the run reports to is installed: transformers checks
    if "wandb" in report_to and (wandb := _backend("wandb")).run is not None:
        wandb.log(metrics)
    if "mlflow" in report_to and (mlflow := _backend("mlflow")).active_run() is not None:
        mlflow.log_metrics(metrics, step=step)
    if "trackio" in report_to and (trackio := _backend("trackio")).context_vars.current_run.get() is not None:
        trackio.log(metrics, step=step)


def _backend(name: str) -> Any:
    return importlib.import_module(name)
