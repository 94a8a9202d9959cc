"""What the head's benches compare: a training step of an LM head with the GRPO loss, or scoring, by ours and by peers.

Shapes: N tokens in 8 sequences of equal length, D hidden width, V vocabulary.
Every trained provider computes the loss `-mean(min(ratio * A, clip(ratio) * A))` with `ratio = exp(logp - logp)`, as in
the first step on a batch, and the gradients of hidden states and weight. Packages are imported where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.provider import Provider

NUM_SEQUENCES = 8
EPSILON = 0.2
# width of TRL's vocabulary tile, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
TRL_COLUMNS = 32768

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "autocast": torch.float32}
DATA = ("peaked", "random")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One head and its tokens.

    Attributes:
        hidden: [N, D], a leaf that wants a gradient.
        weight: [V, D] likewise, unless it is frozen.
        targets: [N] int64.
        advantages: [8] fp32, one a sequence, of both signs.
        is_autocast: Whether the products are in bf16 of fp32 tensors.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    is_autocast: bool

    @property
    def token_advantages(self) -> Tensor:
        """[N] the advantage of each token."""
        return self.advantages.repeat_interleave(self.hidden.shape[0] // NUM_SEQUENCES)

    @property
    def weights(self) -> Tensor:
        """[N] fp32, what each token's loss is multiplied by: 1 / N."""
        N = self.hidden.shape[0]
        return torch.full((N,), 1 / N, device=self.hidden.device)

    def context(self) -> torch.autocast | nullcontext[None]:
        """The precision context of the forward pass."""
        return torch.autocast(self.hidden.device.type, torch.bfloat16) if self.is_autocast else nullcontext()

    def first_rows(self, rows: int) -> Problem:
        """The same head on the first `rows` tokens, with leaves of its own."""
        hidden = self.hidden.detach()[:rows].clone().requires_grad_()
        weight = self.weight.detach().requires_grad_(self.weight.requires_grad)
        return replace(self, hidden=hidden, weight=weight, targets=self.targets[:rows])


def make_problem(
    N: int, D: int, V: int, *, dtype: str, data: str, device: str, is_frozen: bool = False, seed: int = 0
) -> Problem:
    """Random inputs whose logits have a standard deviation near 1 apart from the targets'.

    "peaked" adds to each hidden state its target's direction, so long that the target's logit beats the sum of the
    others by 1.5 nat on average: log-probs of -0.3 in the mean, as a policy has. "random" leaves the targets at
    -log V. Timings of methods that skip small gradients depend on which it is.
    """
    if N % NUM_SEQUENCES:
        raise ValueError(f"N must be a multiple of {NUM_SEQUENCES}, got {N}")
    g = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(V, D, generator=g, device=device).mul_(D**-0.5)
    targets = torch.randint(V, (N,), generator=g, device=device)
    hidden = torch.randn(N, D, generator=g, device=device)
    if data == "peaked":
        length = math.log(V) + 0.5 + 1.5
        hidden += length * F.normalize(weight[targets], dim=1)
    advantages = torch.linspace(-1.5, 1.5, NUM_SEQUENCES, device=device)
    return Problem(
        hidden=hidden.to(DTYPES[dtype]).requires_grad_(),
        weight=weight.to(DTYPES[dtype]).requires_grad_(not is_frozen),
        targets=targets,
        advantages=advantages,
        is_autocast=dtype == "autocast",
    )


def clipped_loss(logps: Tensor, advantages: Tensor) -> Tensor:
    """The loss as a trainer in plain torch writes it."""
    ratio = torch.exp(logps - logps.detach())
    bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -torch.min(ratio * advantages, bounded * advantages).mean()


def _ours(problem: Problem, *, weight_grad: Tensor | None = None, candidate: str | None = None) -> Tensor:
    from grpo_kernels import linear_policy_loss

    with problem.context():
        out = linear_policy_loss(
            problem.hidden,
            problem.weight,
            problem.targets,
            problem.token_advantages,
            weights=problem.weights,
            weight_grad=weight_grad,
            candidate=candidate,
        )
    out.loss.backward()
    return out.logps


def _ours_accumulating(problem: Problem) -> Tensor:
    return _ours(problem, weight_grad=problem.weight.grad)


def _ours_fused(problem: Problem) -> Tensor:
    return _ours(problem, candidate="fused")


