"""One copy of the weights: the policy's parameters are views into vLLM's tensors, so an optimizer step is the update.

What cannot be one memory is copied after each step, piece by piece to where vLLM's own loader put it. Each weight is
held by the first way that is possible:

- *shared*: the parameter is a view into the engine's tensor;
- *shadowed*: of another dtype (fp32 weights, bf16 engine); an optimizer that knows the shadow writes both;
- *copied*: computed from several parameters (merged LoRA, 4-bit), sharded over processes, or in others' memory;
- *reloaded*: vLLM transforms its weights after loading (quantisation, packing), so all go through its own loader again.

The engine owns the shared memory: addresses that CUDA graphs captured stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.generation.vllm_weights import is_part, is_sharded, merged_parameters, named_weights
from grpo_fast.generation.weight_map import Piece, WeightMap, engine_tensors, storage_of, whole_view

logger = logging.getLogger(__name__)

# copies of computed weights that live at a time; one weight may be larger
BUCKET_BYTES = 2**28
MIB = 2**20
SHARDED = "the policy is sharded over processes"
REBOUND = "no longer a view: something gave the parameter other memory"


@dataclass(kw_only=True, eq=False)
class Link:
    """How one weight reaches the engine.

    Attributes:
        pieces: Where vLLM's loader put it.
        view: The whole weight as the engine has it, or None if it does not lie in one piece.
        is_shared: The parameter is `view`.
        written: The parameter's version when the engine last got its values, of a parameter that an optimizer writes
            into `view`, too, or that nobody trains; otherwise None.
        reason: Why it is not shared.
    """

    pieces: list[Piece]
    view: Tensor | None = None
    is_shared: bool = False
    written: int | None = None
    reason: str = ""


class SharedWeights:
    """The policy's weights in vLLM's model."""

    def __init__(
        self,
        target: nn.Module,
        weight_map: WeightMap,
        *,
        reload: Callable[[Any], None],
        adapters: bool = True,
        why_computed: str = "computed for the engine",
    ) -> None:
        """Know what is where.

        Args:
            target: vLLM's model, ready to run.
            weight_map: Recorded when it loaded the policy's weights.
            reload: Sends named weights through vLLM's own loader and what it does after loading.
            adapters: Whether LoRA adapters are added into the weights; see `named_weights`.
            why_computed: Said of weights that are no parameter as it is.
        """
        self._target, self._reload, self._adapters = target, reload, adapters
        self._why_computed = why_computed
        self._links = {name: Link(pieces=pieces) for name, pieces in weight_map.pieces.items() if pieces}
        self.transformed = sorted(weight_map.opaque | self._moved())
        self.copied_bytes = 0
        self._is_announced = False

    @torch.no_grad()
    def share(self, model: nn.Module) -> None:
        """Make the policy's parameters views into the engine's tensors where that is possible, and say what is not.

        The engine must hold the policy's values.

        Raises:
            RuntimeError: A weight in the engine is not the policy's; names it.
        """
        parameters, merged = _by_address(model), merged_parameters(model)
        for name, weight in named_weights(model, adapters=self._adapters):
            link = self._links.get(name)
            if link is None:
                continue
            parameter = _at(parameters, weight)
            if not self.transformed:
                self._check_whole(name, weight)
            link.view = whole_view(link.pieces, weight)
            link.reason = self._why_not_shared(link, weight, parameter)
            if not link.reason:
                assert link.view is not None
                assert parameter is not None
                parameter.data = link.view
                link.is_shared = True
            else:
                link.written = _frozen_version(parameter, merged)
        self._announce(model)

    def shadows(self, model: nn.Module) -> dict[nn.Parameter, Tensor]:
        """Parameters -> the engine's tensors of another dtype that hold the same weights."""
        if self.transformed or is_sharded(model):
            return {}
        parameters = _by_address(model)
        found: dict[nn.Parameter, Tensor] = {}
        for name, weight in named_weights(model, adapters=self._adapters):
            link, parameter = self._links.get(name), _at(parameters, weight)
            if link is not None and not link.is_shared and link.view is not None and parameter is not None:
                found[parameter] = link.view
        return found

    def shadows_written(self, model: nn.Module) -> None:
        """Note that an optimizer has just written every tensor of `shadows`."""
        parameters = _by_address(model)
        for name, weight in named_weights(model, adapters=self._adapters):
            link, parameter = self._links.get(name), _at(parameters, weight)
            if link is not None and not link.is_shared and link.view is not None and parameter is not None:
                link.written = parameter._version

    def copies(self) -> dict[torch.UntypedStorage, list[Link]]:
        """The engine's memory that holds copies of weights and nothing else, with the links whose update fills it."""
        if self.transformed:
            return {}
        pieces: dict[int, list[tuple[Link, Piece]]] = {}
        for link in self._links.values():
            for piece in link.pieces:
                pieces.setdefault(storage_of(piece.target), []).append((link, piece))
        found = {}
        for held in pieces.values():
            storage = held[0][1].target.untyped_storage()
            is_full = sum(piece.target.nbytes for _, piece in held) == storage.nbytes()
            if is_full and not any(link.is_shared for link, _ in held):
                found[storage] = [link for link, _ in held]
        return found

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Bring the engine's weights up to date with the policy's; `copied_bytes` says how much was copied for it."""
        self.copied_bytes = 0
        if self.transformed:
            self._reload(named_weights(model, adapters=self._adapters))
            self.copied_bytes = sum(piece.target.nbytes for link in self._links.values() for piece in link.pieces)
            return
        parameters, merged, are_sharded = _by_address(model), merged_parameters(model), is_sharded(model)
        bucket = _Bucket()
        for name, weight in named_weights(model, adapters=self._adapters):
            link = self._links.get(name)
            if link is None:
                continue
            parameter = _at(parameters, weight)
            if self._share_again(link, weight, parameter, parameters):
                self.copied_bytes += weight.nbytes
                continue
            self._note_other_memory(link, weight, parameters, SHARDED if are_sharded and parameter is None else REBOUND)
            if link.is_shared or (parameter is not None and parameter not in merged and _is_unchanged(parameter, link)):
                continue
            self.copied_bytes += bucket.add(link, weight)
            link.written = _frozen_version(parameter, merged)
        bucket.copy()
        self._announce(model)

    # -- proof ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, model: nn.Module, *, num_rows: int, generator: torch.Generator) -> None:
        """Compare some rows of every weight, bit by bit, with the engine's live tensors.

        Args:
            model: The policy.
            num_rows: Rows of each piece of a weight; other rows each time.
            generator: Draws them, on the CPU.

        Raises:
            RuntimeError: naming the weights that differ.
        """
        if self.transformed:
            return
        moved = self._moved()
        if moved:
            raise stale_weights(sorted(moved), "vLLM has replaced its tensors")
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        names: list[str] = []
        draws = torch.rand(num_rows, generator=generator).tolist()
        for name, weight in named_weights(model, adapters=self._adapters):
            link = self._links.get(name)
            for source, target in [] if link is None else _places(link, weight):
                # a vector is one row
                for draw in draws if target.dim() > 1 else draws[:1]:
                    ours.append(_row(source, draw))
                    theirs.append(_row(target, draw))
                    names.append(name)
        wrong = different_bits(ours, theirs)
        if wrong:
            raise stale_weights(sorted({names[i] for i in wrong}), "its rows are not the policy's")

    def _check_whole(self, name: str, weight: Tensor) -> None:
        for piece in self._links[name].pieces:
            if not _is_same(piece.of(weight), piece.target):
                raise stale_weights([name], "what vLLM loaded is not what it was given")

    # -- what cannot be shared -----------------------------------------------------------------------------------------

    def _moved(self) -> set[str]:
        """Weights whose recorded place is in none of the engine's tensors."""
        live = {storage_of(tensor) for _, tensor in engine_tensors(self._target)}
        return {
            name
            for name, link in self._links.items()
            if any(storage_of(piece.target) not in live for piece in link.pieces)
        }

    def _share_again(
        self,
        link: Link,
        weight: Tensor,
        parameter: nn.Parameter | None,
        parameters: dict[tuple[int, torch.Size], nn.Parameter],
    ) -> bool:
        """Take back a parameter that was moved; on a CPU, accelerate's `model.to("cpu:0")` moves all of them.

        Memory that others look into, too, such as the flat buffers of DeepSpeed, is left to them, and so is the
        engine's where another parameter is in it, as when another adapter's trained copy of a module runs.
        """
        if not _is_moved(link, weight) or parameter is None or parameter.untyped_storage().nbytes() > parameter.nbytes:
            return False
        if link.view is None or link.view.shape != weight.shape or self._why_not_shared(link, weight, parameter):
            return False
        if _at(parameters, link.view) is not None:
            return False
        link.view.copy_(weight)
        parameter.data = link.view
        return True

    def _note_other_memory(
        self, link: Link, weight: Tensor, parameters: dict[tuple[int, torch.Size], nn.Parameter], reason: str
    ) -> None:
        """See whether a weight is still where `share` put it: not after FSDP, DeepSpeed or a change of adapters."""
        is_moved = _is_moved(link, weight)
        owner = _at(parameters, link.view) if is_moved and link.view is not None else None
        if owner is not None:
            # the parameter whose place another one takes keeps its values
            owner.data = owner.data.clone()
        if is_moved or (reason == SHARDED and link.reason != reason):
            link.is_shared, link.reason = False, reason
            self._is_announced = False

    def _why_not_shared(self, link: Link, weight: Tensor, parameter: nn.Parameter | None) -> str:
        if self.transformed:
            return "vLLM transforms weights after loading"
        if parameter is None:
            return self._why_computed
        if link.view is None:
            covered = sum(piece.target.numel() for piece in link.pieces)
            return "laid out otherwise in vLLM" if covered >= weight.numel() else "sharded over vLLM's processes"
        if link.view.device != weight.device:
            return f"the policy is on {weight.device}, vLLM on {link.view.device}"
        if link.view.dtype != weight.dtype:
            policy, engine = (str(tensor.dtype).removeprefix("torch.") for tensor in (weight, link.view))
            return f"the policy is {policy}, vLLM {engine}"
        return ""

    def _announce(self, model: nn.Module) -> None:
        if self._is_announced:
            return
        self._is_announced = True
        sizes: dict[str, tuple[int, int]] = {}
        for link in self._links.values():
            count, size = sizes.get(link.reason, (0, 0))
            sizes[link.reason] = (count + 1, size + sum(piece.target.nbytes for piece in link.pieces))
        count, size = sizes.pop("", (0, 0))
        logger.info("vLLM shares the memory of %d weights of %s (%.1f MiB)", count, type(model).__name__, size / MIB)
        for reason, (count, size) in sizes.items():
            logger.warning("vLLM has its own copy of %d weights (%.1f MiB): %s", count, size / MIB, reason)


