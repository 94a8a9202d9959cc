"""What the steps of a recorded run should have come to: loss and gradients of each from the padded float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.composition_cases import EOS, MAX_COMPLETION, Case, Row
from tests.composition_runs import CLIP_MAX, CLIP_MIN, Key, Run, Weights, make_oracle_model, sampled_logps
from tests.padded_loss import Inputs, Loss, Settings, padded_loss
from tests.padded_oracle import Padded, PaddedPolicy

# of an entropy to the quantile; fp32 is off by less
CLOSEST = 1e-5


@dataclass(frozen=True)
class Truth:
    """An optimizer step: its loss with the size of its terms, and every gradient, in float64."""

    loss: float
    size: float
    gradients: Weights


@dataclass(frozen=True)
class _MicroBatch:
    padded: Padded
    inputs: Inputs


def settings_of(case: Case) -> Settings:
    return Settings(
        loss_type=case.loss_type,
        importance_sampling_level=case.importance_sampling_level,
        epsilon_low=case.epsilons[0],
        epsilon_high=case.epsilons[1],
        delta=case.delta,
        beta=case.beta,
        use_bias_correction_kl=case.kl == "bias-corrected",
        off_policy_mask_threshold=case.off_policy_mask_threshold,
        importance_mode=case.importance_mode,
        clip_min=CLIP_MIN,
        clip_max=CLIP_MAX,
        max_completion_length=MAX_COMPLETION,
        entropy_coef=case.entropy_coef,
        router_aux_loss_coef=case.aux_loss_coef or 0.0,
    )


class Oracle:
    """The truth about a case's run, from the records of all its processes; in fp32 what plain PyTorch makes of it."""

    def __init__(self, case: Case, runs: list[Run], *, dtype: torch.dtype = torch.float64) -> None:
        self.case, self.runs, self.settings = case, runs, settings_of(case)
        self.policy = PaddedPolicy(make_oracle_model(case), runs[0].initial, dtype=dtype)
        self.ref_logps = self._logps(runs[0].initial, is_reference=True) if case.beta else {}
        # the logps of all rows under the weights that generated: by the step that did
        self.old_logps = {step: self._logps(runs[0].steps[step].weights) for step, _ in runs[0].rollouts}
        self.sampling_logps: dict[Key, list[float | None]] = {}
        if case.reports_logps:
            logps = self.old_logps[0]
            self.sampling_logps = {key: sampled_logps(logps[key], row.noise) for key, row in case.rows.items()}

    def _logps(self, weights: Weights, *, is_reference: bool = False) -> dict[Key, list[float]]:
        self.policy.load(weights)
        # a new adapter is no part of its reference; a trained one is, as it came
        if is_reference and self.case.tuning == "new adapter":
            with self.policy.without_adapter():
                return self._logps_of_rows()
        return self._logps_of_rows()

    def _logps_of_rows(self) -> dict[Key, list[float]]:
        return self.policy.logps_of(self.case.rows, temperature=self.case.temperature)

    def step(self, i: int) -> Truth:
        """The i-th optimizer step: mean over the processes of the sum over their micro-batches."""
        case = self.case
        self.policy.load(self.runs[0].steps[i].weights)
        self.policy.model.zero_grad(set_to_none=True)
        loss, size = 0.0, 0.0
        for micro_batches in zip(*(run.steps[i].micro_batches for run in self.runs), strict=True):
            rollout = self._rollout_of(micro_batches)
            accumulation = len(self.runs[0].steps[i].micro_batches)
            parts = [self._micro_batch(keys, rollout, accumulation) for keys in micro_batches]
            for part in self._losses(parts):
                (part.value / case.processes).backward()
                loss, size = loss + part.value.item() / case.processes, size + part.size.item() / case.processes
        trained = {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
        return Truth(loss, size, gradients)

    def _losses(self, parts: list[_MicroBatch]) -> Iterable[Loss]:
        """Of one micro-batch in every process: the entropy quantile is of all of them."""
        scored = [self.policy.score(part.padded, self.case.temperature) for part in parts]
        threshold = -math.inf
        if self.case.top_entropy_quantile < 1:
            entropies = torch.cat([e[part.inputs.mask] for part, (_, e, _) in zip(parts, scored, strict=True)])
            if entropies.numel():
                threshold = torch.quantile(entropies.detach(), 1 - self.case.top_entropy_quantile).item()
                gap = (entropies.detach() - threshold).abs().min()
                assert entropies.numel() == 1 or gap > CLOSEST, "rounding decides which tokens count"
        for part, (logps, entropies, aux_loss) in zip(parts, scored, strict=True):
            inputs = replace(part.inputs, entropy_threshold=threshold)
            yield padded_loss(logps, entropies, aux_loss, inputs, self.settings)

    def _rollout_of(self, micro_batches: tuple[list[Key], ...]) -> int:
        """Which generation has the rows of a micro-batch of every process."""
        pairs = [*zip(self.runs, micro_batches, strict=True)]
        every = range(len(self.runs[0].rollouts))
        (rollout,) = [i for i in every if all(set(keys) <= set(run.rollouts[i][1]) for run, keys in pairs)]
        return rollout

    def _micro_batch(self, keys: list[Key], rollout: int, accumulation: int) -> _MicroBatch:
        case = self.case
        rows = [case.rows[key] for key in keys]
        padded = Padded.of([row.prompt for row in rows], [row.completion for row in rows], [*map(self.is_kept, rows)])
        length = padded.is_scored.shape[1]
        old_logps = self.old_logps[self.runs[0].rollouts[rollout][0]]
        is_reported = bool(self.sampling_logps)

        def laid_out(values: dict[Key, list[float]] | dict[Key, list[float | None]]) -> Tensor:
            return right_padded([values[key] for key in keys], length).to(self.policy.dtype)

        env_mask = right_padded([row.env_mask for row in rows], length).bool()
        return _MicroBatch(
            padded,
            Inputs(
                mask=padded.is_scored & env_mask,
                advantages=torch.tensor([[row.advantage] for row in rows], dtype=self.policy.dtype),
                old_logps=laid_out(old_logps),
                ref_logps=laid_out(self.ref_logps) if self.ref_logps else None,
                sampling_logps=laid_out(self.sampling_logps) if is_reported else None,
                num_items=self._num_items(rollout) / case.processes,
                accumulation=accumulation,
                steps_per_generation=case.steps_per_generation,
            ),
        )

    def _num_items(self, rollout: int) -> int:
        rows = [self.case.rows[key] for run in self.runs for key in run.rollouts[rollout][1]]
        return max(1, sum(sum(row.env_mask) for row in rows if self.is_kept(row)))

    def is_kept(self, row: Row) -> bool:
        """Whether a completion is trained on at all."""
        return not self.case.masks_truncated or row.completion[-1:] == (EOS,)


def right_padded(rows: Iterable[Iterable[float | None]], length: int) -> Tensor:
    """[rows, length] float64, NaN for None."""
    known = [[math.nan if value is None else value for value in row] for row in rows]
    return torch.tensor([row + [0.0] * (length - len(row)) for row in known], dtype=torch.float64)
