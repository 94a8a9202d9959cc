"""From log-probs of some rows to their share of the loss: what each token weighs, and what it tells the metrics.

Letters: B rows of the micro-batch, C padded completion length, N scored tokens.
The per-token maths and the normalisers are `grpo_kernels`'; here are the rows' tensors and the metric sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_fast.batch import Runs
from grpo_fast.importance import Correction, sampler_weights
from grpo_fast.metrics import Stats
from grpo_kernels import PolicyLoss, normalisers, policy_loss
from grpo_kernels.options import PolicyOptions, Tokens
from grpo_kernels.policy_loss import policy_loss_of, run_policy_loss


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a micro-batch is trained for.

    Attributes:
        options: The policy loss.
        correction: How the sampler is corrected for; None leaves it uncorrected.
        max_completion_length: The constant "dr_grpo" divides by.
        entropy_coef: Weight of the entropy bonus in this optimizer step; None has no bonus.
        top_entropy_quantile: Share of the tokens, by entropy, in the policy term and the bonus.
    """

    options: PolicyOptions
    correction: Correction | None = None
    max_completion_length: int
    entropy_coef: float | None = None
    top_entropy_quantile: float = 1.0


def row_weights(
    lengths_B: Tensor,
    *,
    objective: Objective,
    num_items_per_process: Tensor | None,
    accumulation: float,
    windows: float,
) -> Tensor:
    """What one token of each row weighs in the loss, fixed before the forward pass. [B] fp32.

    Args:
        lengths_B: [B], tokens of each row in the loss; a fully masked row still counts as a row.
        objective: The loss type.
        num_items_per_process: 0-dim, tokens in the loss of the whole generation batch, over the number of processes;
            `dapo`, `cispo` and `vespo` need it.
        accumulation: Micro-batches of this optimizer step (1 in evaluation).
        windows: `dapo`, `cispo` and `vespo`: optimizer steps that share the generation batch, inverted: accumulation
            over micro-batches a generation (1 in evaluation).
    """
    return normalisers.row_weights(
        lengths_B,
        loss_type=objective.options.loss_type,
        accumulation=accumulation,
        num_items_per_process=num_items_per_process,
        windows=windows,
        max_completion_length=objective.max_completion_length,
    )


@dataclass(frozen=True, kw_only=True)
class Bonus:
    """The entropy bonus: what a token's entropy weighs, and the entropy that lets a token in.

    Attributes:
        weight: [B] fp32 or None: `entropy_coef` over the tokens of the row's micro-batch that count and the
            accumulation; None has no bonus.
        threshold: 0-dim fp32 or None: tokens of a smaller entropy lose their policy term and their bonus.
    """

    weight: Tensor | None = None
    threshold: Tensor | None = None