class _Bucket:
    """Copies that are made together."""

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._bytes = 0

    def add(self, link: Link, weight: Tensor) -> int:
        """Queue a weight, and return its bytes."""
        size = 0
        for piece in link.pieces:
            self._sources.append(piece.of(weight))
            self._targets.append(piece.target)
            size += piece.target.nbytes
        self._bytes += size
        if self._bytes >= BUCKET_BYTES:
            self.copy()
        return size

    def copy(self) -> None:
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
        self._sources, self._targets, self._bytes = [], [], 0


def _is_unchanged(parameter: nn.Parameter, link: Link) -> bool:
    """Whether the engine has the parameter's present values: an optimizer wrote them too, or nobody trains it.

    In-place changes raise a tensor's version, but not those through `.data`, which older optimizers make; so a trained
    parameter's version alone proves nothing.
    """
    return link.written is not None and link.written == parameter._version


def _frozen_version(parameter: nn.Parameter | None, merged: set[nn.Parameter]) -> int | None:
    """The version of a parameter that only in-place changes alter; None for others, whose version proves nothing."""
    if parameter is None or parameter.requires_grad or parameter in merged:
        return None
    return parameter._version


def _is_moved(link: Link, weight: Tensor) -> bool:
    return link.is_shared and (link.view is None or _address(weight) != _address(link.view))