def _ours_two_calls(problem: Problem) -> Tensor:
    from grpo_kernels import linear_logps, policy_loss

    with problem.context():
        logps, _ = linear_logps(problem.hidden, problem.weight, problem.targets, return_entropy=True)
    policy_loss(logps, problem.token_advantages, weights=problem.weights).loss.sum().backward()
    return logps.detach()


@torch.no_grad()
def _ours_scoring(problem: Problem, *, candidate: str | None = None) -> Tensor:
    from grpo_kernels import linear_logps

    with problem.context():
        logps, _ = linear_logps(
            problem.hidden, problem.weight, problem.targets, return_entropy=True, candidate=candidate
        )
    return logps


def _ours_scoring_fused(problem: Problem) -> Tensor:
    return _ours_scoring(problem, candidate="fused")


# what TRL's GRPOTrainer asks of its head, as ours computes
TRL_OUTPUTS = ("log_probs", "entropy")


def _trl_logps(problem: Problem, outputs: tuple[str, ...] = TRL_OUTPUTS) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    with problem.context():
        # the arguments of trl.trainer.utils.add_fused_lm_head
        logps, *_ = ChunkedLogProbFunction.apply(
            problem.hidden, problem.weight, None, problem.targets, 1.0, TRL_COLUMNS, None, 1.0, outputs
        )
    return logps


def _trl(problem: Problem, outputs: tuple[str, ...] = TRL_OUTPUTS) -> Tensor:
    logps = _trl_logps(problem, outputs)
    clipped_loss(logps, problem.token_advantages).backward()
    return logps.detach()


def _trl_without_entropy(problem: Problem) -> Tensor:
    return _trl(problem, ("log_probs",))


@torch.no_grad()
def _trl_scoring(problem: Problem) -> Tensor:
    return _trl_logps(problem)


def _liger(problem: Problem) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    head = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON)
    N, D = problem.hidden.shape
    T = N // NUM_SEQUENCES
    mask = torch.ones(NUM_SEQUENCES, T, device=problem.hidden.device)
    with problem.context():
        loss, _ = head(
            problem.hidden.view(NUM_SEQUENCES, T, D),
            problem.weight,
            problem.targets.view(NUM_SEQUENCES, T),
            mask,
            problem.advantages,
        )
    loss.backward()


def _liger_tf32(problem: Problem) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        _liger(problem)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _target_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.log_softmax(logits, -1, dtype=torch.float32).gather(1, targets[:, None])[:, 0]