class RowsLoss:
    """The share of some rows in the micro-batch's loss, and in the metrics."""

    def __init__(
        self,
        rows_N: Tensor,
        columns_N: Tensor,
        row_lengths: tuple[int, ...],
        inputs: dict[str, Tensor],
        *,
        weights_B: Tensor,
        objective: Objective,
        bonus: Bonus,
    ) -> None:
        """Gather the rows' tokens from the padded micro-batch.

        Args:
            rows_N: [N] int64, ascending, the row of the micro-batch each token comes from; whole rows only.
            columns_N: [N] int64, its column.
            row_lengths: How many of the tokens each row has, on the host.
            inputs: `advantages` [B] or [B, C], and where given `old_per_token_logps`, `ref_per_token_logps`,
                `sampling_per_token_logps` [B, C] and `importance_sampling_ratio` [B, C] or [B, 1].
            weights_B: [B] fp32 from `row_weights`.
            objective: The settings.
            bonus: The entropy terms.
        """

        def tokens(name: str) -> Tensor | None:
            values = inputs.get(name)
            if values is None or values.dim() == 1:
                return values if values is None else values[rows_N]
            return values[rows_N, 0] if values.shape[1] == 1 else values[rows_N, columns_N]

        self.objective, self.bonus = objective, bonus
        self.runs = Runs.of(row_lengths, rows_N.device)
        self.compares_sampler = compares_sampler(objective, inputs)
        options = objective.options
        self.sampling_N = tokens("sampling_per_token_logps")
        self.given_ratio_N = tokens("importance_sampling_ratio") if objective.correction is not None else None
        advantages_N = tokens("advantages")
        assert advantages_N is not None
        self.has_row_advantages = inputs["advantages"].dim() == 1
        self.tokens = Tokens(
            advantages=advantages_N,
            weights=weights_B[rows_N],
            old_logps=tokens("old_per_token_logps"),
            ref_logps=tokens("ref_per_token_logps") if options.beta else None,
            sampling_logps=self.sampling_N if options.off_policy_mask_threshold is not None else None,
            sequence_ids=rows_N if options.needs_sequences else None,
            entropy_weights=None if bonus.weight is None else bonus.weight[rows_N],
            entropy_threshold=bonus.threshold,
        )
        self.tokens.check(options)

    @property
    def needs_whole_rows(self) -> bool:
        """A token's loss depends on the other tokens of its row."""
        correction = self.objective.correction
        weighs_rows = correction is not None and correction.weighs_rows and self.given_ratio_N is None
        return self.objective.options.needs_sequences or weighs_rows

    def of_rows(self, logps: Tensor, entropies: Tensor, some: slice) -> PolicyLoss:
        """The terms of a slice of the N tokens, with their slopes and without a graph."""
        return run_policy_loss(logps, self._tokens(logps, some), self.objective.options, entropies=entropies)

    def differentiable(self, logps_N: Tensor, entropies_N: Tensor) -> PolicyLoss:
        """The terms of all tokens; `loss` is differentiable in the log-probs, and in the entropies with a bonus."""
        tokens = self._tokens(logps_N, slice(0, logps_N.numel()))
        entropies = entropies_N if tokens.needs_entropies else None
        return policy_loss_of(logps_N, tokens, self.objective.options, entropies=entropies)

    @torch.no_grad()
    def stats(self, logps_N: Tensor, entropies_N: Tensor, terms: PolicyLoss) -> Stats:
        """These rows' share of the metrics."""
        stats = Stats.empty(entropies_N.device)
        if entropies_N.numel() == 0:
            return stats
        self._add_terms(stats, terms)
        self._add_entropies(stats, entropies_N, terms)
        if self.compares_sampler:
            log_ratios_N = self._log_ratios(logps_N, slice(0, logps_N.numel()))
            _add_sampler(stats, log_ratios_N, self.runs, self.objective.correction)
        return stats

    def _tokens(self, logps: Tensor, some: slice) -> Tokens:
        tokens, correction = self.tokens.rows(some), self.objective.correction
        if correction is None:
            return tokens
        if self.given_ratio_N is not None:
            return replace(tokens, sampling_weights=self.given_ratio_N[some])
        if self.sampling_N is None:
            return tokens
        # a slice of whole rows
        sampler = sampler_weights(self._log_ratios(logps, some), self.runs, correction, some)
        return replace(tokens, sampling_weights=sampler.weights)

    def _log_ratios(self, logps: Tensor, some: slice) -> Tensor:
        """Of trainer's over sampler's probability, for a slice of the N tokens."""
        assert self.sampling_N is not None
        old = logps if self.tokens.old_logps is None else self.tokens.old_logps[some]
        return old.detach() - self.sampling_N[some]

    def _add_terms(self, stats: Stats, terms: PolicyLoss) -> None:
        """KL, clipped shares and VESPO's weight: by token, or by row where one value holds for the whole row."""
        low_N, high_N = terms.is_low_clipped.float(), terms.is_high_clipped.float()
        counts = self.runs.lengths
        low_R, high_R = (self.runs.sums(flags) / counts for flags in (low_N, high_N))
        if self.objective.options.is_sequence_level and self.has_row_advantages:
            low_N, high_N = low_R, high_R
        stats.add(kl=0.0 if terms.kl is None else terms.kl.sum(), low=low_N.sum(), high=high_N.sum())
        stats.add(flags=low_N.numel())
        stats.at_least(low=(-low_R).amax(), high=high_R.amax())
        if terms.phi is not None:
            phi = terms.phi
            if self.has_row_advantages:
                phi = self.runs.sums(phi) / counts
            stats.add(phi=phi.sum(), phis=phi.numel())

    def _add_entropies(self, stats: Stats, entropies_N: Tensor, terms: PolicyLoss) -> None:
        stats.add(tokens=entropies_N.numel(), entropy=entropies_N.sum(), policy=terms.loss.sum())
        threshold, weights_N = self.bonus.threshold, self.tokens.entropy_weights
        is_counted = torch.ones_like(entropies_N) if threshold is None else (entropies_N >= threshold).float()
        stats.add(bonus_entropy=(entropies_N * is_counted).sum(), bonus_tokens=is_counted.sum())
        if weights_N is not None:
            stats.add(policy=(weights_N * entropies_N * is_counted).sum())


