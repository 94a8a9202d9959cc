"""The trainer's model as vLLM sees it: a config in a folder and a stream of named weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo_fast.generation.base import base_model


def refuse_8bit(model: nn.Module) -> None:
    """Refuse bitsandbytes' 8-bit weights, as TRL does.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "Int8Params":
            raise ValueError(
                f"use_vllm=True does not take 8-bit weights ({name}): load the model with load_in_4bit=True or without "
                "quantization_config"
            )


# of modules that FSDP, activation checkpointing and `torch.compile` put around others
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def is_part(parameter: Tensor) -> bool:
    """Whether FSDP2 or DeepSpeed's ZeRO-3 has sharded the parameter."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the parameters only."""
    return any(is_part(parameter) for parameter in model.parameters())


def named_weights(model: Any, *, adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a transformers model under their checkpoint names.

    bitsandbytes' 4-bit weights are given as the trainer multiplies by them, not packed. Sharded ones are gathered, one
    at a time, as copies: all processes take all weights, in the same order.

    Args:
        model: The unwrapped policy.
        adapters: Whether active LoRA adapters are added to the weights, in copies; else the weights are the base's.

    Raises:
        ValueError: the adapters are not plain LoRA.
    """
    for name, weight in _model_weights(model) if not hasattr(model, "peft_config") else _peft_weights(model, adapters):
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, weight


def _model_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, _plain(parameter)


def _peft_weights(model: Any, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    from peft.tuners.lora import LoraLayer

    base = base_model(model)
    if any(config.peft_type != "LORA" or getattr(config, "use_dora", False) for config in model.peft_config.values()):
        raise ValueError("use_vllm=True takes a peft_config of type LoraConfig without use_dora")
    for name, parameter in base.named_parameters():
        owner, _, rest = name.rpartition(".base_layer.")
        layer = base.get_submodule(owner)
        if isinstance(layer, LoraLayer):
            weight = _plain(parameter)
            yield f"{owner}.{rest}", _with_adapters(layer, rest, weight) if adapters else weight
        elif ".modules_to_save." in name:
            owner, _, rest = name.partition(".modules_to_save.")
            adapter, _, leaf = rest.partition(".")
            if adapter in base.get_submodule(owner).active_adapters:
                yield f"{owner}.{leaf}", _plain(parameter)
        elif ".original_module." not in name and ".lora_" not in name:
            yield name, _plain(parameter)


def _plain(parameter: Tensor) -> Tensor:
    """The parameter's values as one dense tensor."""
    if isinstance(parameter, DTensor):
        # offloaded ones are gathered on the devices
        return parameter.detach().to(parameter.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if type(parameter).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

        weight: Tensor = dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]
        return weight
    return parameter.detach()


@torch.no_grad()
def _with_adapters(layer: Any, leaf: str, weight: Tensor) -> Tensor:
    """The base weight plus what the active adapters add to it; the base itself if nothing does."""
    if leaf != "weight" or layer.disable_adapters:
        return weight
    held = set(layer.r) - set(layer.merged_adapters)
    for adapter in (name for name in layer.active_adapters if name in held):
        weight = weight + _plain(layer.get_delta_weight(adapter)).to(weight.dtype)
    return weight


def write_config(model: nn.Module, folder: str) -> None:
    """The config vLLM builds its model from: transformers' own class name, no trace of how the trainer loaded it."""
    base = base_model(model)
    config = copy.deepcopy(base.config)
    own = [cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("transformers.models.")]
    config.architectures = own[:1] or config.architectures
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
