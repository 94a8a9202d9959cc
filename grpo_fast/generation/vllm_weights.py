"""The trainer's model as vLLM sees it: a config in a folder and a stream of named weights.

A parameter of vLLM's model that no weight reaches is an error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a transformers model under their checkpoint names, active LoRA adapters added in copies.

    bitsandbytes' 4-bit weights are given as the trainer multiplies by them, not packed.

    Raises:
        ValueError: the adapters are not plain LoRA.
    """
    if not hasattr(model, "peft_config"):
        for name, parameter in model.named_parameters():
            yield name, _plain(parameter)
        return
    from peft.tuners.lora import LoraLayer

    base = base_model(model)
    if any(config.peft_type != "LORA" or getattr(config, "use_dora", False) for config in model.peft_config.values()):
        raise ValueError("use_vllm=True takes a peft_config of type LoraConfig without use_dora")
    for name, parameter in base.named_parameters():
        owner, _, rest = name.rpartition(".base_layer.")
        layer = base.get_submodule(owner)
        if isinstance(layer, LoraLayer):
            yield f"{owner}.{rest}", _with_adapters(layer, rest, _plain(parameter))
        elif ".modules_to_save." in name:
            owner, _, rest = name.partition(".modules_to_save.")
            adapter, _, leaf = rest.partition(".")
            if adapter in base.get_submodule(owner).active_adapters:
                yield f"{owner}.{leaf}", _plain(parameter)
        elif ".original_module." not in name and ".lora_" not in name:
            yield name, _plain(parameter)


def _plain(parameter: Tensor) -> Tensor:
    """The parameter's values as one dense tensor."""
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
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


@torch.no_grad()
def load_every_parameter(target: Any, model: nn.Module) -> None:
    """Load `model` into vLLM's `target` and check that no element of a parameter was left out.

    vLLM's own list of loaded names counts a fused weight as loaded when one of its parts is, so the check is of the
    values: all are NaN before.

    Raises:
        ValueError: naming the parameters that were not filled.
    """
    parameters = {name: p for name, p in target.named_parameters() if p.is_floating_point()}
    for parameter in parameters.values():
        parameter.fill_(math.nan)
    target.load_weights(named_weights(model))
    missing = [name for name, parameter in parameters.items() if parameter.isnan().any()]
    if missing:
        raise ValueError(
            f"use_vllm=True: the weights of {type(model).__name__} leave parameters of vLLM's "
            f"{type(target).__name__} unset (or are NaN themselves): {', '.join(missing)}"
        )


def write_config(model: nn.Module, folder: str) -> None:
    """The config vLLM builds its model from: transformers' own class name, no trace of how the trainer loaded it."""
    base = base_model(model)
    config = copy.deepcopy(base.config)
    own = [cls.__name__ for cls in type(base).__mro__ if cls.__module__.startswith("transformers.models.")]
    config.architectures = own[:1] or config.architectures
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


def register_loader(source: Callable[[], nn.Module | None], *, on_cpu: bool) -> str:
    """Register a vLLM model loader that reads the weights of `source()`, and return its load format."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    # On a CPU vLLM's own methods pack the weights after loading and drop the originals, so no update could reach them.
    class PlainLinear(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            pass

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return nn.functional.linear(x, layer.weight, bias)

    class PlainEmbedding(UnquantizedEmbeddingMethod):
        def process_weights_after_loading(self, layer: nn.Module) -> None:
            pass

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return nn.functional.linear(x, layer.weight, bias)

    plain = {UnquantizedLinearMethod: PlainLinear, UnquantizedEmbeddingMethod: PlainEmbedding}

    class TrainerLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            trained = source()
            assert trained is not None
            if on_cpu:
                for module in model.modules():
                    method = plain.get(type(getattr(module, "quant_method", None)))
                    if method is not None:
                        module.quant_method = method()
            load_every_parameter(model, trained)

    load_format = f"grpo_fast_{id(source):x}"
    register_model_loader(load_format)(TrainerLoader)
    return load_format
