"""The reference with its normalisers against TRL 1.16's own `_compute_loss`, value and gradient, in float64."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from grpo_kernels import entropy_quantile, policy_loss, row_weights
from grpo_kernels.options import CLIPPED_LOSSES, LEVELS, LOSS_TYPES, PolicyOptions

pytest.importorskip("trl")
pytestmark = pytest.mark.trl

# float64; TRL takes mask counts in fp32 and so rounds its normalisers
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
LENGTHS = (6, 1, 0, 9, 4)
B, C = len(LENGTHS), max(LENGTHS)
NUM_ITEMS, PROCESSES, STEPS_PER_GENERATION, MAX_COMPLETION_LENGTH = 37, 2, 6, 16
# exact in fp32, in which TRL holds them
TEMPERATURES = {"sapo_temperature_pos": 1.25, "sapo_temperature_neg": 1.75}
ENTROPY_COEF = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a run is given beside loss type and level."""

    options: dict = dataclasses.field(default_factory=dict)
    sampler: str | None = None  # importance weights of "tokens" or "rows"
    has_old: bool = True
    has_sampling_logps: bool = True
    has_tool_mask: bool = False
    has_token_advantages: bool = False
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    accumulation: int = 1
    is_training: bool = True


CASES = {
    "bare": Case(),
    "on policy": Case(has_old=False),
    "clip-higher": Case(options={"epsilon_low": 0.1, "epsilon_high": 0.28}),
    "delta": Case(options={"delta": 1.125}),
    "kl": Case(options={"beta": 0.25, "bias_correction_kl": False}),
    "bias-corrected kl": Case(options={"beta": 0.25}),
    "token weights": Case(sampler="tokens"),
    "row weights": Case(sampler="rows"),
    "off-policy mask": Case(options={"off_policy_mask_threshold": 0.0}),
    "off-policy mask of old": Case(options={"off_policy_mask_threshold": 0.0}, has_sampling_logps=False),
    "off-policy mask on policy": Case(
        options={"off_policy_mask_threshold": 0.0}, has_sampling_logps=False, has_old=False
    ),
    "entropy mask": Case(top_entropy_quantile=0.4),
    "entropy bonus": Case(entropy_coef=ENTROPY_COEF, accumulation=3),
    "tool mask": Case(has_tool_mask=True),
    "token advantages": Case(has_token_advantages=True),
    "accumulation": Case(accumulation=3),
    "evaluation": Case(accumulation=3, is_training=False),
    "everything": Case(
        options={"beta": 0.25, "off_policy_mask_threshold": 0.0},
        sampler="tokens",
        has_tool_mask=True,
        has_token_advantages=True,
        top_entropy_quantile=0.6,
        entropy_coef=ENTROPY_COEF,
        accumulation=3,
    ),
}


def make_batch(case):
    """A padded micro-batch with garbage beyond the mask, and the log-probs and entropies of its model."""
    g = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return (low + (high - low) * torch.rand(B, C, generator=g)).double()

    mask = (torch.arange(C) < torch.tensor(LENGTHS)[:, None]).long()
    tool_mask = torch.ones(B, C, dtype=torch.long)
    if case.has_tool_mask:
        tool_mask[:, 2] = 0
        mask_in_loss = mask * tool_mask
    else:
        mask_in_loss = mask
    old = uniform(-3, 0)
    logps = (old + uniform(-0.5, 0.5)).requires_grad_()
    sampling = old + uniform(-0.5, 0.5)
    sampling[:, 3] = float("nan")
    # TRL's threshold is an fp32 quantile
    entropies = uniform(0, 2).float().double().requires_grad_()
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2, dtype=torch.long),
        "completion_ids": torch.zeros(B, C, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 2.0, -1.5, 0.0]).double(),
        "num_items_in_batch": torch.tensor(NUM_ITEMS),
        "ref_per_token_logps": logps.detach() + uniform(-1, 1),
    }
    if case.has_token_advantages:
        inputs["advantages"] = uniform(-1.5, 1.5)
    if case.has_tool_mask:
        inputs["tool_mask"] = tool_mask
    if case.has_old:
        inputs["old_per_token_logps"] = old
    if case.has_sampling_logps:
        inputs["sampling_per_token_logps"] = sampling
    if case.sampler == "tokens":
        # as TRL makes them: 1 outside the mask
        inputs["importance_sampling_ratio"] = torch.where(mask_in_loss.bool(), uniform(0.5, 1.5), 1.0)
    elif case.sampler == "rows":
        inputs["importance_sampling_ratio"] = uniform(0.5, 1.5)[:, :1]
    return inputs, mask_in_loss, logps, entropies


