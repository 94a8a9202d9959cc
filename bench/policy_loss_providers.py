"""What the policy loss's bench compares: the clipped loss with a k3 KL penalty from log-probs, forward and backward.

Shapes: N tokens. Ratios lie well past the clip on both sides, advantages have both signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.provider import Provider, relative_error

EPSILON, BETA = 0.2, 0.04


@dataclass(frozen=True, kw_only=True)
class Problem:
    """[N] fp32 each: the policy's log-probs, a leaf that wants a gradient; what they are compared with; the weights."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor
    weights: Tensor


def make_problem(N: int, *, device: torch.device, seed: int = 0) -> Problem:
    """Log-probs between -3 and 0, the old and the reference policy's around them."""
    g = torch.Generator(device).manual_seed(seed)
    logps = -3 * torch.rand(N, generator=g, device=device)
    noise = torch.randn(3, N, generator=g, device=device)
    return Problem(
        logps=logps.clone().requires_grad_(),
        old_logps=logps + 0.3 * noise[0],
        ref_logps=logps + 0.3 * noise[1],
        advantages=noise[2].contiguous(),
        weights=torch.full((N,), 1 / N, device=device),
    )


def loss_of(problem: Problem) -> Tensor:
    """The loss as TRL's trainer writes it in plain torch, a scalar, in the problem's precision."""
    return _loss(problem.logps, problem.old_logps, problem.ref_logps, problem.advantages, problem.weights)


def _loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    ratio = torch.exp(logps - old_logps)
    bounded = torch.clamp(ratio, 1 - EPSILON, 1 + EPSILON)
    per_token = -torch.min(ratio * advantages, bounded * advantages)
    kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
    return ((per_token + BETA * kl) * weights).sum()


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_loss, dynamic=False)


def _ours(problem: Problem) -> Tensor:
    from grpo_kernels import policy_loss

    out = policy_loss(
        problem.logps,
        problem.advantages,
        weights=problem.weights,
        old_logps=problem.old_logps,
        ref_logps=problem.ref_logps,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        beta=BETA,
        bias_correction_kl=False,
    )
    return torch.autograd.grad(out.loss.sum(), problem.logps)[0]


def _eager(problem: Problem) -> Tensor:
    return torch.autograd.grad(loss_of(problem), problem.logps)[0]


def _compile(problem: Problem) -> Tensor:
    loss = _compiled()(problem.logps, problem.old_logps, problem.ref_logps, problem.advantages, problem.weights)
    return torch.autograd.grad(loss, problem.logps)[0]


def _nothing(problem: Problem) -> Any:
    raise AssertionError("this provider never runs")


PROVIDERS = {
    provider.label: provider
    for provider in (
        Provider(label="ours", step=_ours),
        Provider(label="trl", step=_eager, package="torch"),
        Provider(label="compile", step=_compile, package="torch"),
        Provider(label="liger", step=_nothing, unavailable="its stand-alone GRPO loss takes logits, not log-probs"),
    )
}


def exact_gradient(problem: Problem) -> Tensor:
    """[N] float64, d loss / d log-prob in closed form."""
    names = ("logps", "old_logps", "ref_logps", "advantages", "weights")
    logps, old, ref, advantages, weights = (getattr(problem, name).detach().double() for name in names)
    ratio = torch.exp(logps - old)
    gain, bounded = ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages
    is_inside = (ratio >= 1 - EPSILON) & (ratio <= 1 + EPSILON)
    slope = torch.where(is_inside | (gain < bounded), -gain, 0.0)
    return (slope + BETA * (1 - torch.exp(ref - logps))) * weights


def errors(problem: Problem, gradient: Tensor) -> dict[str, float]:
    """The gradient's error relative to its norm."""
    return {"dlogps": relative_error(gradient, exact_gradient(problem))}