def _address(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _by_address(model: nn.Module) -> dict[tuple[int, torch.Size], nn.Parameter]:
    # a sharded parameter is no whole weight
    return {_address(parameter): parameter for parameter in model.parameters() if not is_part(parameter)}


def _at(parameters: dict[tuple[int, torch.Size], nn.Parameter], weight: Tensor) -> nn.Parameter | None:
    """The parameter that lies where `weight` does.

    One that moved after `_by_address` is not there any more, though a computed weight may be by chance.
    """
    parameter = parameters.get(_address(weight))
    return parameter if parameter is not None and _address(parameter) == _address(weight) else None


def _places(link: Link, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The weight beside what the engine has of it, in as few parts as it lies in."""
    if link.view is not None:
        return [(weight, link.view)]
    return [(piece.of(weight), piece.target) for piece in link.pieces]


def _row(tensor: Tensor, draw: float) -> Tensor:
    """The row at the place `draw` in [0, 1) of all rows."""
    while tensor.dim() > 1:
        place = draw * tensor.shape[0]
        tensor, draw = tensor[int(place)], place % 1
    return tensor


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as whole numbers, among which NaN equals itself."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.itemsize])


def different_bits(ours: list[Tensor], theirs: list[Tensor]) -> list[int]:
    """Indices of pairs of vectors that differ in a bit of the second's dtype; the device is waited for once a dtype."""
    kinds = [(left.dtype, right.dtype) for left, right in zip(ours, theirs, strict=True)]
    wrong: list[int] = []
    for kind in set(kinds):
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        left, right = (torch.cat([rows[i] for i in chosen]) for rows in (ours, theirs))
        if not _is_same(left, right):
            wrong += [i for i in chosen if not _is_same(ours[i], theirs[i])]
    return wrong


def _is_same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(_bits(ours.to(theirs)), _bits(theirs))


def stale_weights(names: list[str], what: str) -> RuntimeError:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return RuntimeError(f"vLLM does not run the policy's weights: {shown}: {what}")
