"""The policy's LoRA adapter in vLLM's own LoRA slots, so that the base weights stay shared and only A and B are copied.

vLLM is given an adapter once, from memory; where each A and B lies inside its stacked tensors is learned by watching it
copy them there. After that an update writes the slots directly, and every request runs with them.

What vLLM cannot run as an adapter is added into copies of the weights it covers (`named_weights`): `why_merged`.

Letters: R is the rank of the slots, r <= R an adapter's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.adapters import REFERENCE
from grpo_fast.generation.base import base_model
from grpo_fast.generation.shared_weights import different_bits, stale_weights
from grpo_fast.generation.vllm_weights import architecture, lora_layers, running_adapters
from grpo_fast.generation.weight_map import Piece, Recorder, storage_of

# under which vLLM knows the adapter
NAME, NUMBER = "policy", 1


def why_merged(model: Any, settings: dict[str, Any], *, on_cpu: bool) -> str | None:
    """Why vLLM cannot run the adapters of a `PeftModel` beside its base weights, or None if it can.

    Args:
        model: The policy.
        settings: The arguments of `vllm.LLM`, the user's own among them.
        on_cpu: Whether the engine runs on a CPU.
    """
    if not settings.get("enable_lora", True):
        return "vllm_engine_kwargs={'enable_lora': False}"
    if settings["dtype"] in (torch.float32, "float32", "float") and not on_cpu:
        return "vLLM's LoRA kernels take float16 and bfloat16, the engine is float32"
    if settings.get("tensor_parallel_size", 1) > 1:
        return "adapters in an engine over several processes (vllm_tensor_parallel_size) are not written in place"
    engine_class = _engine_class(model, settings)
    from vllm.model_executor.models import supports_lora

    if engine_class is not None and not supports_lora(engine_class):
        return f"vLLM's {engine_class.__name__} does not support LoRA"
    for name, layer in lora_layers(model):
        reason = _why_layer_merged(layer)
        if reason is not None:
            return f"{name}: {reason}"
    outside = _outside_decoder(model)
    if outside:
        return f"vLLM adapts the language model only, not {outside[0]}"
    if _slot_rank(model) is None:
        return f"rank {_largest_rank(model)} is more than vLLM takes"
    return None


def lora_arguments(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `vllm.LLM` with which it makes room for the adapters of `model`, on the layers they cover."""
    mapper = _mapper(_engine_class(model, settings))
    names = {name if mapper is None else mapper._map_name(name) or name for name, _ in lora_layers(model)}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": _slot_rank(model),
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in names}),
    }


def _engine_class(model: Any, settings: dict[str, Any]) -> Any:
    """The class that vLLM runs the model as; None where it runs transformers' own, which supports LoRA."""
    from vllm.model_executor.models import ModelRegistry

    registered = ModelRegistry.models.get(architecture(model) or "")
    if registered is None or settings.get("model_impl") == "transformers":
        return None
    return registered.load_model_cls()


def _mapper(engine_class: Any) -> Any:
    """How vLLM renames the modules of transformers' model, or None if it does not."""
    mapper: Any = getattr(engine_class, "hf_to_vllm_mapper", None)
    # vLLM 0.32 keeps fusing and renaming in one mapper, 0.26 has renaming only
    return mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper


def _why_layer_merged(layer: Any) -> str | None:
    if hasattr(layer, "parameter_name"):
        return f"an adapter on a parameter (target_parameters), {layer.parameter_name}"
    if not all(name in layer.lora_A and isinstance(layer.lora_A[name], nn.Linear) for name in layer.r):
        return f"an adapter on a {type(layer.get_base_layer()).__name__}"
    if any(layer.lora_bias.values()):
        return "lora_bias=True"
    return None


def _outside_decoder(model: Any) -> list[str]:
    base = base_model(model)
    if base.config.get_text_config() is base.config:
        return []
    inside = set(base.get_decoder().modules())
    return [name for name, layer in lora_layers(model) if layer not in inside]


def _largest_rank(model: Any) -> int:
    """Of a layer's adapters, together where several are active."""
    largest = 0
    for _, layer in lora_layers(model):
        together = sum(layer.r.get(name, 0) for name in layer.active_adapters)
        largest = max(largest, together, *(rank for name, rank in layer.r.items() if name != REFERENCE))
    return largest


