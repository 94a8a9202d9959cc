"""vLLM's model, filled from the trainer's: a loader that vLLM knows by name, and layers that keep weights as loaded.

A parameter of vLLM's model that no weight reaches is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.generation.vllm_weights import named_weights
from grpo_fast.generation.weight_map import WeightMap, record_load


@torch.no_grad()
def load_every_parameter(target: Any, model: nn.Module, *, adapters: bool = True) -> WeightMap:
    """Load `model` into vLLM's `target`, check that no element of a parameter was left out, and say what went where.

    vLLM's own list of loaded names counts a fused weight as loaded when one of its parts is, so the check is of the
    values: all are NaN before.

    Args:
        target: vLLM's model.
        model: The policy.
        adapters: Whether LoRA adapters are added into the weights; see `named_weights`.

    Raises:
        ValueError: naming the parameters that were not filled.
    """
    parameters = {name: p for name, p in target.named_parameters() if p.is_floating_point()}
    for parameter in parameters.values():
        parameter.fill_(math.nan)
    weight_map = record_load(target, named_weights(model, adapters=adapters))
    missing = [name for name, parameter in parameters.items() if parameter.isnan().any()]
    if missing:
        raise ValueError(
            f"use_vllm=True: the weights of {type(model).__name__} leave parameters of vLLM's "
            f"{type(target).__name__} unset (or are NaN themselves): {', '.join(missing)}"
        )
    return weight_map


def register_loader(
    source: Callable[[], nn.Module | None], *, on_cpu: bool, adapters: bool, loaded: Callable[[WeightMap], None]
) -> str:
    """Register a vLLM model loader that reads the weights of `source()`, and return its load format.

    Args:
        source: Gives the policy.
        on_cpu: Whether layers get methods that leave the weights as loaded.
        adapters: See `load_every_parameter`.
        loaded: Called with what went where.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class TrainerLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            trained = source()
            assert trained is not None
            if on_cpu:
                keep_weights_as_loaded(model)
            loaded(load_every_parameter(model, trained, adapters=adapters))

    load_format = f"grpo_fast_{id(source):x}"
    register_model_loader(load_format)(TrainerLoader)
    return load_format


def keep_weights_as_loaded(target: nn.Module) -> None:
    """On a CPU vLLM's own methods pack the weights after loading and drop the originals, so no update could reach them.

    Here the layers multiply by the weights as they are.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    class PlainLinear(UnquantizedLinearMethod):
        process_weights_after_loading = _leave
        apply = _linear

    class PlainEmbedding(UnquantizedEmbeddingMethod):
        process_weights_after_loading = _leave
        apply = _linear

    class PlainExperts(UnquantizedFusedMoEMethod):
        process_weights_after_loading = _leave
        apply = _experts

    plain = {
        UnquantizedLinearMethod: PlainLinear,
        UnquantizedEmbeddingMethod: PlainEmbedding,
        UnquantizedFusedMoEMethod: PlainExperts,
    }
    for module in target.modules():
        method = getattr(module, "quant_method", None)
        kind = plain.get(type(method))
        if kind is None or (kind is PlainExperts and not _is_plain_mixture(module)):
            continue
        # the method keeps what its layer has configured it with
        method.__class__ = kind


def _leave(self: Any, layer: nn.Module) -> None:
    pass


def _linear(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(x, layer.weight, bias)


def _activation(layer: Any) -> Callable[[Tensor], Tensor] | None:
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }
    return kinds.get(str(layer.activation.value).lower())


def _is_plain_mixture(layer: Any) -> bool:
    """Whether `_experts` computes this layer; others keep vLLM's own method."""
    return _activation(layer) is not None and not layer.apply_router_weight_on_input and not hasattr(layer, "w13_bias")


def _experts(
    self: Any, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **more: Any
) -> Tensor:
    """The mixture of the chosen experts' outputs for tokens [T, D]; layers run shared experts themselves."""
    activation = _activation(layer)
    assert activation is not None
    mixed = torch.zeros_like(x, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = nn.functional.linear(x[token], layer.w13_weight[expert]).chunk(2, dim=-1)
        out = nn.functional.linear(activation(gate) * up, layer.w2_weight[expert])
        mixed.index_add_(0, token, out.float() * topk_weights[token, choice, None])
    return mixed.to(x.dtype)