def trl_loss(case, options, inputs, logps, entropies):
    """TRL's method on an object that carries what the method reads; one process says it is one of two."""
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        accelerator=SimpleNamespace(
            num_processes=PROCESSES,
            sync_gradients=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, **kwargs: x,
        ),
        args=SimpleNamespace(
            **dataclasses.asdict(options),
            use_bias_correction_kl=options.bias_correction_kl,
            steps_per_generation=STEPS_PER_GENERATION,
        ),
        model=SimpleNamespace(training=case.is_training),
        aux_loss_enabled=False,
        top_entropy_quantile=case.top_entropy_quantile,
        off_policy_mask_threshold=options.off_policy_mask_threshold,
        importance_sampling_level=options.importance_sampling_level,
        beta=options.beta,
        loss_type=options.loss_type,
        epsilon_low=options.epsilon_low,
        epsilon_high=options.epsilon_high,
        use_vllm=case.sampler is not None,
        vllm_importance_sampling_correction=case.sampler is not None,
        current_gradient_accumulation_steps=case.accumulation,
        max_completion_length=MAX_COMPLETION_LENGTH,
        _entropy_bonus_enabled=case.entropy_coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=case.entropy_coef,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    trainer.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, trainer)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {k: v[0] for k, v in trainer._metrics["train" if case.is_training else "eval"].items()}


def packed_loss(case, options, inputs, mask, logps, entropies):
    """The sum of our tokens' losses, and what they report."""
    rows, columns = mask.nonzero(as_tuple=True)

    def tokens(name):
        values = inputs.get(name)
        if values is None or values.dim() == 1:
            return values if values is None else values[rows]
        return values.expand(B, C)[rows, columns]

    accumulation = case.accumulation if case.is_training else 1
    weights = row_weights(
        mask.sum(1),
        loss_type=options.loss_type,
        accumulation=accumulation,
        num_items_per_process=inputs["num_items_in_batch"].clamp(min=1).double() / PROCESSES,
        windows=accumulation / STEPS_PER_GENERATION if case.is_training else 1,
        max_completion_length=MAX_COMPLETION_LENGTH,
        dtype=torch.float64,
    )
    packed_entropies = entropies[rows, columns]
    bonus = threshold = None
    keep = torch.ones_like(packed_entropies, dtype=torch.bool)
    if case.top_entropy_quantile < 1:
        threshold = entropy_quantile(packed_entropies, case.top_entropy_quantile)
        keep = packed_entropies.detach() >= threshold
        assert 0 < keep.sum() < keep.numel()
    if case.entropy_coef:
        bonus = torch.full_like(packed_entropies, case.entropy_coef / (keep.sum() * accumulation)).detach()
    out = policy_loss(
        logps[rows, columns],
        tokens("advantages"),
        weights=weights[rows],
        old_logps=tokens("old_per_token_logps"),
        ref_logps=tokens("ref_per_token_logps") if options.beta else None,
        sampling_weights=tokens("importance_sampling_ratio"),
        sampling_logps=None if options.off_policy_mask_threshold is None else tokens("sampling_per_token_logps"),
        sequence_ids=rows,
        entropies=None if bonus is None and threshold is None else packed_entropies,
        entropy_weights=bonus,
        entropy_threshold=threshold,
        **dataclasses.asdict(options),
    )
    return out.loss.sum(), out, rows


RUNS = [
    (loss_type, level, name)
    for loss_type, level, name in itertools.product(LOSS_TYPES, LEVELS, CASES)
    # TRL ignores delta beside the clipped losses, which is refused here; VESPO has no weights of rows
    if not (name == "delta" and loss_type not in CLIPPED_LOSSES)
    and not (name == "row weights" and loss_type == "vespo")
]


@pytest.mark.parametrize(("loss_type", "level", "name"), RUNS)
def test_loss_gradient_and_metrics_are_trls(loss_type, level, name):
    case = CASES[name]
    settings = TEMPERATURES | ({"epsilon_high": 1.25} if loss_type == "cispo" else {}) | case.options
    options = PolicyOptions(loss_type=loss_type, importance_sampling_level=level, **settings)
    inputs, mask, logps, entropies = make_batch(case)

    expected, metrics = trl_loss(case, options, inputs, logps, entropies)
    loss, out, rows = packed_loss(case, options, inputs, mask, logps, entropies)
    torch.testing.assert_close(loss, expected, **CLOSE)

    leaves = [logps, entropies] if case.entropy_coef else [logps]
    gradients = torch.autograd.grad(loss, leaves)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, exact, **CLOSE)
    assert gradients[0].any() or name == "off-policy mask on policy"

    totals, N = out.totals(), rows.numel()
    if options.beta:
        assert metrics["kl"] == pytest.approx((totals.kl / N).item())
    if level == "sequence":
        return
    if options.is_clipped:
        assert metrics["clip_ratio/low_mean"] == pytest.approx((totals.low_clipped / N).item())
        assert metrics["clip_ratio/high_mean"] == pytest.approx((totals.high_clipped / N).item())
        assert name == "on policy" or not case.has_old or totals.low_clipped + totals.high_clipped > 0
    elif loss_type == "cispo":
        assert metrics["cispo_clip_ratio"] == pytest.approx((totals.high_clipped / N).item())
    elif loss_type == "vespo" and not case.has_token_advantages:
        first = torch.tensor([i == 0 or rows[i] != rows[i - 1] for i in range(N)])
        # TRL counts the empty row, whose weight is 1, too
        assert metrics["vespo/phi_seq_mean"] == pytest.approx((out.phi[first].sum().item() + 1) / B)
