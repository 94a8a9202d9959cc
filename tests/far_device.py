"""A device called "far" that computes on the CPU, and remembers every time that the host would have to wait for it.

It stands in for an accelerator in a process that has none: its tensors are no CPU tensors, so that code which looks at
devices does what it does there, and what crosses between the two is seen. A wait is what makes CUDA's stream wait for
the host or the host for the stream, as `torch.cuda.set_sync_debug_mode` defines it: a value or a shape that the host
reads, and a copy either way that is not `non_blocking`.

`install` changes this process for good: run it in one of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "far"
ROOT = Path(__file__).parent.parent
OWN = (str(ROOT / "grpo_fast"), str(ROOT / "kernels"))
LIBRARIES = (*OWN, *(str(Path(library.__file__).parent) for library in (accelerate, transformers)))
aten = torch.ops.aten
# the shape of what they return is only known once they have run
DATA_DEPENDENT = {
    *(aten.nonzero, aten.argwhere, aten.masked_select, aten.unique_consecutive, aten.unique_dim, aten._unique),
    *(aten._unique2, aten.bincount, aten.equal, aten._local_scalar_dense),
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy, aten.copy_}


@dataclass(frozen=True)
class Wait:
    """The operation that waits, and the frames of this repository that led to it, outermost first."""

    operation: str
    frames: tuple[str, ...]

    def __str__(self) -> str:
        return "\n    ".join([self.operation, *self.frames])


def short(path: str) -> str:
    """From the library's name on."""
    return path.removeprefix(f"{ROOT}/").split("site-packages/")[-1]


@dataclass
class Log:
    """The waits since it was made, while it counts."""

    is_counting: bool = False
    waits: list[Wait] = field(default_factory=list)

    def add(self, operation: str) -> None:
        if self.is_counting:
            stack = [frame for frame in traceback.extract_stack() if frame.filename.startswith(LIBRARIES)]
            own = [i for i, frame in enumerate(stack) if frame.filename.startswith(OWN)]
            # and the last of another library that these have called
            shown = [stack[i] for i in own] + stack[own[-1] + 1 :][-1:] if own else stack[-1:]
            frames = [f"{short(frame.filename)}:{frame.lineno} {frame.name}: {frame.line}" for frame in shown]
            self.waits.append(Wait(operation, tuple(frames)))


class FarTensor(Tensor):
    """A tensor on the far device; `near` is the CPU tensor it computes with."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.near = near
        return tensor

    def __init__(self, near: Tensor) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """From lists of numbers to tensors and back: torch copies between devices where no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], FarTensor):
            return args[0].cpu().tolist()
        if func is torch.Tensor.new_tensor and isinstance(args[0], FarTensor):
            kwargs = {"dtype": args[0].dtype, "device": args[0].device} | kwargs
            func, args = torch.tensor, args[1:]
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], FarTensor):
            args = (args[0], _far_index(args[1], args[0].device), *args[2:])
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and _is_far(device):
            return func(*args, **kwargs | {"device": "cpu"}).to(device)
        return func(*args, **kwargs)


class _FarOperations(TorchDispatchMode):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = waiting(func, args, kwargs)
        if operation is not None:
            self.log.add(operation)
        return _compute(func, args, kwargs)


def _far_index(index: Any, device: torch.device) -> Any:
    if isinstance(index, tuple):
        return tuple(_far_index(part, device) for part in index)
    if isinstance(index, list):
        return torch.tensor(index).to(device)
    return index.to(device) if isinstance(index, Tensor) else index


@contextmanager
def far_device(log: Log) -> Iterator[None]:
    """Inside the block the device can be named in factories and in `to`; `log` gets the waits."""
    with _FarOperations(log), _Numbers():
        yield


def waiting(func: Any, args: Any, kwargs: Any) -> str | None:
    """What the host waits for in an operation, or None."""
    packet = func.overloadpacket
    leaves = tree_leaves((args, kwargs))
    is_far = any(isinstance(leaf, FarTensor) for leaf in leaves)
    if packet in COPIES:
        return _blocking_copy(packet, args, kwargs)
    if not is_far:
        return None
    if packet in DATA_DEPENDENT:
        return str(packet)
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        return f"{packet} without output_size"
    if packet in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return f"{packet} by a mask"
        if isinstance(args[0], FarTensor) and not all(isinstance(index, FarTensor) for index in indices):
            return f"{packet} by indices on the host"
    return None


def _blocking_copy(packet: Any, args: Any, kwargs: Any) -> str | None:
    if packet is aten._to_copy:
        source_is_far, device = isinstance(args[0], FarTensor), kwargs.get("device")
        target_is_far = source_is_far if device is None else _is_far(device)
        is_blocking = not kwargs.get("non_blocking", False)
    else:
        target_is_far, source_is_far = (isinstance(tensor, FarTensor) for tensor in args[:2])
        is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if source_is_far == target_is_far or not is_blocking:
        return None
    return f"blocking copy to the {'device' if target_is_far else 'host'}"


def _is_far(device: Any) -> bool:
    return torch.device(device).type == NAME


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU; what it returns is far if its tensors are, or if it is told so."""
    owners: dict[int, FarTensor] = {}

    def near(value: Any) -> Any:
        if isinstance(value, FarTensor):
            owners[id(value.near)] = value
            return value.near
        return value

    device = kwargs.get("device")
    nears = tree_map(near, (args, kwargs))
    is_far = bool(owners) if device is None else _is_far(device)
    if device is not None and is_far:
        nears[1]["device"] = torch.device("cpu")
    if func.overloadpacket is aten.copy_:
        is_far = isinstance(args[0], FarTensor)
    out = func(*nears[0], **nears[1])
    if torch.Tag.inplace_view in func.tags:
        # the shape that is seen changes, too
        with no_dispatch():
            func(*args, **kwargs)
    if device is not None and is_far and not owners and func.overloadpacket is aten._to_copy:
        # memory of its own, as a copy to another device has
        out = out.clone()

    def far(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_far:
            return value
        # what works in place returns the tensor it was given
        return owners[id(value)] if id(value) in owners else FarTensor(value)

    return tree_map(far, out)


class _Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass


def install() -> None:
    """Make the device known to this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
