"""A policy loss on top of a head: what goes in beside the head, and what comes out."""

import torch

from grpo_kernels import reference
from tests.heads import to_float64


def make_tokens(inputs, *, seed=1, beta=0.0, with_bonus=False):
    """Advantages of both signs, ratios on both sides of the clip, near the head's own log-probs; float32."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logps = reference.linear_logps(**to_float64(inputs)).float()
    N = logps.numel()
    tokens = {
        "advantages_N": torch.randn(N, generator=g),
        "weights": torch.rand(N, generator=g) / max(N, 1),
        "old_logps": logps + 0.3 * torch.randn(N, generator=g),
        "sampling_weights": 0.5 + torch.rand(N, generator=g),
        "sequence_ids": torch.arange(N) // 37,
    }
    if beta:
        tokens["ref_logps"] = logps + 0.3 * torch.randn(N, generator=g)
    if with_bonus:
        tokens["entropy_weights"] = torch.rand(N, generator=g) / max(N, 1)
    return tokens


def loss_and_grads(op, inputs, tokens, *, upstream=1.0, **options):
    wanted = [k for k, v in inputs.items() if v.requires_grad]
    result = op(**inputs, **tokens, **options)
    grads = torch.autograd.grad(result.loss * upstream, [inputs[k] for k in wanted])
    return result, dict(zip(wanted, grads, strict=True))
