"""Tokens for the tests of the policy loss: ratios past both clips, advantages of both signs and zero."""

import dataclasses

import torch

from grpo_kernels.options import CLIPPED_LOSSES, PolicyOptions, Tokens

# one token alone, ragged, and ids with gaps
LENGTHS = (1, 7, 32, 2, 20)
IDS = (3, 4, 9, 11, 50)


def make_tokens(lengths=LENGTHS, *, seed=0, dtype=torch.float64):
    """Log-probs, everything the loss can be given, and entropies, on the default device; the numbers are fp32's."""
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)

    def uniform(low, high):
        return (low + (high - low) * torch.rand(N, generator=g, device="cpu")).to(torch.get_default_device())

    old = uniform(-3, 0)
    logps = old + uniform(-0.6, 0.6)
    advantages = torch.randn(N, generator=g, device="cpu").to(torch.get_default_device())
    advantages[::9] = 0
    sampling_logps = old + uniform(-0.5, 0.5)
    sampling_logps[::5] = float("nan")
    tokens = Tokens(
        advantages=advantages,
        weights=uniform(0.2, 1),
        old_logps=old,
        ref_logps=logps + uniform(-1, 1),
        sampling_weights=uniform(0.5, 1.5),
        sampling_logps=sampling_logps,
        sequence_ids=torch.tensor(
            [i for i, length in zip(IDS, lengths, strict=False) for _ in range(length)], dtype=torch.int64
        ),
        entropy_weights=uniform(0.1, 1),
        entropy_threshold=torch.tensor(0.5),
    )
    return logps.to(dtype), to_dtype(tokens, dtype), uniform(0, 2).to(dtype)


def to_dtype(tokens, dtype):
    tensors = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    return Tokens(**{k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in tensors.items()})


# what each feature adds to the options, and the tensors it reads
FEATURES = {
    "bare": ({}, ()),
    "clip-higher": ({"epsilon_low": 0.1, "epsilon_high": 0.28}, ()),
    "delta": ({"delta": 1.3}, ()),
    "delta within the clip": ({"delta": 1.1}, ()),
    "k1": ({"beta": 0.3, "kl_estimator": "k1", "bias_correction_kl": False}, ("ref_logps",)),
    "k2": ({"beta": 0.3, "kl_estimator": "k2", "bias_correction_kl": False}, ("ref_logps",)),
    "k3": ({"beta": 0.3, "bias_correction_kl": False}, ("ref_logps",)),
    "k1 corrected": ({"beta": 0.3, "kl_estimator": "k1"}, ("ref_logps",)),
    "k2 corrected": ({"beta": 0.3, "kl_estimator": "k2"}, ("ref_logps",)),
    "k3 corrected": ({"beta": 0.3}, ("ref_logps",)),
    "sampling weights": ({}, ("sampling_weights",)),
    "off-policy mask": ({"off_policy_mask_threshold": 0.05}, ("sampling_logps",)),
    "entropy mask": ({}, ("entropy_threshold",)),
    "entropy bonus": ({}, ("entropy_weights",)),
    "everything": (
        {"beta": 0.3, "off_policy_mask_threshold": 0.05},
        ("ref_logps", "sampling_weights", "sampling_logps", "entropy_threshold", "entropy_weights"),
    ),
}
OPTIONAL = ("ref_logps", "sampling_weights", "sampling_logps", "entropy_threshold", "entropy_weights")


def choose(feature, tokens, loss_type, level, *, without=()):
    """The tokens and options of one feature, or None where the loss type refuses it."""
    settings, reads = FEATURES[feature]
    if "delta" in settings and loss_type not in CLIPPED_LOSSES:
        return None
    # 0.2 would cap every ratio of CISPO
    settings = {"epsilon_high": 1.2} | settings if loss_type == "cispo" else settings
    options = PolicyOptions(loss_type=loss_type, importance_sampling_level=level, **settings)
    dropped = [name for name in OPTIONAL if name not in reads]
    return dataclasses.replace(tokens, **dict.fromkeys([*dropped, *without])), options


def as_arguments(tokens, options):
    """The keyword arguments of `policy_loss` that say the same."""
    tensors = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    return {"advantages_N": tensors.pop("advantages"), **tensors, **dataclasses.asdict(options)}