def compares_sampler(objective: Objective, inputs: dict[str, Tensor]) -> bool:
    """Whether a micro-batch's loss pass compares the policy with the sampler: if it can, and nothing has before."""
    before = "old_per_token_logps" if objective.correction is None else "importance_sampling_ratio"
    return "sampling_per_token_logps" in inputs and before not in inputs


def _add_sampler(stats: Stats, log_ratios_N: Tensor, runs: Runs, correction: Correction | None) -> None:
    stats.log_ratios.append(log_ratios_N)
    if correction is not None:
        sampler = sampler_weights(log_ratios_N, runs, correction)
        stats.add(ratio=sampler.ratios.sum(), ratios=sampler.ratios.numel(), unclipped_ratio=sampler.unclipped.sum())
        stats.at_least(low_ratio=(-sampler.ratios).amax(), ratio=sampler.ratios.amax())


def base_stats(objective: Objective, inputs: dict[str, Tensor], mask_BC: Tensor) -> Stats:
    """What a micro-batch's rows without a token in the loss add where a metric counts rows.

    Their ratio and their weights are 1, and nothing is clipped.

    Args:
        objective: The settings.
        inputs: The padded micro-batch.
        mask_BC: [B, C], the tokens in the loss.
    """
    stats = Stats.empty(mask_BC.device)
    num_rows = (mask_BC.sum(1) == 0).sum()
    zero_if_any = torch.where(num_rows > 0, 0.0, -math.inf)
    if inputs["advantages"].dim() == 1:
        if objective.options.is_sequence_level:
            stats.add(flags=num_rows)
            stats.at_least(low=zero_if_any, high=zero_if_any)
        stats.add(phi=num_rows, phis=num_rows)
    if compares_sampler(objective, inputs):
        _add_unweighed_rows(stats, objective.correction, num_rows)
    return stats


def _add_unweighed_rows(stats: Stats, correction: Correction | None, num_rows: Tensor) -> None:
    """Rows without a token in the loss: where rows are weighed, their ratio is 1."""
    stats.add(samplers=1)
    if correction is not None and correction.weighs_rows:
        weight = correction.bounded(torch.ones((), device=num_rows.device))
        is_any = torch.where(num_rows > 0, 0.0, -math.inf)
        stats.add(ratio=num_rows * weight, ratios=num_rows, unclipped_ratio=num_rows)
        stats.at_least(low_ratio=is_any - weight, ratio=is_any + weight)


