"""Ctrl-C and SIGTERM: finish the optimizer step, leave a checkpoint, then stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class SaveOnInterrupt(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint at the end of the running step; the second stops at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the two signals inside the block, then end as they ask. Only the main thread can handle signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal = None
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        logger.warning(
            "%s: finishing this optimizer step, then saving a checkpoint; once more stops at once", self.signal.name
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True
        return control
