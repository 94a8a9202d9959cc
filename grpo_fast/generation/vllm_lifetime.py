"""A vLLM in this process, from its start to its end.

vLLM takes the process for its own: it keeps one set of communication groups for all engines in it, freezes the heap so
that a dropped trainer would never be collected, and stops by destroying torch's process group, whoever made it. Here
each engine ends when it is closed, collected, or the process exits, and takes along only what no other needs.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class _Groups:
    """The communication groups that vLLM keeps once a process, for all of its engines."""

    def __init__(self) -> None:
        self.num_users = 0
        self._is_parallel_ours = self._is_default_ours = False

    def acquire(self) -> None:
        """To be called before an engine starts."""
        from vllm.distributed.parallel_state import model_parallel_is_initialized

        if not self.num_users:
            self._is_parallel_ours = not model_parallel_is_initialized()
            self._is_default_ours = not torch.distributed.is_initialized()
        self.num_users += 1

    def release(self) -> None:
        """To be called once an engine has ended: the last one destroys what did not exist before the first."""
        from vllm import envs
        from vllm.distributed import parallel_state

        self.num_users -= 1
        if self.num_users:
            return
        if not torch.distributed.is_initialized():
            # whoever ended the process group ended all groups in it
            for name, value in list(vars(parallel_state).items()):
                if isinstance(value, parallel_state.GroupCoordinator):
                    setattr(parallel_state, name, None)
        elif self._is_parallel_ours:
            parallel_state.destroy_model_parallel()
        if self._is_default_ours and torch.distributed.is_initialized():
            parallel_state.destroy_distributed_environment()
        elif self._is_parallel_ours and parallel_state._WORLD is not None:
            # vLLM's own group of all ranks, which would outlive a process group that the trainer destroys
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = parallel_state._NODE_COUNT = None
        # vLLM stops reading the environment once an engine runs
        envs.disable_envs_cache()


# the groups are the process's, so is the count of those who use them
_groups = _Groups()


class RunningLLM:
    """A `vllm.LLM` that is stopped once, by `stop` or at the process's exit."""

    def __init__(self, start: Callable[[], Any], load_format: str) -> None:
        """Start an LLM, which `load_format` was registered for; if `start` raises, nothing of it stays."""
        self._load_format = load_format
        num_frozen, excepthook = gc.get_freeze_count(), sys.excepthook
        _groups.acquire()
        try:
            self.llm: Any = start()
        except BaseException as error:
            # the half-made engine, which the traceback holds
            traceback.clear_frames(error.__traceback__)
            self._forget()
            raise
        finally:
            # torch puts the rank before every line of a traceback, once for each group ever made
            sys.excepthook = excepthook
            _drop_import_errors()
            if not num_frozen:
                gc.unfreeze()
        # before vLLM's own handlers, which free what its workers still use
        atexit.register(self.stop)

    def stop(self) -> None:
        """Stop the engine and free its memory; a second call does nothing."""
        if self.llm is None:
            return
        llm, self.llm = self.llm, None
        atexit.unregister(self.stop)
        try:
            _stop_engine(llm)
        finally:
            self._forget()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _forget(self) -> None:
        """Drop what vLLM keeps for good: the loader, tokenizers by the folder they came from, and the groups."""
        from vllm.model_executor import model_loader
        from vllm.tokenizers import registry
        from vllm.transformers_utils import processor

        model_loader._LOAD_FORMAT_TO_MODEL_LOADER.pop(self._load_format, None)
        for module in (registry, processor):
            for name, function in vars(module).items():
                if name.startswith("cached_") and hasattr(function, "cache_clear"):
                    function.cache_clear()
        _groups.release()


def _stop_engine(llm: Any) -> None:
    """What vLLM's own shutdown does, but for the process group."""
    from vllm.v1.worker import workspace

    client = llm.llm_engine.engine_core
    finalizer = getattr(client, "_finalizer", None)
    if finalizer is not None:
        # vLLM 0.32's; it would shut down once more, with the process group
        finalizer.detach()
    core, manager = client.engine_core, workspace._manager
    if core.model_executor.is_sleeping and torch.cuda.is_available():
        # vLLM's allocator cannot free what is not mapped
        try:
            core.wake_up()
        except RuntimeError as error:
            logger.warning("a sleeping vLLM engine could not be woken to be stopped: %s", error)
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    if _groups.num_users > 1:
        # the process's, too
        workspace._manager = manager


def _drop_import_errors() -> None:
    """Free the frames of the first start, and with them the trainer: vLLM keeps errors of imports that failed in it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm."):
            for value in list(vars(module).values()):
                # not isinstance, which asks vLLM's stand-ins for missing modules and so imports them
                if issubclass(type(value), BaseException):
                    value.__traceback__ = None