def _target_logps_and_entropies(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logps = F.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def _logits_loss(hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    logps = _target_logps(hidden, weight, targets)
    return clipped_loss(logps, advantages), logps.detach()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _logits(problem: Problem, function: Callable[..., Any] = _logits_loss) -> Tensor:
    with problem.context():
        loss, logps = function(problem.hidden, problem.weight, problem.targets, problem.token_advantages)
    loss.backward()
    return logps


def _compiled_logits(problem: Problem) -> Tensor:
    return _logits(problem, _compiled(_logits_loss))


@torch.no_grad()
def _logits_scoring(problem: Problem, function: Callable[..., Any] = _target_logps_and_entropies) -> Tensor:
    with problem.context():
        logps, _ = function(problem.hidden, problem.weight, problem.targets)
    return logps


def _compiled_scoring(problem: Problem) -> Tensor:
    return _logits_scoring(problem, _compiled(_target_logps_and_entropies))


def _cce_logps(problem: Problem, **options: Any) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    with problem.context():
        nll = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction="none", impl="cce", **options
        )
    return -nll.float()


def _cce(problem: Problem, **options: Any) -> Tensor:
    logps = _cce_logps(problem, **options)
    clipped_loss(logps, problem.token_advantages).backward()
    return logps.detach()


def _cce_exact(problem: Problem) -> Tensor:
    # nothing is left out of the gradients
    return _cce(problem, filter_eps=None)


@torch.no_grad()
def _cce_scoring(problem: Problem) -> Tensor:
    return _cce_logps(problem)


def _operands(problem: Problem) -> tuple[Tensor, Tensor]:
    dtype = torch.bfloat16 if problem.is_autocast else problem.hidden.dtype
    return problem.hidden.detach().to(dtype), problem.weight.detach().to(dtype)


def _floor(problem: Problem) -> None:
    hidden, weight = _operands(problem)
    plane = torch.mm(hidden, weight.t())
    torch.mm(plane, weight)
    if problem.weight.requires_grad:
        torch.mm(plane.t(), hidden)


def _floor_scoring(problem: Problem) -> None:
    hidden, weight = _operands(problem)
    torch.mm(hidden, weight.t())


TRAINING = {
    provider.label: provider
    for provider in (
        Provider(label="ours", step=_ours),
        Provider(label="ours-accumulating", step=_ours_accumulating, accumulates=True, asked_on_cpu=True),
        Provider(label="ours-fused", step=_ours_fused, cuda_only=True),
        Provider(label="ours-two-calls", step=_ours_two_calls, asked_on_cpu=True),
        Provider(label="trl", step=_trl, package="trl"),
        Provider(label="trl-no-entropy", step=_trl_without_entropy, package="trl", asked_on_cpu=True),
        Provider(label="liger", step=_liger, package="liger_kernel"),
        Provider(label="liger-tf32", step=_liger_tf32, package="liger_kernel", cuda_only=True),
        Provider(label="cce", step=_cce, package="cut_cross_entropy", cuda_only=True),
        Provider(label="cce-exact", step=_cce_exact, package="cut_cross_entropy", cuda_only=True),
        Provider(label="compile", step=_compiled_logits, package="torch"),
        Provider(label="logits", step=_logits, package="torch"),
        Provider(label="floor", step=_floor, package="torch", is_floor=True),
    )
}
SCORING = {
    provider.label: provider
    for provider in (
        Provider(label="ours", step=_ours_scoring, trains=False),
        Provider(label="ours-fused", step=_ours_scoring_fused, cuda_only=True, trains=False),
        Provider(label="trl", step=_trl_scoring, package="trl", trains=False),
        Provider(label="cce", step=_cce_scoring, package="cut_cross_entropy", cuda_only=True, trains=False),
        Provider(label="compile", step=_compiled_scoring, package="torch", trains=False),
        Provider(label="logits", step=_logits_scoring, package="torch", trains=False),
        Provider(label="floor", step=_floor_scoring, package="torch", is_floor=True, trains=False),
    )
}


def clear(problem: Problem, provider: Provider) -> None:
    """Take the gradients of the last step away, or zero the one that is added to."""
    problem.hidden.grad = None
    if not provider.accumulates:
        problem.weight.grad = None
    elif problem.weight.grad is None:
        problem.weight.grad = torch.zeros_like(problem.weight)
    else:
        problem.weight.grad.zero_()


@dataclass(frozen=True)
class Exact:
    """Log-probs [N] and gradients of one problem in float64."""

    logps: Tensor
    dhidden: Tensor
    dweight: Tensor

    @staticmethod
    def of(problem: Problem) -> Exact:
        """The closed form, on the operands as the products see them (rounded to bf16 under autocast)."""
        hidden, weight = (operand.double() for operand in _operands(problem))
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        all_logps = torch.log_softmax(hidden @ weight.t(), -1)
        logps = all_logps[rows, problem.targets]
        # d loss / d logit_j = A / N * (p_j - [j is the target])
        slopes = all_logps.exp_()
        slopes[rows, problem.targets] -= 1
        slopes *= problem.token_advantages.double()[:, None] / hidden.shape[0]
        return Exact(logps=logps, dhidden=slopes @ weight, dweight=slopes.t() @ hidden)


def errors(problem: Problem, logps: Tensor | None, exact: Exact | None = None) -> dict[str, float]:
    """Largest absolute error of the log-probs, and the gradients' errors relative to their norms.

    Args:
        problem: After a step on it; its leaves hold the gradients, or None after scoring.
        logps: What the step returned.
        exact: The truth of the problem, computed if not given.
    """
    exact = exact or Exact.of(problem)
    found = {}
    if logps is not None:
        found["logps_max"] = float((logps.double() - exact.logps).abs().max())
        found["logps_mean"] = float((logps.double() - exact.logps).abs().mean())
    for name, grad, truth in (
        ("dhidden", problem.hidden.grad, exact.dhidden),
        ("dweight", problem.weight.grad, exact.dweight),
    ):
        if grad is not None:
            found[name] = float((grad.double() - truth).norm() / truth.norm())
    return found
