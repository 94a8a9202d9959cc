"""Profiling: whose blocks are timed, under which name, and who is told.

The loggers are recorders: none of them is installed where the tests run.
"""

import sys
from types import SimpleNamespace

import pytest

from grpo_fast.profiling import profiling_context, profiling_decorator

NAME = "profiling/Time taken: Trainer.block"


class Trainer:
    def __init__(self, report_to, is_main_process=True):
        self.args = SimpleNamespace(report_to=report_to)
        self.accelerator = SimpleNamespace(is_main_process=is_main_process)
        self.state = SimpleNamespace(global_step=3)

    @profiling_decorator
    def block(self, x, *, y):
        """A block."""
        return x + y


@pytest.fixture
def told(monkeypatch):
    """What each logger was told; all three have begun their runs."""
    told = []
    wandb = SimpleNamespace(run=object(), log=lambda metrics: told.append(("wandb", metrics, None)))
    mlflow = SimpleNamespace(
        active_run=object, log_metrics=lambda metrics, step: told.append(("mlflow", metrics, step))
    )
    run = SimpleNamespace(get=lambda: wandb.run)
    trackio = SimpleNamespace(
        context_vars=SimpleNamespace(current_run=run),
        log=lambda metrics, step: told.append(("trackio", metrics, step)),
    )
    for name, module in (("wandb", wandb), ("mlflow", mlflow), ("trackio", trackio)):
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_every_logger_of_the_run_is_told(told):
    with profiling_context(Trainer(["wandb", "mlflow", "trackio", "tensorboard"]), "block"):
        pass
    assert [(who, list(metrics), step) for who, metrics, step in told] == [
        ("wandb", [NAME], None),
        ("mlflow", [NAME], 3),
        ("trackio", [NAME], 3),
    ]
    assert all(0 <= metrics[NAME] < 1 for _, metrics, _ in told)


@pytest.mark.parametrize("trainer", [Trainer([]), Trainer(["tensorboard"]), Trainer(["wandb"], is_main_process=False)])
def test_nobody_else_is_told(told, trainer):
    assert trainer.block(1, y=2) == 3
    assert told == []


def test_a_logger_that_has_not_begun_is_left_alone(told):
    sys.modules["wandb"].run = None
    sys.modules["mlflow"].active_run = lambda: None
    assert Trainer(["wandb", "mlflow", "trackio"]).block(1, y=2) == 3
    assert told == []


def test_methods_keep_their_name_and_blocks_that_raise_are_timed(told):
    trainer = Trainer(["wandb"])
    assert (Trainer.block.__name__, Trainer.block.__doc__) == ("block", "A block.")
    with pytest.raises(TypeError):
        trainer.block(1, y="2")
    assert [list(metrics) for _, metrics, _ in told] == [[NAME]]