def weigh_sampler(
    batch: dict[str, Tensor], mask_BC: Tensor, correction: Correction | None
) -> tuple[Tensor | None, Stats]:
    """The sampler's importance weights of a whole padded batch, before any loss pass.

    Args:
        batch: `old_per_token_logps` and `sampling_per_token_logps` [B, C].
        mask_BC: [B, C], the tokens in the loss.
        correction: Mode and bounds; None compares without weighing.

    Returns:
        `importance_sampling_ratio`, [B, 1] where rows are weighed, else [B, C]; and what the metrics need.
    """
    rows, columns = mask_BC.nonzero(as_tuple=True)
    runs = Runs.of(tuple(length for length in mask_BC.sum(1).tolist() if length), mask_BC.device)
    log_ratios = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[rows, columns]
    stats = Stats.empty(mask_BC.device)
    _add_unweighed_rows(stats, correction, (mask_BC.sum(1) == 0).sum())
    if rows.numel():
        _add_sampler(stats, log_ratios, runs, correction)
    if correction is None:
        return None, stats
    ratio = correction.bounded(torch.ones(mask_BC.shape, device=mask_BC.device))
    ratio = ratio.index_put((rows, columns), sampler_weights(log_ratios, runs, correction).weights)
    if correction.weighs_rows:
        # without a column, as of nothing but empty completions, there is nothing to weigh
        columns = mask_BC.int().argmax(1, keepdim=True) if mask_BC.shape[1] else mask_BC.long()
        ratio = ratio.gather(1, columns)
    return ratio, stats


def off_policy_mask(
    advantages: Tensor, logps_BC: Tensor, sampling_logps_BC: Tensor, mask_BC: Tensor, threshold: float
) -> Tensor:
    """Rows that stay in the policy loss (arXiv:2512.02556): good ones, and those the policy has not moved far from.

    Args:
        advantages: [B, 1] or [B, C].
        logps_BC: [B, C], the current policy.
        sampling_logps_BC: [B, C], the policy that sampled; NaN counts as no difference.
        mask_BC: [B, C], the tokens in the loss.
        threshold: Largest mean difference of a row with a negative advantage.

    Returns:
        [B, 1] or [B, C], 1 or 0 in the mask's dtype.
    """
    drift = (sampling_logps_BC - logps_BC.detach()).nan_to_num(nan=0.0) * mask_BC
    mean_drift = drift.sum(1, keepdim=True) / mask_BC.sum(1, keepdim=True).clamp(min=1)
    return ((advantages >= 0) | (mean_drift <= threshold)).to(mask_BC.dtype)


def gamma_weights(
    advantages: Tensor,
    log_ratio_BC: Tensor,
    mask_BC: Tensor,
    sampling_weights_BC: Tensor | None,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Tensor:
    """VESPO's weight of each row.

    Args:
        advantages: [B, 1] or [B, C].
        log_ratio_BC: [B, C], log of the current over the old policy's probability.
        mask_BC: [B, C], the tokens in the loss.
        sampling_weights_BC: [B, C] or None.
        k_pos: `vespo_k_pos`.
        lambda_pos: `vespo_lambda_pos`.
        k_neg: `vespo_k_neg`.
        lambda_neg: `vespo_lambda_neg`.

    Returns:
        [B, C], detached; 1 where masked.
    """
    rows, columns = mask_BC.nonzero(as_tuple=True)
    log_ratio_N = log_ratio_BC.detach()[rows, columns]
    terms = policy_loss(
        log_ratio_N,
        advantages.expand_as(log_ratio_BC)[rows, columns].to(log_ratio_N.dtype),
        weights=torch.ones_like(log_ratio_N),
        old_logps=torch.zeros_like(log_ratio_N),
        sampling_weights=None if sampling_weights_BC is None else sampling_weights_BC[rows, columns],
        sequence_ids=rows,
        loss_type="vespo",
        vespo_k_pos=k_pos,
        vespo_lambda_pos=lambda_pos,
        vespo_k_neg=k_neg,
        vespo_lambda_neg=lambda_neg,
    )
    assert terms.phi is not None
    return torch.ones_like(log_ratio_BC).index_put((rows, columns), terms.phi)
