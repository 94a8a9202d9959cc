"""The model as `generate` needs it: unwrapped, its shards gathered, in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from grpo_fast.generation.base import base_model
from grpo_fast.modes import evaluating


@contextmanager
def unwrap_model_for_generation(
    model: Any,
    accelerator: Any,
    gather_deepspeed3_params: bool = True,
    generation_kwargs: dict[str, Any] | None = None,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> Iterator[Any]:
    """Yield the model inside `model` for a call of `generate`, with TRL's signature.

    It is in evaluation mode, so that dropout and gradient checkpointing are off whatever their settings; each module
    gets its own mode back, also when the block raises, which TRL's does not do.

    Args:
        model: What accelerate made of the policy: DDP, FSDP, a DeepSpeed engine, or the model itself.
        accelerator: The trainer's accelerator.
        gather_deepspeed3_params: Gather all of a ZeRO-3 model's parameters at once, which is faster than layer by
            layer and needs room for the whole model.
        generation_kwargs: Laid over the model's own generation config inside the block.
        gradient_checkpointing_kwargs: TRL switches checkpointing on again with these. Here its settings are left as
            they are, so nothing needs them.
    """
    state = accelerator.state
    unwrapped = accelerator.unwrap_model(model)
    with ExitStack() as stack:
        deepspeed = getattr(state, "deepspeed_plugin", None)
        if deepspeed is not None and deepspeed.zero_stage == 3 and gather_deepspeed3_params:
            stack.enter_context(_gathered_by_deepspeed(model))
        if getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", None) == 1:
            from torch.distributed.fsdp import FullyShardedDataParallel

            # the root's own parameters; the units inside gather theirs when they are called
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False))
        stack.enter_context(evaluating(unwrapped))
        if generation_kwargs:
            config = copy.deepcopy(unwrapped.generation_config)
            config.update(**generation_kwargs)
            stack.enter_context(generation_config_of(unwrapped, config))
        yield unwrapped


@contextmanager
def generation_config_of(model: Any, config: Any) -> Iterator[None]:
    """Let `config` be the model's generation config inside the block."""
    # PEFT hands its own attribute down to the model it wraps
    base = base_model(model)
    owners = [model] if base is model else [model, base]
    before = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = config
    try:
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.generation_config = own


@contextmanager
def _gathered_by_deepspeed(engine: Any) -> Iterator[None]:
    """All parameters of a ZeRO-3 engine, without the hooks that would gather and release them layer by layer."""
    import deepspeed

    # an engine gets its optimizer, and with it the hooks, when training starts
    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)
    with deepspeed.zero.GatheredParameters(list(engine.parameters())), ExitStack() as stack:
        if offload is not None:
            stack.enter_context(_without_hooks(offload))
        yield


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    for parameter in [*offload.module.parameters(), *(p for _, p in offload.module.ds_external_parameters())]:
        parameter.ds_active_sub_modules.clear()
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks = []
    offload.backward_hooks = []
    try:
        yield
    finally:
        # the order in which modules ran while generating is not the order of a training step
        coordinator = getattr(offload, "param_coordinator", None)
        if coordinator is not None and not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        offload._register_deepspeed_module(offload.module)
