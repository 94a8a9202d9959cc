"""What a policy loss is told beside the log-probs: its scalars, and its tensors of one value a token.

Shapes: N = tokens, all sequences one after the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.checks import check_device, check_positive, check_tokens, describe
from grpo_kernels.rows import cut

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED_LOSSES, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")

# bounds on log-ratios and log-weights inside VESPO's weight
MIN_LOG_WEIGHT = math.log(1e-8)
MAX_LOG_WEIGHT = 20.0

# TRL raises a smaller VESPO lambda to this value; here it is refused
MIN_LAMBDA = 1e-4


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The scalars of the policy loss, in TRL's names and with its defaults; checked when made.

    Attributes:
        loss_type: One of `LOSS_TYPES`. "grpo", "bnpo", "dr_grpo", "dapo" and "luspo" differ only in their normaliser.
        importance_sampling_level: "token", or "sequence" for one ratio a sequence, exp of the mean log-ratio (GSPO).
            "vespo" has its own weight per sequence; there the level decides the ratio of the bias-corrected KL only.
        epsilon_low: The ratio is clipped below at `1 - epsilon_low`; not read by "cispo", "sapo" and "vespo".
        epsilon_high: The ratio is clipped above at `1 + epsilon_high`, for "cispo" at `epsilon_high` itself; not read
            by "sapo" and "vespo".
        delta: Upper bound of the unclipped branch's ratio (the two-sided clip), or None; the clipped losses only.
        beta: Weight of the KL penalty; 0 means there is none.
        kl_estimator: "k1", "k2" or "k3" (TRL's).
        bias_correction_kl: Multiply the KL by the ratio, with the ratio's gradient.
        sapo_temperature_pos: Temperature of "sapo" where the advantage is positive.
        sapo_temperature_neg: The same where it is not.
        vespo_k_pos: Exponent of "vespo" where the advantage is not negative.
        vespo_lambda_pos: Rate of "vespo" there.
        vespo_k_neg: Exponent of "vespo" where the advantage is negative.
        vespo_lambda_neg: Rate of "vespo" there.
        off_policy_mask_threshold: Drop the policy term of tokens with a negative advantage in sequences whose mean
            `sampling_logps - logps` exceeds it; None keeps all.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None

    def __post_init__(self) -> None:
        _check_choice("loss_type", self.loss_type, LOSS_TYPES)
        _check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        _check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_positive(
            delta=self.delta,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
        )
        _check_at_least(0.0, epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high)
        _check_at_least(MIN_LAMBDA, vespo_lambda_pos=self.vespo_lambda_pos, vespo_lambda_neg=self.vespo_lambda_neg)
        for name in ("beta", "vespo_k_pos", "vespo_k_neg", "off_policy_mask_threshold"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.delta is not None and not self.is_clipped:
            raise ValueError(
                f"delta is read only by loss_type {', '.join(CLIPPED_LOSSES)}, "
                f"but delta={self.delta} came with loss_type={self.loss_type!r}"
            )

    @property
    def is_clipped(self) -> bool:
        """The loss is PPO's clipped surrogate."""
        return self.loss_type in CLIPPED_LOSSES

    @property
    def is_sequence_level(self) -> bool:
        """The ratio is the sequence's, not the token's."""
        return self.importance_sampling_level == "sequence"

    @property
    def needs_sequences(self) -> bool:
        """A token's loss depends on its whole sequence, so `sequence_ids` are needed and sequences must be whole."""
        return self.is_sequence_level or self.loss_type == "vespo" or self.off_policy_mask_threshold is not None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tensors of the policy loss beside the log-probs: [N] and, but for the ids, like the log-probs in dtype.

    Attributes:
        advantages: The group-relative advantage, repeated over its tokens or one a token.
        weights: What a token weighs in the scalar loss, from `row_weights`.
        old_logps: The policy the clip range is centred on; None means the current one.
        ref_logps: The reference policy; given exactly when beta is not 0.
        sampling_weights: Importance weights that correct for the sampler.
        sampling_logps: What the sampler reported, NaN where it did not; read by the off-policy mask only.
        sequence_ids: int64, non-decreasing: tokens of one sequence share an id.
        entropy_weights: What a token's entropy weighs in the bonus that is subtracted from the loss.
        entropy_threshold: 0-dim; tokens of a smaller entropy lose their policy term and their bonus.
    """

    advantages: Tensor
    weights: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    sampling_weights: Tensor | None = None
    sampling_logps: Tensor | None = None
    sequence_ids: Tensor | None = None
    entropy_weights: Tensor | None = None
    entropy_threshold: Tensor | None = None

    def contiguous(self) -> Tokens:
        """The same in memory that a kernel reads element by element."""
        return self._each(Tensor.contiguous)

    def clone(self) -> Tokens:
        """Copies."""
        return self._each(Tensor.clone)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: function(t) for name, t in given.items() if t is not None})

    def rows(self, rows: slice) -> Tokens:
        """The tokens of a slice; views."""
        return cut(self, rows)

    @property
    def needs_entropies(self) -> bool:
        """The loss reads the tokens' entropies."""
        return self.entropy_weights is not None or self.entropy_threshold is not None

    def check(self, options: PolicyOptions, *, logps: Tensor | None = None) -> None:
        """Refuse tensors that do not fit each other, `logps` where given, or the options.

        On an accelerator the order of the ids is not checked: reading it would wait for the device.
        """
        check_tokens(
            logps_N=logps,
            advantages_N=self.advantages,
            weights=self.weights,
            old_logps=self.old_logps,
            ref_logps=self.ref_logps,
            sampling_weights=self.sampling_weights,
            sampling_logps=self.sampling_logps,
            entropy_weights=self.entropy_weights,
        )
        if (options.beta != 0.0) != (self.ref_logps is not None):
            given = "was not given" if self.ref_logps is None else "was given"
            raise ValueError(
                f"ref_logps is needed exactly when beta is not 0, but beta={options.beta} and ref_logps {given}"
            )
        if self.sampling_logps is not None and options.off_policy_mask_threshold is None:
            raise ValueError("sampling_logps is read only with off_policy_mask_threshold, which was not given")
        threshold = self.entropy_threshold
        if threshold is not None:
            if threshold.ndim != 0 or threshold.dtype != self.advantages.dtype:
                raise ValueError(f"entropy_threshold must be [] {self.advantages.dtype}, got {describe(threshold)}")
            check_device(advantages_N=self.advantages, entropy_threshold=threshold)
        self._check_sequences(options)

    def _check_sequences(self, options: PolicyOptions) -> None:
        ids, N = self.sequence_ids, self.advantages.numel()
        if ids is None:
            if options.needs_sequences:
                raise ValueError(
                    f"sequence_ids is needed by loss_type={options.loss_type!r}, importance_sampling_level="
                    f"{options.importance_sampling_level!r}, off_policy_mask_threshold="
                    f"{options.off_policy_mask_threshold}, and was not given"
                )
            return
        if ids.shape != (N,) or ids.dtype != torch.int64:
            raise ValueError(f"sequence_ids must be [{N}] torch.int64, got {describe(ids)}")
        check_device(advantages_N=self.advantages, sequence_ids=ids)
        if ids.device.type == "cpu" and (ids[1:] < ids[:-1]).any():
            raise ValueError("sequence_ids must be non-decreasing, got ids that fall")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_at_least(bound: float, **values: float) -> None:
    for name, value in values.items():
        if not (value >= bound and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and at least {bound:g}, got {value}")
