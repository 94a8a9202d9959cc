"""From log-probs of a pack to its share of the loss: what each token weighs, and what it tells the metrics.

Letters: B rows of the micro-batch, C padded completion length, N scored tokens of the pack.
The per-token maths and the normalisers are `grpo_kernels`'; here are the pack's tensors and the metric sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast.importance import Correction, SamplerWeights, sampler_weights
from grpo_fast.metrics import Stats
from grpo_kernels import PolicyLoss, normalisers
from grpo_kernels.options import PolicyOptions, Tokens
from grpo_kernels.policy_loss import policy_loss_of, run_policy_loss


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The settings of the loss, in `GRPOConfig`'s names; `correction` None: the sampler is not corrected for."""

    loss_type: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    bias_correction_kl: bool
    max_completion_length: int
    correction: Correction | None


def row_weights(
    lengths_B: Tensor, *, objective: Objective, num_items_per_process: Tensor, accumulation: float, windows: float
) -> Tensor:
    """What one token of each row weighs in the loss, fixed before the forward pass. [B] fp32.

    Args:
        lengths_B: [B], tokens of each row in the loss; a fully masked row still counts as a row.
        objective: The loss type.
        num_items_per_process: 0-dim, tokens in the loss of the whole generation batch, over the number of processes.
        accumulation: Micro-batches of this optimizer step (1 in evaluation).
        windows: `dapo` only: optimizer steps that share the generation batch, inverted: accumulation over
            micro-batches a generation (1 in evaluation).
    """
    return normalisers.row_weights(
        lengths_B,
        loss_type=objective.loss_type,
        accumulation=accumulation,
        num_items_per_process=num_items_per_process,
        windows=windows,
        max_completion_length=objective.max_completion_length,
    )


class PackLoss:
    """One pack's share of the micro-batch's loss, and of the metrics."""

    def __init__(
        self,
        *,
        rows_N: Tensor,
        columns_N: Tensor,
        inputs: dict[str, Tensor],
        weights_B: Tensor,
        objective: Objective,
    ) -> None:
        """Gather the pack's tokens from the padded micro-batch.

        Args:
            rows_N: [N] int64, ascending, the row of the micro-batch each token comes from; whole rows only.
            columns_N: [N] int64, its column.
            inputs: `advantages` [B] or [B, C], and where given `old_per_token_logps`, `ref_per_token_logps`,
                `sampling_per_token_logps` [B, C] and `importance_sampling_ratio` [B, C] or [B, 1].
            weights_B: [B] fp32 from `row_weights`.
            objective: The settings.
        """

        def tokens(name: str) -> Tensor | None:
            values = inputs.get(name)
            if values is None or values.dim() == 1:
                return values if values is None else values[rows_N]
            return values[rows_N, 0] if values.shape[1] == 1 else values[rows_N, columns_N]

        self.objective, self.rows_N = objective, rows_N
        self.sampling_N = tokens("sampling_per_token_logps") if objective.correction is not None else None
        self.given_ratio_N = tokens("importance_sampling_ratio") if objective.correction is not None else None
        advantages_N = tokens("advantages")
        assert advantages_N is not None
        self.tokens = Tokens(
            advantages=advantages_N,
            weights=weights_B[rows_N],
            old_logps=tokens("old_per_token_logps"),
            ref_logps=tokens("ref_per_token_logps") if objective.beta else None,
        )
        self.options = PolicyOptions(
            loss_type=objective.loss_type,
            epsilon_low=objective.epsilon_low,
            epsilon_high=objective.epsilon_high,
            delta=objective.delta,
            beta=objective.beta,
            bias_correction_kl=objective.bias_correction_kl,
        )
        self.tokens.check(self.options)

    @property
    def needs_whole_rows(self) -> bool:
        """A token's loss depends on the other tokens of its row."""
        correction = self.objective.correction
        return correction is not None and correction.mode.startswith("sequence")

    def of_rows(self, logps: Tensor, entropies: Tensor, some: slice) -> PolicyLoss:
        """The terms of a slice of the N tokens, with their slopes and without a graph."""
        return run_policy_loss(logps, self._tokens(logps, some), self.options, entropies=entropies)

    def differentiable(self, logps_N: Tensor) -> PolicyLoss:
        """The terms of all tokens; `loss` is differentiable in the log-probs."""
        everything = slice(0, logps_N.numel())
        return policy_loss_of(logps_N, self._tokens(logps_N, everything), self.options)

    @torch.no_grad()
    def stats(self, logps_N: Tensor, entropies_N: Tensor, terms: PolicyLoss) -> Stats:
        """The pack's share of the metrics."""
        return _stats(terms, entropies_N, self._sampler(logps_N, slice(0, logps_N.numel())), self.rows_N)

    def _tokens(self, logps: Tensor, some: slice) -> Tokens:
        sampler = self._sampler(logps, some)
        tokens = self.tokens.rows(some)
        return tokens if sampler is None else replace(tokens, sampling_weights=sampler.weights)

    def _sampler(self, logps: Tensor, some: slice) -> SamplerWeights | None:
        """The sampler's weights of a slice of whole rows, from their log-probs."""
        if self.sampling_N is None or self.objective.correction is None:
            return None
        old = logps if self.tokens.old_logps is None else self.tokens.old_logps[some]
        sampler = sampler_weights(old, self.sampling_N[some], self.rows_N[some], self.objective.correction)
        if self.given_ratio_N is None:
            return sampler
        ratio = self.given_ratio_N[some]
        return SamplerWeights(weights=ratio, ratios=ratio, differences=sampler.differences)


def _stats(terms: PolicyLoss, entropies_N: Tensor, sampler: SamplerWeights | None, rows_N: Tensor) -> Stats:
    stats = Stats.empty(entropies_N.device)
    if entropies_N.numel() == 0:
        return stats
    low_N, high_N = terms.is_low_clipped.float(), terms.is_high_clipped.float()
    sums, maxima = stats.sums, stats.maxima
    sums[0] = entropies_N.numel()
    sums[1] = entropies_N.sum()
    sums[2] = 0.0 if terms.kl is None else terms.kl.sum()
    sums[3], sums[4] = low_N.sum(), high_N.sum()
    rows, token_row, counts = torch.unique_consecutive(rows_N, return_inverse=True, return_counts=True)
    zeros = torch.zeros(rows.numel(), device=rows.device)
    maxima[0] = (-zeros.index_add(0, token_row, low_N) / counts).amax()
    maxima[1] = (zeros.index_add(0, token_row, high_N) / counts).amax()
    if sampler is not None:
        is_reported = ~sampler.differences.isnan()
        sums[5], sums[6] = sampler.differences.nan_to_num(nan=0.0).sum(), is_reported.sum()
        sums[7], sums[8] = sampler.ratios.sum(), sampler.ratios.numel()
        maxima[2] = sampler.differences.nan_to_num(nan=0.0).amax()
        maxima[3], maxima[4] = (-sampler.ratios).amax(), sampler.ratios.amax()
    return stats
