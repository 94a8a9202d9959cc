# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The policy loss and its slope in one pass over the tokens, or over each sequence.

Shapes: N = tokens, all sequences one after the other.
Source: kernels/README.md, "Policy loss".
Spec: `grpo_kernels.reference.policy_loss`; the slopes, which that leaves to autograd, are written out here. They agree
at ties too. Where exp(ref_logps - logps) overflows, a bias-corrected k3 keeps its finite slope here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.dispatch import exactly_on
from grpo_kernels.first_order import first_order
from grpo_kernels.options import LEVELS, MAX_LOG_WEIGHT, MIN_LOG_WEIGHT, PolicyOptions, Tokens
from grpo_kernels.policy_terms import PolicyLoss
from grpo_kernels.specimen import Specimen, specimen_of

# up to 60 B in and out per token and no reuse: bound by memory, nothing to tune
BLOCK_N = 512
NUM_WARPS = 4

FLOATS = (
    "low", "high", "delta", "beta", "temperature_pos", "temperature_neg",
    "k_pos", "lambda_pos", "k_neg", "lambda_neg", "threshold",
)  # fmt: skip

MIN_LOG_W = tl.constexpr(MIN_LOG_WEIGHT)
MAX_LOG_W = tl.constexpr(MAX_LOG_WEIGHT)
MAX_FLOAT = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _clamp(x, low, high):
    # a NaN passes both comparisons by, as through torch.clamp
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _clipped(ratio, advantages, low, high, delta):
    """The surrogate, its derivative in the ratio, and the ratio cut at delta."""
    bounded = tl.where(ratio > delta, delta, ratio)
    free = bounded * advantages
    clipped = _clamp(ratio, low, high) * advantages
    gain = tl.where((free <= clipped) | (free != free), free, clipped)
    is_inside = (ratio >= low) & (ratio <= high)
    # at a tie both branches have a slope, or neither has
    is_open = ((free <= clipped) & (ratio <= delta)) | ((free > clipped) & is_inside)
    return -gain, -advantages * tl.where(is_open, 1.0, 0.0), bounded


@triton.jit
def _soft_gated(ratio, advantages, temperature):
    """SAPO's surrogate and its derivative in the ratio."""
    x = temperature * (ratio - 1.0)
    # at most 1, so nothing overflows: sigmoid(x) sigmoid(-x) = e / (1 + e)^2 on both sides
    e = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    return -sigmoid * 4.0 / temperature * advantages, -4.0 * e / ((1.0 + e) * (1.0 + e)) * advantages


@triton.jit
def _kl(log_ratio, KL: tl.constexpr):
    """The estimate, its derivative in logp, and the sum of both: the derivative of estimate * ratio, over the ratio."""
    if KL == "k1":
        kl = -log_ratio
        slope = tl.zeros_like(log_ratio) + 1.0
        corrected = slope + kl
    elif KL == "k2":
        kl = 0.5 * log_ratio * log_ratio
        slope = -log_ratio
        corrected = slope + kl
    else:
        kl = tl.exp(log_ratio) - log_ratio - 1.0
        slope = 1.0 - tl.exp(log_ratio)
        # the exponentials of the sum cancel
        corrected = -log_ratio
    return kl, slope, corrected


