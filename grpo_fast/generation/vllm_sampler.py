"""What vLLM reports as a token's log-prob: the policy's own, `log_softmax(logits / temperature)` at the token.

vLLM's "processed" log-probs are those of the distribution drawn from: normalised over the tokens that top-k, top-p,
min-p and grammars leave, after penalties and biases. The trainer's are of the whole vocabulary, so their ratio would be
the kept probability mass, multiplied up over a completion, for a policy that has not changed. vLLM's "raw" log-probs
lack the temperature. Here every reported log-prob is of the whole vocabulary at the request's temperature, and the
ratio of an unchanged policy is 1 whatever shapes the samples.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# below, vLLM samples greedily
GREEDY_TEMPERATURE = 1e-5


def report_policy_logps(worker: Any) -> None:
    """Let the sampler of this vLLM worker report the policy's log-probs; to be run by `LLM.collective_rpc`.

    A sampler of an unknown kind is left as it is, with a warning.
    """
    runner = worker.model_runner
    sampler = runner.sampler
    theirs = type(sampler)
    # one for each of vLLM's two model runners
    kinds = {
        "vllm.v1.sample.sampler.Sampler": _first_runner_sampler,
        "vllm.v1.worker.gpu.sample.sampler.Sampler": _second_runner_sampler,
    }
    make_kind = kinds.get(f"{theirs.__module__}.{theirs.__qualname__}")
    if make_kind is None:
        logger.warning(
            "vLLM samples with %s, which is not known here: with top_k, top_p, min_p, penalties or structured outputs "
            "the log-probs it reports are not the policy's, and vLLM importance ratios are biased",
            theirs.__name__,
        )
        return
    # the sampler keeps its state, and whoever else holds it sees the change
    sampler.__class__ = make_kind(theirs)
    sampler.unmasked = None
    if make_kind is _first_runner_sampler:
        sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = "raw_logprobs"
    _keep_logits(runner.get_model(), sampler)


def _keep_logits(model: Any, sampler: Any) -> None:
    """Keep the model's logits for the sampler: grammars mask them in place before it sees them."""
    compute = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Tensor | None:
        logits: Tensor | None = compute(*args, **kwargs)
        sampler.unmasked = None if logits is None else logits.clone()
        return logits

    model.compute_logits = compute_logits


def _first_runner_sampler(theirs: Any) -> type:
    class PolicySampler(theirs):
        """In mode "raw_logprobs" a step computes log-probs once, of the logits before anything is applied to them."""

        unmasked: Tensor | None
        _temperature: Tensor | None = None
        _is_stepping = False

        def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            self._temperature, self._is_stepping = sampling_metadata.temperature, True
            try:
                return super().forward(logits, sampling_metadata, *args, **kwargs)
            finally:
                self._temperature, self._is_stepping, self.unmasked = None, False, None

        def compute_logprobs(self, logits: Tensor) -> Any:
            if not self._is_stepping:
                # of a prompt
                return super().compute_logprobs(logits)
            return super().compute_logprobs(_tempered(_unmasked(self, logits), self._temperature))

    return PolicySampler


def _second_runner_sampler(theirs: Any) -> type:
    class PolicySampler(theirs):
        """In mode "processed_logprobs" the log-probs are of the logits that `sample` returns."""

        unmasked: Tensor | None

        def sample(self, logits: Tensor, request_of_row: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            policy, self.unmasked = _unmasked(self, logits), None
            sampled, _ = super().sample(logits, request_of_row, *args, **kwargs)
            return sampled, _tempered(policy, self.sampling_states.temperature.gpu[request_of_row])

    return PolicySampler


def _unmasked(sampler: Any, logits: Tensor) -> Tensor:
    """The logits as the model gave them; those given here where speculative decoding has other rows."""
    kept: Tensor | None = sampler.unmasked
    return logits if kept is None or kept.shape != logits.shape else kept


def _tempered(logits: Tensor, temperature: Tensor | None) -> Tensor:
    """Logits [rows, V] over each row's temperature, in fp32; None and 0 are greedy and change nothing."""
    if temperature is None:
        return logits
    return logits.float() / torch.where(temperature < GREEDY_TEMPERATURE, 1.0, temperature)[:, None]
