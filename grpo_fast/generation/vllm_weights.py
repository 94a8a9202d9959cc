"""The trainer's model as vLLM sees it: a config in a folder and a stream of named weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grpo_fast.adapters import has_adapters
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
        adapters: Whether what active LoRA adapters add to the weights is added, in copies; else the weights are the
            base's.

    Raises:
        ValueError: the adapters are not plain LoRA, or tell apart what vLLM ties.
    """
    for name, weight in _peft_weights(model, adapters) if has_adapters(model) else _model_weights(model):
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, weight


def _model_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, _plain(parameter)


def _peft_weights(model: Any, adapters: bool) -> Iterator[tuple[str, Tensor]]:
    _check_adapters(model)
    base = base_model(model)
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        wrapper, kind, rest = _inside_wrapper(base, name)
        if kind == ".base_layer.":
            weight = _plain(parameter)
            # layers with adapters on several of their parameters lie inside one another
            owner, leaf = name.partition(kind)[0], rest.rpartition("base_layer.")[-1]
            while adapters and isinstance(wrapper, nn.Module) and hasattr(wrapper, "base_layer"):
                weight = _with_adapters(wrapper, leaf, weight)
                wrapper = wrapper.base_layer
            yield f"{owner}.{leaf}", weight
        elif kind:
            copy_name, _, leaf = rest.partition(".") if kind == ".modules_to_save." else ("", "", rest)
            if copy_name == _copy_in_use(wrapper):
                yield f"{name.partition(kind)[0]}.{leaf}", _plain(parameter)
        else:
            yield name, _plain(parameter)


def _inside_wrapper(base: nn.Module, name: str) -> tuple[Any, str, str]:
    """PEFT's module around a parameter, how it names the parameter's own module, and the name within that."""
    for kind in (".base_layer.", ".modules_to_save.", ".original_module."):
        owner, found, rest = name.partition(kind)
        if found:
            return base.get_submodule(owner), kind, rest
    return None, "", name


def _copy_in_use(wrapper: Any) -> str:
    """Which adapter's copy of a module of `modules_to_save` runs; "" is the module itself."""
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    return active[0] if active and active[0] in wrapper.modules_to_save else ""


def lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers of a `PeftModel` that have LoRA adapters, by their checkpoint names."""
    from peft.tuners.lora import LoraLayer

    for name, module in base_model(model).named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def running_adapters(layer: Any) -> list[str]:
    """The adapters whose product a LoRA layer adds to its base's when it runs."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.r]


def merged_parameters(model: Any) -> set[nn.Parameter]:
    """Base parameters that `merge_adapter` has changed, which does not raise their version."""
    if not has_adapters(model):
        return set()
    merged = [layer.get_base_layer() for _, layer in lora_layers(model) if layer.merged]
    return {parameter for layer in merged for parameter in layer.parameters(recurse=False)}


def _check_adapters(model: Any) -> None:
    if any(config.peft_type != "LORA" or getattr(config, "use_dora", False) for config in model.peft_config.values()):
        raise ValueError("use_vllm=True takes a peft_config of type LoraConfig without use_dora")
    base = base_model(model)
    if any(".token_adapter." in name for name, _ in base.named_parameters()):
        raise ValueError("use_vllm=True takes a LoraConfig without trainable_token_indices")
    for name, layer in lora_layers(model):
        for adapter in layer.active_adapters:
            variant = layer.lora_variant.get(adapter)
            if variant is not None:
                raise ValueError(f"use_vllm=True takes plain LoRA; the one on {name} is a {type(variant).__name__}")
            bias = getattr(layer.get_base_layer(), "bias", None)
            if layer.lora_bias.get(adapter) and bias is None:
                raise ValueError(f"use_vllm=True takes lora_bias=True on layers with a bias only, {name} has none")
    if base.config.get_text_config().tie_word_embeddings:
        weights = [_running_weight(module) for module in (base.get_input_embeddings(), base.get_output_embeddings())]
        if weights[0] is None or weights[0] is not weights[1]:
            raise ValueError(
                "use_vllm=True runs a model with tied embeddings on one weight for both; its adapter changes one of "
                "the two: leave them out of target_modules and modules_to_save, or untie them"
            )


def _running_weight(module: Any) -> Tensor | None:
    """The parameter that a module multiplies by; None if LoRA adapters change it."""
    if hasattr(module, "base_layer"):
        return None
    weight: Tensor = module.weight
    return weight


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
    """The parameter `leaf` of a LoRA layer plus what its adapters add to it; the parameter itself if nothing does."""
    for adapter in running_adapters(layer):
        if leaf == getattr(layer, "parameter_name", "weight"):
            weight = weight + _plain(layer.get_delta_weight(adapter)).to(weight.dtype)
        elif leaf == "bias" and layer.lora_bias.get(adapter):
            weight = weight + (layer.lora_B[adapter].bias * layer.scaling[adapter]).to(weight.dtype)
    return weight


def architecture(model: Any) -> str | None:
    """The name of the transformers class that a model is or derives from."""
    base = base_model(model)
    own = [cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("transformers.models.")]
    return own[0] if own else next(iter(base.config.architectures or []), None)


def write_config(model: nn.Module, folder: str) -> None:
    """The config vLLM builds its model from: transformers' own class name, no trace of how the trainer loaded it."""
    base = base_model(model)
    config = copy.deepcopy(base.config)
    name = architecture(model)
    config.architectures = None if name is None else [name]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