def _slot_rank(model: Any) -> int | None:
    """The least rank of slots that vLLM offers and that all adapters fit in."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    return min((rank for rank in get_args(MaxLoRARanks) if rank >= _largest_rank(model)), default=None)


@dataclass(kw_only=True, eq=False)
class Slot:
    """Where one layer's adapter lies in vLLM.

    Attributes:
        lora_a: Views [R, in_features]; each holds all of A.
        lora_b: Views [rows, R], and which row of B each begins with.
        ranks: Of the adapters in it, one after the other along R; the rest is zero.
    """

    lora_a: list[Tensor]
    lora_b: list[tuple[int, Tensor]]
    ranks: list[int]


class EngineAdapter:
    """The policy's active adapters in vLLM's model.

    Attributes:
        request: What vLLM's requests name to run with it; `use_for_requests` makes them all do.
        copied_bytes: Of the last update.
    """

    def __init__(self, target: Any, model: Any) -> None:
        """Put the adapters of `model` into `target`, vLLM's model, started with `lora_arguments`.

        Raises:
            ValueError: vLLM has no place for an adapter; names its layer.
        """
        from vllm.lora.request import LoRARequest

        self._target = target
        self._manager: Any = target.lora_manager
        self._slots: dict[str, Slot] = {}
        # the path is never read: an adapter that vLLM holds already is not loaded
        self.request: Any = LoRARequest(lora_name=NAME, lora_int_id=NUMBER, lora_path="in memory")
        self.copied_bytes = 0
        self.update(model)

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """Write the active adapters of `model`, each B times its scaling, into the engine.

        Adapters that are disabled, or merged into the base weights, are left out, as when the model runs.

        Raises:
            ValueError: An active adapter has no place in the engine; names its layer and what to do.
        """
        if not self._is_held():
            self._slots = self._take_slots(model)
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for name, layer in lora_layers(model):
            slot = self._fitting_slot(name, layer)
            ranks = [layer.r[adapter] for adapter in running_adapters(layer)]
            if slot is None:
                continue
            if ranks != slot.ranks:
                _clear(slot)
                slot.ranks = ranks
            for _, source, target in _tensors(name, layer, slot):
                sources.append(source)
                targets.append(target)
        if targets:
            torch._foreach_copy_(targets, sources)
        self.copied_bytes = sum(target.nbytes for target in targets)

    @torch.no_grad()
    def check(self, model: Any) -> None:
        """Compare the adapters of `model`, bit by bit, with the live tensors that vLLM multiplies by.

        Raises:
            RuntimeError: naming the tensors that differ.
        """
        if not self._is_held():
            raise stale_weights([NAME], "vLLM has dropped the adapter")
        live = {storage_of(tensor) for tensor in _stacked(self._manager)}
        names: list[str] = []
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, layer in lora_layers(model):
            slot = self._fitting_slot(name, layer)
            if slot is None:
                continue
            if any(storage_of(view) not in live for view in [*slot.lora_a, *(view for _, view in slot.lora_b)]):
                raise stale_weights([name], "vLLM has replaced its adapter's tensors")
            pairs = [*_tensors(name, layer, slot), *_rest(name, layer, slot)]
            for tensor_name, source, target in pairs:
                names.append(tensor_name)
                ours.append(source.to(target.dtype).flatten())
                theirs.append(target.flatten())
        wrong = different_bits(ours, theirs)
        if wrong:
            raise stale_weights(sorted({names[i] for i in wrong}), "its values are not the policy's")

    def use_for_requests(self, llm_engine: Any) -> None:
        """Let every request of `llm_engine`, a `vllm.v1.engine.llm_engine.LLMEngine`, run with the adapter."""
        own = self.request

        class WithAdapter(type(llm_engine)):  # type: ignore[misc]
            def add_request(
                self, request_id: Any, prompt: Any, params: Any, *args: Any, lora_request: Any = None, **kwargs: Any
            ) -> Any:
                if lora_request not in (None, own):
                    raise ValueError(
                        f"lora_request must be left out: the engine runs the trainer's adapter, got {lora_request!r}"
                    )
                return super().add_request(request_id, prompt, params, *args, lora_request=own, **kwargs)

        # the object keeps what vLLM has set it up with
        llm_engine.__class__ = WithAdapter

    def _is_held(self) -> bool:
        """Whether vLLM has the adapter: it drops all when it reloads its weights."""
        return NUMBER in self._manager.lora_index_to_id

    def _take_slots(self, model: Any) -> dict[str, Slot]:
        """Give vLLM an adapter of zeros, and see where it puts it."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        settings = self._manager.lora_config
        rank = settings.max_lora_rank
        recorder = Recorder(_stacked(self._manager))
        given: list[tuple[str, Tensor]] = []
        for name, layer in lora_layers(model):
            sizes = _features(layer)
            shapes = {"A": (rank, sizes[0]), "B": (sizes[1], rank)}
            for letter, shape in shapes.items():
                zeros = torch.zeros(shape, dtype=settings.lora_dtype, device=self._manager.device)
                given.append((f"base_model.model.{name}.lora_{letter}.weight", zeros))
        zero_adapter = LoRAModel.from_lora_tensors(
            NUMBER,
            dict(recorder.watched(given)),
            # scaling 1: B comes multiplied by its own
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device=str(self._manager.device),
            dtype=settings.lora_dtype,
            weights_mapper=_mapper(type(self._target)),
        )
        self._manager.add_adapter(zero_adapter)
        with recorder:
            self._manager.activate_adapter(NUMBER)
        self._manager.pin_adapter(NUMBER)
        # the slots are written directly from here on
        zero_adapter.loras.clear()
        pieces = recorder.map.pieces
        slots: dict[str, Slot] = {}
        for name, layer in lora_layers(model):
            of_a, of_b = (pieces[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
            slot = _slot(of_a, of_b, rows=_features(layer)[1])
            if slot is not None:
                slots[name] = slot
        return slots

    def _fitting_slot(self, name: str, layer: Any) -> Slot | None:
        """The layer's slot; None if it has none and needs none."""
        slot = self._slots.get(name)
        active = running_adapters(layer)
        rank = sum(layer.r[adapter] for adapter in active)
        if slot is None and not active:
            return None
        way_out = "; vllm_engine_kwargs={'enable_lora': False} adds adapters into copies of the weights instead"
        if slot is None:
            raise ValueError(f"vLLM has no place for the adapter of {name}{way_out}")
        if rank > slot.lora_a[0].shape[0]:
            raise ValueError(
                f"vLLM was started for adapters of rank {slot.lora_a[0].shape[0]}; active on {name} are "
                f"{', '.join(active)} of rank {rank}{way_out}"
            )
        return slot


def _stacked(manager: Any) -> Iterator[Tensor]:
    """All tensors that vLLM keeps adapters in."""
    for module in manager.modules.values():
        yield from module.lora_a_stacked
        yield from module.lora_b_stacked


def _features(layer: Any) -> tuple[int, int]:
    """A layer's inputs and outputs, as its adapters have them."""
    adapter = next(iter(layer.r))
    return layer.lora_A[adapter].weight.shape[1], layer.lora_B[adapter].weight.shape[0]


def _slot(pieces_a: list[Piece], pieces_b: list[Piece], *, rows: int) -> Slot | None:
    """The slot that vLLM copied an A [R, in_features] and a B [rows, R] to; None if they are not there as they were."""
    if not pieces_a or sum(piece.size[0] for piece in pieces_b) != rows:
        return None
    rank = pieces_a[0].size[0]
    is_plain = all(piece.size == pieces_a[0].size and piece.offset == 0 for piece in pieces_a)
    is_plain &= all(piece.size[1] == rank and piece.offset % rank == 0 for piece in pieces_b)
    if not is_plain:
        return None
    lora_b = [(piece.offset // rank, piece.target) for piece in pieces_b]
    return Slot(lora_a=[piece.target for piece in pieces_a], lora_b=lora_b, ranks=[])


def _tensors(name: str, layer: Any, slot: Slot) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names of the active adapters' tensors, their values as vLLM takes them, and their places."""
    start = 0
    for adapter in running_adapters(layer):
        end = start + layer.r[adapter]
        lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scaled = lora_b.float() * layer.scaling[adapter]
        for target in slot.lora_a:
            yield f"{name}.lora_A.{adapter}.weight", lora_a, target[start:end]
        for row, target in slot.lora_b:
            yield f"{name}.lora_B.{adapter}.weight", scaled[row : row + target.shape[0]], target[:, start:end]
        start = end


def _rest(name: str, layer: Any, slot: Slot) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The parts of a slot beyond the active adapters' ranks, beside zeros."""
    end = sum(layer.r[adapter] for adapter in running_adapters(layer))
    rests = [("lora_A", target[end:]) for target in slot.lora_a]
    rests += [("lora_B", target[:, end:]) for _, target in slot.lora_b]
    for letter, rest in rests:
        if rest.numel() > 0:
            yield f"{name}.{letter} beyond rank {end}", torch.zeros_like(rest), rest


def _clear(slot: Slot) -> None:
    for target in slot.lora_a:
        target.zero_()
    for _, target in slot.lora_b:
        target.zero_()
