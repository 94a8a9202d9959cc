"""Proof that vLLM runs the policy's weights: rows of every weight, a canary, and the rollouts' own log-probs.

Rows are compared bit by bit after every update and before the first rollout. A canary's log-probs are compared as often
as `vllm_check_interval` says. What the trainer scores anyway, the rollouts, is compared at every optimizer step.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from grpo_fast.generation import VLLMEngine
from grpo_fast.generation.canary import Pace, Sung, sing, tolerance
from grpo_fast.modes import evaluating
from grpo_fast.trainer.base import replaced_methods
from grpo_fast.trainer.engines import EngineTrainer
from grpo_fast.trainer.scoring import ScoringTrainer

# real text, so that the policy is as sure of itself as in rollouts
CANARY = "The canary sings: 1, 2, 3, 4,"
# a mean over all of a step's tokens; gross errors only, since completions wander where a short prompt does not
ROLLOUT_SLACK = 2.5
# methods whose override may bring other rows than the engine has just drawn, as they are before anybody replaces them;
# `rollouts` has them
GENERATION_SEAMS: dict[str, Any] = {}


class ProofTrainer(EngineTrainer, ScoringTrainer):
    """The part of `GRPOTrainer` that stops a run whose engine has strayed from the policy."""

    rollout_func: Any
    _tokenizer: Any
    _pace: Pace

    def _prove_engine(self) -> None:
        """Compare the engine with the policy, after an update.

        Raises:
            RuntimeError: They differ; names the weights, or how far apart the log-probs are.
        """
        interval = self.args.vllm_check_interval
        if interval == 0 or not isinstance(self.engine, VLLMEngine):
            return
        with self.timer.phase("check"):
            self.engine.check_weights()
            if self._is_canary_due():
                start = time.perf_counter()
                self._check_canary(self.engine)
                self._pace.took(time.perf_counter() - start)

    def _is_canary_due(self) -> bool:
        if "_pace" not in vars(self):
            self._pace = Pace(self.args.vllm_check_interval)
        # clocks differ between processes, which score and generate together
        decision = [self._pace.is_due(self.state.global_step)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(decision)
        return decision[0]

    def _check_canary(self, engine: VLLMEngine) -> None:
        ids = self._tokenizer(CANARY, add_special_tokens=False)["input_ids"] or [self._tokenizer.eos_token_id]
        sung = sing(engine, ids, seed=self.state.global_step)
        difference = self._mean_difference(sung)
        # NaN is a difference, too
        if not difference <= self._tolerance(engine):
            raise RuntimeError(
                f"vLLM does not compute the policy at step {self.state.global_step}: the weights agree, but a canary's "
                f"log-probs differ by {difference:.3g} in the mean, where rounding explains "
                f"{self._tolerance(engine):.3g}. Temperature of the trainer: {self.temperature}, of the engine: "
                f"{engine.sampling.temperature if engine.sampling else None}"
            )

    @torch.no_grad()
    def _mean_difference(self, sung: Sung) -> float:
        """Mean |trainer's - engine's log-prob| of what the engine drew."""
        device = self.accelerator.device
        rows, columns = sung.completion_ids.shape
        prompts = torch.tensor([sung.prompt_ids]).expand(rows, -1)
        ids = torch.cat([prompts, sung.completion_ids], dim=1).to(device)
        with evaluating(self.model):
            # not an override's: the canary asks about the engine, whatever a subclass makes of the scores
            logps, *_ = ScoringTrainer._get_per_token_logps_and_entropies(
                self, self.model, ids, torch.ones_like(ids), columns
            )
        return (logps.cpu() - sung.logps).abs().mean().item()

    def _tolerance(self, engine: VLLMEngine) -> float:
        is_mixed = self.accelerator.mixed_precision != "no" or self.model.dtype != torch.float32
        bound = tolerance(engine.dtype, is_mixed=is_mixed, on_cpu=self.accelerator.device.type == "cpu")
        # logits are divided by it, and so is their rounding
        return bound / min(self.temperature, 1.0)

    def _check_sampler_agreement(self, metrics: dict[str, float]) -> None:
        """Compare the log-probs of a step's rollouts, from the metrics of the sampler's importance weights.

        Raises:
            RuntimeError: They differ by more than rounding explains.
        """
        engine, mean = self.engine, metrics.get("sampling/sampling_logp_difference/mean")
        if mean is None or not isinstance(engine, VLLMEngine) or self.args.vllm_check_interval == 0:
            return
        has_own_temperature = engine.sampling is not None and "temperature" in (engine.sampling.extra or {})
        if has_own_temperature or self.rollout_func is not None or replaced_methods(self, GENERATION_SEAMS):
            # the user's own sampler, or rows of an older policy, which the importance weights correct for
            return
        bound = ROLLOUT_SLACK * self._tolerance(engine)
        if not mean <= bound:
            raise RuntimeError(
                f"vLLM did not sample from the policy at step {self.state.global_step}: log-probs of the completions "
                f"differ by {mean:.3g} in the mean, where rounding explains {bound:.3g}"
            )
