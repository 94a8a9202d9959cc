"""What `linear_logps` allocates and multiplies: never the logits, never more than its workspace, no hidden product."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from grpo_kernels import linear_logps
from tests.allocations import Allocations

MIB = 2**20
# logits of 48 MiB in fp32, of 24 MiB in bf16; a weight and its gradient of 1.5 MiB in fp32
N, D, V = 2048, 64, 6144


def make_head(*, is_frozen=False):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g).requires_grad_()
    weight = torch.randn(V, D, generator=g).requires_grad_(not is_frozen)
    return hidden, weight, torch.randint(V, (N,), generator=g)


def train(hidden, weight, targets, **options):
    """Forward and backward under bf16 autocast; returns what was allocated beyond the inputs."""
    with Allocations() as allocations:
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = linear_logps(hidden, weight, targets, return_entropy=True, **options)
        logps.sum().backward()
    return allocations


def test_the_watch_sees_materialised_logits():
    hidden, weight, targets = make_head()
    with Allocations() as allocations:
        logps = torch.log_softmax(F.linear(hidden, weight), -1).gather(1, targets[:, None])
        forward = allocations.largest
        logps.sum().backward()
    assert forward.numel == N * V
    assert forward.bytes == 4 * N * V
    assert "log_softmax" in forward.op or "mm" in forward.op
    # the logits' gradient beside the log-probs
    assert allocations.peak_bytes >= 2 * 4 * N * V
    # the two leaves' gradients outlive everything else
    del logps
    assert allocations.live_bytes() == 4 * (N * D + V * D)


def test_the_watch_does_not_count_views_and_writes_in_place():
    base = torch.zeros(1000)
    with Allocations() as allocations:
        base[10:].view(9, 110).t().add_(1)
    assert allocations.largest.numel == 0
    assert allocations.peak_bytes == 0


@pytest.mark.parametrize("workspace_mib", [4, 16])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
def test_recomputing_stays_within_the_workspace(workspace_mib, is_frozen):
    allocations = train(*make_head(is_frozen=is_frozen), workspace_mib=workspace_mib)
    outputs = 4 * (N * D + (0 if is_frozen else V * D))
    # a dozen [N] vectors: anchors, offsets, sums, outputs, the sorted targets
    vectors = 24 * 8 * N
    assert allocations.peak_bytes <= workspace_mib * MIB + outputs + vectors
    assert allocations.largest_numel.numel < N * V // 10


def test_keeping_holds_the_exponentials_in_bf16_and_nothing_else_of_that_size():
    allocations = train(*make_head(), workspace_mib=64)
    assert allocations.largest.numel == N * V
    assert allocations.largest.bytes == 2 * N * V
    assert allocations.peak_bytes <= 64 * MIB + 4 * (N * D + V * D)
    # only one tensor of rows x vocabulary: a second one would be alive beside it
    assert allocations.peak_bytes < 2 * 2 * N * V


def test_scoring_keeps_nothing():
    hidden, weight, targets = make_head()
    with Allocations() as allocations, torch.no_grad():
        linear_logps(hidden, weight, targets)
    assert allocations.largest_numel.numel < N * V // 10
    assert allocations.live_bytes() == 0


def test_a_backward_frees_what_the_forward_kept():
    hidden, weight, targets = make_head(is_frozen=True)
    with Allocations() as allocations:
        logps = linear_logps(hidden, weight, targets)
        assert allocations.live_bytes() >= 4 * N * V
        logps.sum().backward()
        assert allocations.live_bytes() < 4 * (N * D) + 16 * N


@pytest.mark.parametrize(
    ("is_frozen", "workspace_mib", "through", "ndv"),
    [
        (False, 64, "logps", 6),
        (True, 64, "logps", 4),
        (False, 4, "logps", 8),
        (True, 4, "logps", 6),
        (False, 64, "entropy", 8),
        (False, 64, None, 2),
    ],
)
def test_products_are_counted(is_frozen, workspace_mib, through, ndv):
    hidden, weight, targets = make_head(is_frozen=is_frozen)
    with FlopCounterMode(display=False) as counter:
        logps, entropy = linear_logps(hidden, weight, targets, return_entropy=True, workspace_mib=workspace_mib)
        if through is not None:
            (logps if through == "logps" else entropy).sum().backward()
    assert counter.get_total_flops() == ndv * N * D * V
