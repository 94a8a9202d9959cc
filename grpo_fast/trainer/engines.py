"""The engine in the trainer: started from the policy, kept up to date with it, and reachable under TRL's names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from grpo_fast.attention import native_attention
from grpo_fast.generation import (
    Engine,
    EngineError,
    VLLMEngine,
    VLLMGeneration,
    VLLMServer,
    make_engine,
    unwrap_model_for_generation,
)
from grpo_fast.metrics import PhaseTimer
from grpo_fast.profiling import profiling_context
from grpo_fast.trainer.base import BaseTrainer


class EngineTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that owns the engine."""

    engine: Engine
    vllm_generation: VLLMGeneration
    timer: PhaseTimer
    use_vllm: bool
    eos_token_ids: list[int]
    _metrics: dict[str, dict[str, list[float]]]
    _last_loaded_step: int
    _temperature: float

    def _start_engine(self) -> None:
        if self.use_vllm:
            _check_sharding(self.accelerator.state, has_adapters=hasattr(self.model, "peft_config"))
        self.engine = make_engine(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            self.args,
            eos_token_ids=self.eos_token_ids,
            context=self._generation_context,
            unwrap=self._unwrapped_for_generation,
            seed=self.args.seed + self.accelerator.process_index // self.args.vllm_tensor_parallel_size,
        )
        if isinstance(self.engine, (VLLMEngine, VLLMServer)):
            self.vllm_generation = VLLMGeneration(self.engine, lambda: self.accelerator.unwrap_model(self.model))

    def _unwrapped_for_generation(self) -> AbstractContextManager[Any]:
        return unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
        )

    @property
    def temperature(self) -> float:
        """Of the sampler and of the scores; TRL's trainer keeps to the one it was made with."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._temperature = temperature
        # there is none yet while settings are read
        if "engine" in vars(self):
            self.engine.set_temperature(temperature)

    @property
    def generation_config(self) -> Any:
        """What transformers' generate draws with; changes hold for the next rollout. vLLM has none."""
        return getattr(self.engine, "generation_config", None)

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        if self.use_vllm:
            raise ValueError(
                "generation_config is transformers' own; with use_vllm=True set trainer.vllm_generation's fields"
            )
        vars(self.engine)["generation_config"] = config

    @contextmanager
    def _generation_context(self) -> Iterator[None]:
        """What transformers' generate runs under: the model's own attention, in the run's mixed precision."""
        with native_attention(self.model), self.accelerator.autocast():
            yield

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """A rollout: the engine holds the memory it needs for all of it, and a fault says where the run stood."""
        try:
            with self.engine.awake():
                yield
        except EngineError as error:
            folder = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
            way_on = f"resume_from_checkpoint={folder!r}" if folder else "no checkpoint has been saved"
            step = f"in the rollout for step {self.state.global_step + 1}"
            raise EngineError(f"{step}: {error}. To go on, make a new trainer; {way_on}") from error

    def sync_engine(self) -> None:
        """Bring the engine's weights up to date if the policy has changed since it last generated."""
        if self.state.global_step != self._last_loaded_step:
            with self.timer.phase("sync"), profiling_context(self, "sync_weights"):
                self.engine.update_weights(self.accelerator.unwrap_model(self.model))
                if isinstance(self.engine, VLLMEngine):
                    self._metrics[self._mode]["sync/copied_mib"].append(self.engine.copied_bytes / 2**20)
                self._prove_engine()
            self._last_loaded_step = self.state.global_step

    def _prove_engine(self) -> None:
        """See `ProofTrainer`."""
        raise NotImplementedError


def _check_sharding(state: Any, *, has_adapters: bool) -> None:
    """Refuse ways of sharding the policy from which vLLM's weights cannot be gathered (ValueError)."""
    fsdp, deepspeed = (getattr(state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed"))
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise ValueError(
            "use_vllm=True takes FSDP2: set fsdp_config={'version': 2}, or fsdp_version: 2 of accelerate; it is 1"
        )
    if deepspeed is not None and deepspeed.zero_stage == 3 and has_adapters:
        raise ValueError(
            "use_vllm=True takes no peft_config with deepspeed's ZeRO stage 3: use stage 2, or train all weights"
        )
