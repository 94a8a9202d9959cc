"""What a vLLM server gains by `--worker-extension-cls grpo_fast.generation.vllm_worker.WorkerExtension`.

A weight-transfer backend that needs no GPU, `--weight-transfer-config '{"backend": "grpo_fast_gloo"}'`, and log-probs
that are the policy's whatever truncates the sampling. Only vLLM's workers import this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from grpo_fast.generation.vllm_sampler import report_policy_logps
from grpo_fast.generation.vllm_transfer import GLOO_BACKEND, GlooGroup


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's own engine, reload and all, with gloo in the place of NCCL."""

    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join the trainer's group; another trainer replaces the one before."""
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.shutdown()
        self._group = GlooGroup(
            init_info.master_address,
            init_info.master_port,
            rank=init_info.rank_offset + worker,
            world_size=init_info.world_size,
        )

    def receive_weights(self, update_info: Any) -> None:
        """Load what the trainer broadcasts, and receive all of it whatever becomes of one tensor."""
        weights = self._received(update_info)
        try:
            self.model.load_weights(weights)
        finally:
            for _ in weights:
                pass

    def _received(self, update_info: Any) -> Iterator[tuple[str, Tensor]]:
        if self._group is None:
            raise RuntimeError("no trainer has called init_weight_transfer_engine")
        described = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        for name, dtype, shape in described:
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(weight)
            yield name, weight.to(self.device)

    def finish_weight_update(self) -> None:
        """Also renew the packed copy by which a head computes on a CPU: a reload leaves that of a tied head stale."""
        super().finish_weight_update()
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None


class WorkerExtension:
    """Methods of the worker that the trainer calls."""

    def report_policy_logps_once(self) -> None:
        """See `report_policy_logps`; a second trainer on the same server changes nothing."""
        if not getattr(self, "_reports_policy_logps", False):
            report_policy_logps(self)
            self._reports_policy_logps = True


# vLLM imports the extension in each worker before it makes the engine
WeightTransferEngineFactory.register_engine(GLOO_BACKEND, GlooWeightTransferEngine)
