"""vLLM in one of several processes: the trainer's process group, and engines that span some of the processes.

Each process of a tensor parallel engine (`vllm_tensor_parallel_size`) runs the requests of all of them, and keeps its
own. Every one has a scheduler of its own; they stay in step because they are given the same requests in the same order
with the same seeds, so nothing here may depend on one process alone.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed import ProcessGroup

from grpo_fast.batch import Completions, Sampling

# vLLM adds the place in the group to a request's seed, an int64
SEEDS = 2**62


def rank_variables() -> dict[str, str]:
    """What vLLM reads of a launcher's environment, where the launcher has not set it."""
    if not torch.distributed.is_initialized():
        return {}
    rank = torch.distributed.get_rank()
    local_rank = torch.cuda.current_device() if torch.cuda.is_available() else rank
    wanted = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def leave_process_group(llm: Any) -> None:
    """Keep vLLM from ending the process group, which is the trainer's, when the engine is collected."""
    finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()


def shut_down(llm: Any, *, owns_process_group: bool) -> None:
    """Stop an engine; the process group ends with it only if vLLM made it."""
    from vllm.distributed import parallel_state

    client = llm.llm_engine.engine_core
    if owns_process_group:
        client.shutdown()
    else:
        # what `EngineCore.shutdown` does before it ends the process group
        core = client.engine_core
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        gc.unfreeze()
    parallel_state.destroy_model_parallel()
    if owns_process_group:
        parallel_state.destroy_distributed_environment()
    elif parallel_state._WORLD is not None:
        # vLLM's groups of all processes, which another process group could not use
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def tensor_parallel_group() -> ProcessGroup:
    """The processes of this process's engine, as a group that gathers objects."""
    from vllm.distributed.parallel_state import get_tp_group

    group: ProcessGroup = get_tp_group().cpu_group
    return group


def check_tensor_parallel(size: int) -> None:
    """Check that the processes can be divided into groups of `size`.

    Raises:
        ValueError: they cannot.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    num_processes = torch.distributed.get_world_size() if is_distributed else 1
    if num_processes % size:
        raise ValueError(
            f"vllm_tensor_parallel_size must divide the number of processes ({num_processes}, started by torchrun or "
            f"accelerate launch); it is {size}"
        )


@dataclass(frozen=True, kw_only=True)
class GroupBatch:
    """What every process of a group generates.

    Attributes:
        prompt_ids: Of all processes, in their order.
        images: Each prompt's images, or None if no prompt has any.
        sampling: With a seed.
        own: This process's rows.
    """

    prompt_ids: list[list[int]]
    images: list[list[Any] | None] | None
    sampling: Sampling
    own: slice

    def own_of(self, drawn: Completions) -> Completions:
        """This process's completions."""
        return Completions(ids=drawn.ids[self.own], logps=None if drawn.logps is None else drawn.logps[self.own])


def gather_batch(
    group: ProcessGroup,
    prompt_ids: list[list[int]],
    sampling: Sampling,
    images: list[list[Any] | None] | None,
) -> GroupBatch:
    """The batch of all processes of `group`, each of which must call this; a process may have no prompts.

    Without a seed of its own, sampling gets one from the first process's random state.

    Raises:
        ValueError: on all processes, if their sampling differs.
    """
    extra = dict(sampling.extra or {})
    sampling = replace(sampling, seed=extra.pop("seed", sampling.seed), extra=None)
    drawn_seed = int(torch.randint(SEEDS, ()))
    parts = _gathered(group, (prompt_ids, images or [None] * len(prompt_ids), sampling, drawn_seed))
    for _, _, other, _ in parts:
        if other != parts[0][2]:
            raise ValueError(
                "processes that share a vLLM engine (vllm_tensor_parallel_size) must sample alike; they have "
                f"{parts[0][2]} and {other}"
            )
    start = sum(len(prompts) for prompts, *_ in parts[: group.rank()])
    all_images = [row for _, rows, *_ in parts for row in rows]
    return GroupBatch(
        prompt_ids=[prompt for prompts, *_ in parts for prompt in prompts],
        images=all_images if any(all_images) else None,
        sampling=replace(sampling, seed=parts[0][3] if sampling.seed is None else sampling.seed, extra=extra or None),
        own=slice(start, start + len(prompt_ids)),
    )


def any_in(group: ProcessGroup, flag: bool) -> bool:
    """Whether `flag` is set on a process of `group`, each of which must call this."""
    return any(_gathered(group, flag))


def _gathered(group: ProcessGroup, value: Any) -> list[Any]:
    values: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values
