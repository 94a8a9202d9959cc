"""Gradient checkpointing layer by layer: which layers there are, what they hold, and which of them recompute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from grpo_fast.attention import causal_lm
from grpo_fast.memory_plan import ActivationCost, LayerCost, Size

# what transformers asks a layer before it recomputes it
FLAG = "gradient_checkpointing"
# what `grpo_kernels.linear_loss` takes at most, and the [N, D] tensors around it: states, their gradients, fp32 sums
HEAD_WORKSPACE = 640 * 2**20
HEAD_TENSORS = 3
# of a model's buffers, those its forward pass may write are small; larger ones are quantised weights
MAX_RESTORED_BYTES = 2**20


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The language model's layers that transformers can recompute, in order; empty if it knows none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in causal_lm(model).get_decoder().modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            layers.append(module)
            inner.update(module.modules())
    return layers


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Let the first `count` layers recompute and the others hold what they need.

    transformers' `gradient_checkpointing_enable` must have been called; how layers recompute stays as it says.
    """
    for i, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, FLAG):
                setattr(module, FLAG, i < count)


def check_count(model: nn.Module, count: int | None) -> None:
    """Refuse a `checkpointed_layers` that the model does not have (ValueError)."""
    if count is None:
        return
    num_layers = len(decoder_layers(model))
    if count > num_layers:
        raise ValueError(
            f"checkpointed_layers must be at most {num_layers}, the layers of {type(causal_lm(model)).__name__} that "
            f"transformers can recompute one by one; it is {count}"
        )


@dataclass
class _Saved:
    """Bytes of the storages that were first saved within each layer, or (None) outside of all.

    Attributes:
        ignored: Weights and buffers.
        held: What autograd saved.
        kept: What went into the layer.
        layer: The one that runs.
    """

    ignored: set[int]
    held: dict[nn.Module | None, int] = field(default_factory=dict)
    kept: dict[nn.Module | None, int] = field(default_factory=dict)
    layer: nn.Module | None = None
    _seen: dict[tuple[str, int], StorageWeakRef] = field(default_factory=dict)

    def count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = (kind, storage._cdata)
        if storage._cdata in self.ignored or key in self._seen:
            return
        # the memory may be freed while the probe runs, but as long as this lives no other storage has that name
        self._seen[key] = StorageWeakRef(storage)
        sizes = self.held if kind == "held" else self.kept
        sizes[self.layer] = sizes.get(self.layer, 0) + storage.nbytes()

    def pack(self, tensor: Tensor) -> Tensor:
        """For `saved_tensors_hooks`: an empty tensor is saved instead, since no backward pass follows."""
        self.count(tensor, "held")
        return torch.empty(0)

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.layer = layer
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.count(value, "kept")

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.layer = None


def measure(model: nn.Module, run: Callable[[int], Any], sizes: tuple[int, int]) -> ActivationCost:
    """What the model's layers hold for their backward pass, from two forward passes in training mode.

    Nothing is left of them: no memory, no gradients, and the random state, small buffers, modes and checkpointing of
    the model as they were. What a pass saves is dropped at once, so that they need no more memory than an evaluation.

    Args:
        model: A causal LM, alone or inside PEFT, not sharded.
        run: Runs the model forward, with gradients, on a pack of so many tokens, with next to none of them scored.
        sizes: The smaller number of tokens first.

    Returns:
        The cost. Layers that hold more than in proportion to the tokens are not foreseen.
    """
    layers = decoder_layers(model)
    small, large = (_saved(model, layers, run, tokens) for tokens in sizes)

    def size(kind: str, layer: nn.Module | None) -> Size:
        found = [getattr(saved, kind).get(layer, 0) for saved in (small, large)]
        return Size.through(sizes, (found[0], found[1]))

    costs = [
        LayerCost(held=size("held", layer), kept=size("kept", layer), weight=_largest_weight(layer)) for layer in layers
    ]
    return ActivationCost(layers=tuple(costs), rest=size("held", None), head=_head_size(model))


def _head_size(model: nn.Module) -> Size:
    weight = causal_lm(model).get_output_embeddings().weight
    dweight = weight.numel() * weight.element_size() if weight.requires_grad else 0
    return Size(fixed=HEAD_WORKSPACE + dweight, per_token=HEAD_TENSORS * 4 * weight.shape[1])


def _largest_weight(layer: nn.Module) -> int:
    return max((p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad), default=0)


def _saved(model: nn.Module, layers: list[nn.Module], run: Callable[[int], Any], tokens: int) -> _Saved:
    weights: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    saved = _Saved(ignored={weight.untyped_storage()._cdata for weight in weights})
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda empty: empty)
    with ExitStack() as stack:
        stack.enter_context(_untouched(model, layers))
        for layer in layers:
            for handle in (
                layer.register_forward_pre_hook(saved.enter, with_kwargs=True),
                layer.register_forward_hook(saved.leave),
            ):
                stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(hooks)
        run(tokens)
    return saved


@contextmanager
def _untouched(model: nn.Module, layers: list[nn.Module]) -> Iterator[None]:
    """Training mode inside, without checkpointing; what a forward pass may change is as it was after."""
    modes = [(module, module.training) for module in model.modules()]
    inner = [module for layer in layers for module in layer.modules()]
    flags = [(module, vars(module)[FLAG]) for module in inner if FLAG in vars(module)]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.untyped_storage().nbytes() <= MAX_RESTORED_BYTES
    ]
    device = next(model.parameters()).device
    is_cpu = device.type == "cpu"
    try:
        with torch.random.fork_rng([] if is_cpu else [device], device_type="cuda" if is_cpu else device.type):
            for module, _ in flags:
                setattr(module, FLAG, False)
            model.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, flag in flags:
            setattr(module, FLAG, flag)
        for module, name, buffer, version, value in buffers:
            module._buffers[name] = buffer
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)
