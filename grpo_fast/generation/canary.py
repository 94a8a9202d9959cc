"""A canary: tokens that the engine draws with their log-probs, for the trainer to score with its own weights.

Equal bits of all weights do not prove that the engine computes the same thing with them: at another temperature, from
cached keys of older weights or with another adapter it does not. Log-probs tell.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_fast.batch import Sampling
from grpo_fast.generation.vllm_engine import VLLMEngine

# completions and tokens of each: two passes of the engine, however long its prompts are otherwise
ROWS, TOKENS = 8, 2
# mean |difference| of the log-probs. Measured: 1e-5 in fp32, 0.03 to 0.05 in bf16 (SmolLM2-135M); TF32 rounds to 2^-11
EXACT_TOLERANCE, TF32_TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2, 0.2
# share of a run that canaries may take where no interval is set; comparing rows after each update takes about as much
SHARE_OF_TIME = 0.002


@dataclass(frozen=True, kw_only=True)
class Sung:
    """What the engine drew for one prompt.

    Attributes:
        prompt_ids: The prompt's tokens.
        completion_ids: [ROWS, TOKENS] int64.
        logps: [ROWS, TOKENS] fp32, as the engine reports them.
    """

    prompt_ids: list[int]
    completion_ids: Tensor
    logps: Tensor


def sing(engine: VLLMEngine, prompt_ids: list[int], *, seed: int) -> Sung:
    """Draw from the engine at its own temperature; the process's random state stays as it is."""
    assert engine.sampling is not None
    sampling = Sampling(
        max_tokens=TOKENS,
        temperature=engine.sampling.temperature,
        seed=seed,
        extra={"ignore_eos": True, "stop_token_ids": []},
    )
    drawn = engine.generate([prompt_ids] * ROWS, sampling)
    assert drawn.logps is not None
    return Sung(prompt_ids=prompt_ids, completion_ids=torch.tensor(drawn.ids), logps=torch.tensor(drawn.logps).float())


def tolerance(engine_dtype: torch.dtype, *, is_mixed: bool, on_cpu: bool) -> float:
    """The largest mean |difference| of log-probs that rounding explains.

    Args:
        engine_dtype: Of vLLM's weights and activations.
        is_mixed: Whether the trainer runs in 16-bit autocast or 16-bit weights.
        on_cpu: Whether fp32 products are fp32.
    """
    if is_mixed or engine_dtype != torch.float32:
        return HALF_TOLERANCE
    return EXACT_TOLERANCE if on_cpu else TF32_TOLERANCE


class Pace:
    """When to sing: every `interval` optimizer steps, or as often as `SHARE_OF_TIME` of the run allows."""

    def __init__(self, interval: int | None) -> None:
        """`interval` None goes by time, 0 never sings."""
        self._interval = interval
        self._start: float | None = None
        self._spent = self._last_cost = 0.0

    def is_due(self, step: int) -> bool:
        """Whether to sing before the rollout at optimizer step `step`; always before the first."""
        if self._interval is not None:
            return self._interval > 0 and step % self._interval == 0
        if self._start is None:
            return True
        return self._spent + self._last_cost <= SHARE_OF_TIME * (time.perf_counter() - self._start)

    def took(self, seconds: float) -> None:
        """Note what one canary cost; the first also pays for warming up."""
        if self._start is None:
            self._start = time.perf_counter()
        else:
            self._spent += seconds
        self._last_cost = seconds
