"""Weights to a vLLM server by vLLM's native transfer API: init once, then start, update and finish.

The tensors travel beside HTTP: over NCCL between GPUs, as TRL sends them, or over gloo to a server that was started
with `--worker-extension-cls grpo_fast.generation.vllm_worker.WorkerExtension`, which needs no GPU.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from packaging.version import Version
from torch import Tensor, distributed

from grpo_fast.generation.vllm_client import ServerClient

GLOO_BACKEND = "grpo_fast_gloo"
# until all have met, which the request before has told them to
MEETING_S = 60.0
# of a broadcast; the server may be busy with the tensor before
BROADCAST_S = 600.0
# until the server's own words about a failure count as missing
LAST_WORDS_S = 10.0
# a tensor's name, its type as in "bfloat16", its shape
Description = tuple[str, str, list[int]]
T = TypeVar("T")


class GlooGroup:
    """The trainer as rank 0 and the server's workers; broadcasts from rank 0."""

    def __init__(self, address: str, port: int, *, rank: int, world_size: int) -> None:
        """Join the group; returns when all have."""
        self._store: Any = distributed.TCPStore(address, port, world_size, rank == 0, timedelta(seconds=MEETING_S))  # type: ignore[attr-defined]
        self._group: Any = distributed.ProcessGroupGloo(self._store, rank, world_size, timedelta(seconds=BROADCAST_S))

    def broadcast(self, tensor: Tensor) -> None:
        """Fill `tensor`, which is on the CPU and contiguous, with rank 0's."""
        options = distributed.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        # as bytes: gloo does not know every type; a scalar cannot be viewed as such, its row of one can
        self._group.broadcast([tensor.reshape(-1).view(torch.uint8)], options).wait()

    def close(self) -> None:
        """Leave the group; the store must outlive the group's threads."""
        self._group = None
        self._store = None


class _Transport(Protocol):
    """One way of the tensors: what vLLM's backend wants to know, and the trainer's end."""

    init_extra: dict[str, Any]
    update_extra: dict[str, Any]

    def open(self, info: dict[str, Any]) -> None: ...

    def send(self, weights: Iterator[tuple[str, Tensor]]) -> None: ...

    def close(self) -> None: ...


class _Gloo:
    def __init__(self) -> None:
        self.init_extra: dict[str, Any] = {}
        self.update_extra: dict[str, Any] = {}
        self._group: GlooGroup | None = None

    def open(self, info: dict[str, Any]) -> None:
        self._group = GlooGroup(info["master_address"], info["master_port"], rank=0, world_size=info["world_size"])

    def send(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        assert self._group is not None
        for _, weight in weights:
            self._group.broadcast(weight.cpu().contiguous())

    def close(self) -> None:
        if self._group is not None:
            self._group.close()


class _NCCL:
    """vLLM's own end; tensors are packed into buffers of a gigabyte."""

    def __init__(self, server_version: str) -> None:
        # where vLLM looks for the switch moved in 0.28
        is_stateful = Version(server_version) >= Version("0.28.0")
        self.init_extra = {"packed": True} if is_stateful else {}
        self.update_extra = {} if is_stateful else {"packed": True}
        self._group: Any = None

    def open(self, info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group = trainer_init(info)

    def send(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=weights, group=self._group, src=0, post_iter_func=lambda named: named[1].cuda()
        )

    def close(self) -> None:
        self._group = None


class WeightTransfer:
    """The trainer's end of the transfer, in its main process."""

    def __init__(self, server: ServerClient, *, device: torch.device, port: int) -> None:
        """Meet the server's workers.

        Args:
            server: Whose settings name the backend.
            device: The trainer's; NCCL needs a GPU.
            port: Where the workers find this process (`vllm_group_port`).

        Raises:
            ValueError: the server was started without a backend, or with one that the trainer does not have.
            RuntimeError: the port is taken, or a worker did not come.
        """
        self._server = server
        self._transport = self._make_transport(device)
        info = {
            "master_address": server.local_address(),
            "master_port": port,
            "rank_offset": 1,
            "world_size": server.get("get_world_size")["world_size"] + 1,
        }
        _check_free(port)
        self._together(
            "init_weight_transfer_engine",
            {"init_info": info | self._transport.init_extra},
            lambda: self._transport.open(info),
        )

    def _make_transport(self, device: torch.device) -> _Transport:
        configured = self._server.settings()["weight_transfer_config"]
        backend = None if configured is None else configured["backend"]
        if backend == GLOO_BACKEND:
            return _Gloo()
        if backend == "nccl" and device.type == "cuda":
            return _NCCL(self._server.get("version")["version"])
        raise ValueError(
            f"the vLLM server at {self._server.base_url} must run with --weight-transfer-config "
            '\'{"backend": "nccl"}\' for a trainer on a GPU, or with \'{"backend": "' + GLOO_BACKEND + "\"}' "
            "--worker-extension-cls grpo_fast.generation.vllm_worker.WorkerExtension without one; its backend is "
            f"{backend!r} and the trainer is on {device.type!r}"
        )

    def send(self, described: list[Description], weights: Iterator[tuple[str, Tensor]]) -> None:
        """Give the server all weights, and make it forget the prefixes that the old ones made.

        Args:
            described: What follows, in its order.
            weights: The tensors themselves.

        Raises:
            RuntimeError: the server is gone, or its model does not take a tensor.
        """
        names, dtypes, shapes = ([entry[i] for entry in described] for i in range(3))
        info = {"names": names, "dtype_names": dtypes, "shapes": shapes} | self._transport.update_extra
        self._server.post("start_weight_update")
        as_described = _as_described(described, weights)
        self._together("update_weights", {"update_info": info}, lambda: self._transport.send(as_described))
        self._server.post("finish_weight_update")
        self._server.reset_prefix_cache()

    def close(self) -> None:
        """Leave the group."""
        self._transport.close()

    def _together(self, path: str, body: dict[str, Any], act: Callable[[], T]) -> T:
        """`act`, while the server does its half, which is the request to `path`."""
        reply: Future[Any] = Future()

        def ask() -> None:
            try:
                reply.set_result(self._server.post(path, body))
            except BaseException as error:  # it belongs to the thread that waits
                reply.set_exception(error)

        # a daemon: a server that is stuck must keep neither an error nor the end of the process
        threading.Thread(target=ask, daemon=True).start()
        try:
            result = act()
        except Exception as error:
            # the server's own words say more than a broken connection
            wait([reply], timeout=LAST_WORDS_S)
            if reply.done():
                reply.result()
            raise RuntimeError(f"weights did not reach the vLLM server at {self._server.base_url}: {error}") from error
        reply.result()
        return result


def describe(weights: Iterator[tuple[str, Tensor]]) -> list[Description]:
    """Names, types and shapes; of a sharded tensor those of the whole, without gathering it."""
    return [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in weights]


def _as_described(described: list[Description], weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for expected, (name, weight) in zip(described, weights, strict=True):
        (found,) = describe(iter([(name, weight)]))
        if found != expected:
            raise RuntimeError(f"the policy's weights changed during the run: {found} where {expected} was")
        yield name, weight


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RuntimeError(
                f"vllm_group_port={port} is taken on this machine ({error}): set another port, one for each trainer"
            ) from error