@triton.jit
def _sequence_sums(
    begin, end, logps_ptr, old_logps_ptr, sampling_weights_ptr, sampling_logps_ptr,
    IS_VESPO: tl.constexpr, HAS_OFF_POLICY: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Means over a sequence of log(pi/pi_old) and log(sampler/pi), and VESPO's logarithm of its weight."""
    log_ratios = tl.zeros((BLOCK_N,), dtype=tl.float32)
    log_weights = tl.zeros((BLOCK_N,), dtype=tl.float32)
    off_policies = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        mask = offs < end
        logps = tl.load(logps_ptr + offs, mask=mask, other=0.0)
        old_logps = logps
        if old_logps_ptr is not None:
            old_logps = tl.load(old_logps_ptr + offs, mask=mask, other=0.0)
        log_ratios += logps - old_logps
        if IS_VESPO:
            log_weights += _clamp(logps - old_logps, -MAX_LOG_W, MAX_LOG_W)
            if sampling_weights_ptr is not None:
                sampling_weights = tl.load(sampling_weights_ptr + offs, mask=mask, other=1.0)
                log_weights += _clamp(tl.log(sampling_weights), MIN_LOG_W, MAX_LOG_W)
        if HAS_OFF_POLICY:
            sampling_logps = old_logps
            if sampling_logps_ptr is not None:
                sampling_logps = tl.load(sampling_logps_ptr + offs, mask=mask, other=0.0)
            off_policy = sampling_logps - logps
            off_policies += tl.where(off_policy == off_policy, _clamp(off_policy, -MAX_FLOAT, MAX_FLOAT), 0.0)
    length = (end - begin).to(tl.float32)
    return tl.sum(log_ratios) / length, tl.sum(off_policies) / length, tl.sum(log_weights)


@triton.jit(do_not_specialize=["N"])
def _policy_loss_kernel(
    # inputs, [N] fp32 or None; the threshold one value
    logps_ptr, advantages_ptr, weights_ptr, old_logps_ptr, ref_logps_ptr, sampling_weights_ptr, sampling_logps_ptr,
    entropies_ptr, entropy_weights_ptr, entropy_threshold_ptr,
    # where sequences begin, [N + 1] int64; None: a program takes a block of tokens
    offsets_ptr,
    # outputs, [N] fp32 or None; flags uint8
    loss_ptr, slope_ptr, entropy_slope_ptr, ratio_ptr, kl_ptr, is_low_ptr, is_high_ptr, phi_ptr,
    N, low, high, delta, beta, temperature_pos, temperature_neg, k_pos, lambda_pos, k_neg, lambda_neg, threshold,
    LOSS: tl.constexpr, IS_SEQUENCE_LEVEL: tl.constexpr, HAS_OFF_POLICY: tl.constexpr,
    KL: tl.constexpr, IS_KL_CORRECTED: tl.constexpr, SLOPES_ONLY: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if offsets_ptr is None:
        begin = program * BLOCK_N
        end = tl.minimum(begin + BLOCK_N, N)
    else:
        begin = tl.load(offsets_ptr + program)
        end = tl.load(offsets_ptr + program + 1)
        if begin == end:
            return
        mean_log_ratio, off_policy, log_weight = _sequence_sums(
            begin, end, logps_ptr, old_logps_ptr, sampling_weights_ptr, sampling_logps_ptr,
            LOSS == "vespo", HAS_OFF_POLICY, BLOCK_N,
        )  # fmt: skip
        log_weight = _clamp(log_weight, MIN_LOG_W, MAX_LOG_W)
    # sum over the sequence of d loss / d ratio * ratio
    shared = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        mask = offs < end
        logps = tl.load(logps_ptr + offs, mask=mask, other=0.0)
        advantages = tl.load(advantages_ptr + offs, mask=mask, other=0.0)
        weights = tl.load(weights_ptr + offs, mask=mask, other=0.0)
        if IS_SEQUENCE_LEVEL:
            log_ratio = tl.zeros_like(logps) + mean_log_ratio
        elif old_logps_ptr is not None:
            log_ratio = logps - tl.load(old_logps_ptr + offs, mask=mask, other=0.0)
        else:
            log_ratio = logps - logps
        ratio = tl.exp(log_ratio)

        factor = tl.zeros_like(logps) + 1.0
        if HAS_OFF_POLICY:
            is_near = tl.zeros_like(logps) + off_policy <= threshold
            factor = tl.where((advantages >= 0) | is_near, factor, 0.0)
        keep = tl.zeros_like(logps) + 1.0
        if entropy_threshold_ptr is not None:
            entropies = tl.load(entropies_ptr + offs, mask=mask, other=0.0)
            keep = tl.where(entropies >= tl.load(entropy_threshold_ptr), 1.0, 0.0)
        factor *= keep
        if sampling_weights_ptr is not None and LOSS != "vespo":
            factor *= tl.load(sampling_weights_ptr + offs, mask=mask, other=0.0)

        # slope: what reaches a token's own log-prob; through: what passes through the ratio
        bounded = ratio
        through = tl.zeros_like(logps)
        if LOSS == "clipped":
            loss, dratio, bounded = _clipped(ratio, advantages, low, high, delta)
            through = dratio * ratio * factor
            slope = tl.zeros_like(logps)
        elif LOSS == "sapo":
            temperature = tl.where(advantages > 0, temperature_pos, temperature_neg)
            loss, dratio = _soft_gated(ratio, advantages, temperature)
            through = dratio * ratio * factor
            slope = tl.zeros_like(logps)
        elif LOSS == "cispo":
            dlogps = -tl.where(ratio > high, high, ratio) * advantages
            loss = dlogps * logps
            slope = dlogps * factor
        else:
            rate = tl.where(advantages >= 0, lambda_pos, lambda_neg)
            log_phi = rate + tl.where(advantages >= 0, k_pos, k_neg) * log_weight - rate * tl.exp(log_weight)
            phi = tl.exp(log_phi)
            phi = tl.where(phi <= MAX_FLOAT, phi, 0.0)
            loss = -phi * advantages * logps
            slope = -phi * advantages * factor
            if not SLOPES_ONLY:
                tl.store(phi_ptr + offs, phi, mask=mask)
        loss *= factor

        if ref_logps_ptr is not None:
            kl, dkl, dkl_corrected = _kl(tl.load(ref_logps_ptr + offs, mask=mask, other=0.0) - logps, KL)
            if IS_KL_CORRECTED:
                kl *= ratio
                if IS_SEQUENCE_LEVEL:
                    slope += beta * dkl * ratio
                    through += beta * kl
                else:
                    slope += beta * dkl_corrected * ratio
            else:
                slope += beta * dkl
            loss += beta * kl
            if not SLOPES_ONLY:
                tl.store(kl_ptr + offs, kl, mask=mask)

        loss *= weights
        if IS_SEQUENCE_LEVEL:
            shared += tl.where(mask, through * weights, 0.0)
        else:
            slope += through
        tl.store(slope_ptr + offs, slope * weights, mask=mask)
        if entropy_weights_ptr is not None:
            dentropies = -tl.load(entropy_weights_ptr + offs, mask=mask, other=0.0) * keep
            tl.store(entropy_slope_ptr + offs, dentropies, mask=mask)
            loss += dentropies * tl.load(entropies_ptr + offs, mask=mask, other=0.0)
        if not SLOPES_ONLY:
            tl.store(loss_ptr + offs, loss, mask=mask)
            tl.store(ratio_ptr + offs, ratio, mask=mask)
            tl.store(is_low_ptr + offs, ((bounded < low) & (advantages < 0)).to(tl.uint8), mask=mask)
            tl.store(is_high_ptr + offs, ((bounded > high) & (advantages > 0)).to(tl.uint8), mask=mask)

    if IS_SEQUENCE_LEVEL:
        # d mean / d logp = 1 / length for every token; the barrier lets a thread read what another one stored
        dmean = tl.sum(shared) / (end - begin).to(tl.float32)
        tl.debug_barrier()
        for start in range(begin, end, BLOCK_N):
            offs = start + tl.arange(0, BLOCK_N)
            mask = offs < end
            tl.store(slope_ptr + offs, tl.load(slope_ptr + offs, mask=mask, other=0.0) + dmean, mask=mask)


def launch_policy_loss(
    logps_N: Tensor,
    tokens: Tokens,
    options: PolicyOptions,
    *,
    entropies: Tensor | None = None,
    slopes_only: bool = False,
) -> PolicyLoss:
    """`policy_loss` of contiguous fp32 tensors, without a graph; with `slopes_only` all but the slopes is undefined."""
    inputs = (
        logps_N, tokens.advantages, tokens.weights, tokens.old_logps, tokens.ref_logps, tokens.sampling_weights,
        tokens.sampling_logps, entropies, tokens.entropy_weights, tokens.entropy_threshold,
    )  # fmt: skip
    assert all(tensor is None or (tensor.is_contiguous() and tensor.dtype == torch.float32) for tensor in inputs)
    N = logps_N.numel()
    out = _empty_outputs(logps_N, tokens, options)
    if N == 0:
        return out
    if options.needs_sequences:
        assert tokens.sequence_ids is not None
        offsets, num_programs = sequence_offsets(tokens.sequence_ids), N
    else:
        offsets, num_programs = None, triton.cdiv(N, BLOCK_N)
    low, high = -math.inf, math.inf
    if options.is_clipped:
        low, high = 1 - options.epsilon_low, 1 + options.epsilon_high
    elif options.loss_type == "cispo":
        high = options.epsilon_high
    with exactly_on(logps_N.device):
        _policy_loss_kernel[(num_programs,)](
            *inputs, offsets, out.loss, out.slope, out.entropy_slope, out.ratio, out.kl,
            out.is_low_clipped.view(torch.uint8), out.is_high_clipped.view(torch.uint8), out.phi,
            N, low, high, math.inf if options.delta is None else options.delta, options.beta,
            options.sapo_temperature_pos, options.sapo_temperature_neg,
            options.vespo_k_pos, options.vespo_lambda_pos, options.vespo_k_neg, options.vespo_lambda_neg,
            options.off_policy_mask_threshold or 0.0,
            **_constexprs(options, slopes_only), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def _constexprs(options: PolicyOptions, slopes_only: bool) -> dict[str, Any]:
    return {
        "LOSS": "clipped" if options.is_clipped else options.loss_type,
        "IS_SEQUENCE_LEVEL": options.is_sequence_level,
        "HAS_OFF_POLICY": options.off_policy_mask_threshold is not None,
        "KL": options.kl_estimator,
        "IS_KL_CORRECTED": options.bias_correction_kl,
        "SLOPES_ONLY": slopes_only,
        "BLOCK_N": BLOCK_N,
    }


def _empty_outputs(logps_N: Tensor, tokens: Tokens, options: PolicyOptions) -> PolicyLoss:
    empty = torch.empty_like
    return PolicyLoss(
        loss=empty(logps_N),
        slope=empty(logps_N),
        entropy_slope=None if tokens.entropy_weights is None else empty(logps_N),
        ratio=empty(logps_N),
        kl=None if tokens.ref_logps is None else empty(logps_N),
        is_low_clipped=empty(logps_N, dtype=torch.bool),
        is_high_clipped=empty(logps_N, dtype=torch.bool),
        phi=empty(logps_N) if options.loss_type == "vespo" else None,
    )


def sequence_offsets(sequence_ids_N: Tensor) -> Tensor:
    """[N + 1] int64: where each sequence begins, then N to the end: the number of sequences stays on the device."""
    is_first_N = torch.ones_like(sequence_ids_N, dtype=torch.bool)
    is_first_N[1:] = sequence_ids_N[1:] != sequence_ids_N[:-1]
    numbers = torch.arange(1, sequence_ids_N.numel() + 2, device=sequence_ids_N.device)
    return torch.searchsorted(is_first_N.cumsum(0), numbers)


class _PolicyLoss(torch.autograd.Function):
    """An upstream gradient is a change of the weights: the slopes under the changed weights are the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logps_N: Tensor, entropies_N: Tensor | None, options: PolicyOptions, *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        out = launch_policy_loss(logps_N, _to_tokens(tensors), options, entropies=entropies_N)
        ctx.options = options
        ctx.save_for_backward(logps_N, entropies_N, *tensors)
        loss, *rest = (getattr(out, field.name) for field in dataclasses.fields(out))
        ctx.mark_non_differentiable(*(tensor for tensor in rest if tensor is not None))
        return loss, *rest

    @staticmethod
    @first_order
    def backward(ctx: Any, dloss_N: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        logps_N, entropies_N, *tensors = ctx.saved_tensors
        tokens = _to_tokens(tensors)
        bonus = tokens.entropy_weights
        tokens = dataclasses.replace(
            tokens, weights=tokens.weights * dloss_N, entropy_weights=None if bonus is None else bonus * dloss_N
        )
        out = launch_policy_loss(logps_N, tokens, ctx.options, entropies=entropies_N, slopes_only=True)
        return out.slope, out.entropy_slope, None, *(None for _ in tensors)


def _to_tokens(tensors: Any) -> Tokens:
    names = (field.name for field in dataclasses.fields(Tokens))
    return Tokens(**dict(zip(names, tensors, strict=True)))


def differentiable_policy_loss(
    logps_N: Tensor, tokens: Tokens, options: PolicyOptions, *, entropies: Tensor | None = None
) -> PolicyLoss:
    """`policy_loss` of checked fp32 tensors of any stride; its loss has a gradient, once."""
    tensors = (getattr(tokens, field.name) for field in dataclasses.fields(tokens))
    outputs = _PolicyLoss.apply(
        logps_N.contiguous(),
        None if entropies is None else entropies.contiguous(),
        options,
        *(None if tensor is None else tensor.contiguous() for tensor in tensors),
    )
    return PolicyLoss(*outputs)


def specimens() -> Iterator[Specimen]:
    """What the offline compiler builds of this file: each loss at each level, bare and with all that can be given."""
    outputs = ("loss_ptr", "slope_ptr", "ratio_ptr")
    optional = (
        "old_logps_ptr", "ref_logps_ptr", "sampling_weights_ptr", "sampling_logps_ptr",
        "entropies_ptr", "entropy_weights_ptr", "entropy_threshold_ptr", "entropy_slope_ptr", "kl_ptr",
    )  # fmt: skip
    for loss_type, level, has_all in itertools.product(("dapo", "cispo", "sapo", "vespo"), LEVELS, (False, True)):
        options = PolicyOptions(
            loss_type=loss_type, importance_sampling_level=level, off_policy_mask_threshold=0.0 if has_all else None
        )
        pointers: dict[str, str | None] = dict.fromkeys(
            ("logps_ptr", "advantages_ptr", "weights_ptr", *outputs), "fp32"
        )
        pointers |= dict.fromkeys(optional, "fp32" if has_all else None)
        pointers |= {"is_low_ptr": "u8", "is_high_ptr": "u8", "phi_ptr": "fp32" if loss_type == "vespo" else None}
        pointers["offsets_ptr"] = "i64" if options.needs_sequences else None
        yield specimen_of(
            f"policy_loss {loss_type} {level}{' with all' if has_all else ''}",
            _policy_loss_kernel,
            pointers=pointers,
            floats=FLOATS,
            constexprs=_constexprs(options, slopes_only=False),
            num_warps=NUM_WARPS,
        )
