"""Linear layers that round their weight twice: every number is autocast's, and no copy waits for the backward pass."""

import copy
import functools
import gc
import io
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from grpo_fast.mixed_linear import _MixedLinear, mixed_linears
from tests.processes import launch_text

D, OUT = 24, 40
HALVES = [torch.bfloat16, torch.float16]


class Readers(nn.Module):
    """Two layers that read one tensor, which may change in between, and a third that reads what they make."""

    def __init__(self, *, bias=True, change=None, checkpointing=None):
        super().__init__()
        self.first, self.second = nn.Linear(D, OUT, bias=bias), nn.Linear(D, OUT, bias=bias)
        self.last = nn.Linear(OUT, 3, bias=bias)
        self.change, self.checkpointing = change, checkpointing

    def forward(self, x):
        return self.body(x) if self.checkpointing is None else checkpoint(self.body, x, **self.checkpointing)

    def body(self, x):
        # an activation, as a norm makes it
        x = x * 1.5
        first = self.first(x)
        if self.change is not None:
            self.change(x)
        return self.last(torch.tanh(first) * self.second(x))


def made(**kwargs):
    torch.manual_seed(0)
    return Readers(**kwargs)


def drawn(*shape, requires_grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), requires_grad=requires_grad)


def bits_of(model, x, dtype=torch.bfloat16, scale=1.0):
    """Output and all gradients; the gradient of the output has another value everywhere."""
    with torch.autocast("cpu", dtype):
        out = model(x)
    if out.requires_grad:
        (out * drawn(*out.shape, requires_grad=False)).sum().mul(scale).backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def assert_same_bits(model, x, dtype=torch.bfloat16, scale=1.0):
    expected = bits_of(copy.deepcopy(model), x.detach().clone().requires_grad_(x.requires_grad), dtype, scale)
    with mixed_linears(model) as count:
        assert count == sum(type(module) is nn.Linear for module in model.modules())
        found = bits_of(model, x, dtype, scale)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def runs(monkeypatch):
    """How often layers went through here."""
    counts = []
    forward = _MixedLinear.forward
    monkeypatch.setattr(
        _MixedLinear, "forward", staticmethod(lambda ctx, *args: counts.append(args) or forward(ctx, *args))
    )
    return counts


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
# a vector, one token, several, rows, nothing
@pytest.mark.parametrize("shape", [(D,), (1, D), (37, D), (2, 5, D), (0, D), (2, 0, D)])
def test_bits_are_autocast_s(dtype, bias, shape, runs):
    assert_same_bits(made(bias=bias), drawn(*shape), dtype)
    assert len(runs) == 3


@pytest.mark.parametrize(
    "change",
    [lambda x: x.mul_(2), lambda x: x[:, 3:].add_(1), lambda x: x.t().mul_(3), lambda x: x.detach().mul_(2)],
    ids=["whole", "view", "transposed", "detached"],
)
def test_a_change_of_the_input_between_two_layers_is_seen(change):
    assert_same_bits(made(change=change), drawn(8, D))


def test_memory_that_is_put_under_the_input_is_seen():
    def swap(x):
        x.data = x.detach() * 7

    assert_same_bits(made(change=swap), drawn(8, D))


@pytest.mark.parametrize("frozen", ["first.weight", "weights", "biases", "all"])
def test_frozen_parameters(frozen, runs):
    model = made()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not (
            frozen == "all" or name == frozen or name.endswith(frozen[:-1].replace("se", "s"))
        )
    assert_same_bits(model, drawn(8, D))
    assert len(runs) == 3


def test_an_input_without_gradient():
    assert_same_bits(made(), drawn(8, D, requires_grad=False))
    assert_same_bits(made().requires_grad_(False), drawn(8, D, requires_grad=False))


def test_an_input_in_half_precision_and_one_that_is_not_contiguous():
    for x in (drawn(8, D).bfloat16(), drawn(8, D).half(), drawn(D, 8).t(), drawn(3, 1, D).expand(3, 4, D)):
        layer = nn.Linear(D, OUT)
        assert_same_bits(layer, x.detach().requires_grad_())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers(use_reentrant, runs):
    assert_same_bits(made(checkpointing={"use_reentrant": use_reentrant}), drawn(8, D))
    assert len(runs) == 3 if use_reentrant else 6


def test_a_scaled_loss():
    # 2^16, where `GradScaler` begins, overflows gradients in fp16: infinities and NaN are where they were
    assert_same_bits(made(), drawn(8, D), torch.float16, scale=2.0**16)
    assert_same_bits(made(), drawn(8, D), torch.float16, scale=2.0**8)


def saved_bytes(model, x):
    """Bytes that autograd keeps for the backward pass, without parameters; once a storage."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_neither_a_copy_of_a_weight_nor_two_of_an_input_are_kept():
    model, x, N = made(), drawn(8, D), 8
    theirs = saved_bytes(copy.deepcopy(model), x)
    with mixed_linears(model):
        ours = saved_bytes(model, x)
    weights = 2 * (2 * OUT * D + 3 * OUT)
    assert theirs - ours == weights + 2 * N * D


def test_the_input_s_copy_goes_with_it():
    def alive():
        gc.collect()
        return sum(type(t) is torch.Tensor and t.shape == (11, D) for t in gc.get_objects())

    layer = nn.Linear(D, OUT).requires_grad_(False)
    with mixed_linears(layer), torch.autocast("cpu", torch.bfloat16):
        before = alive()
        x = drawn(11, D)
        out = layer(x)
        assert alive() == before + 2
        del x, out
        assert alive() == before


def plain_run(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def test_everything_else_is_torch_s_own(runs, monkeypatch):
    class Twice(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    own = nn.Linear(D, OUT)
    own.forward = lambda input: "own"
    x, model = drawn(8, D), nn.ModuleList([Twice(D, OUT), own, nn.Linear(D, OUT)])
    with mixed_linears(model) as count:
        assert count == 1
        layer = model[2]
        # no autocast, no gradient, nothing to round
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        with torch.no_grad():
            plain_run(layer, x)
        with torch.inference_mode():
            plain_run(layer, x)
        plain_run(model[0], x)
        assert plain_run(own, x) == "own"
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(
            plain_run(compiled, x), nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
        )
        monkeypatch.setattr(nn.Linear, "forward", functools.wraps(nn.Linear.forward)(lambda self, input: "theirs"))
        assert plain_run(layer, x) == "theirs"
        monkeypatch.undo()
        assert not runs
    assert all("forward" not in vars(module) for module in (model[0], model[2]))


def test_bf16_weights_are_not_touched(runs):
    assert_same_bits(nn.Linear(D, OUT).bfloat16(), drawn(8, D))
    assert not runs


def test_hooks_run_and_wrappers_stay():
    layer, seen = nn.Linear(D, OUT), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    layer.register_full_backward_hook(lambda module, dinput, dout: seen.append(dout[0].dtype))
    with mixed_linears(layer):
        plain_run(layer, drawn(8, D)).float().sum().backward()
        inner = layer.forward
        layer.forward = wrapper = lambda input: inner(input)
    assert seen == [torch.bfloat16] * 2
    assert layer.forward is wrapper
    assert plain_run(layer, drawn(8, D)).shape == (8, OUT)


def test_copies_run_with_their_own_weights():
    layer, x = nn.Linear(D, OUT), drawn(8, D)
    with mixed_linears(layer):
        twin = copy.deepcopy(layer)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        expected = plain_run(layer, x)
        with torch.no_grad():
            layer.weight.zero_()
        assert torch.equal(plain_run(twin, x), expected)
        assert torch.equal(plain_run(loaded, x), expected)


def test_second_derivatives_are_refused():
    layer, x = nn.Linear(D, OUT), drawn(8, D)
    with mixed_linears(layer), pytest.raises(RuntimeError, match="MixedLinear has no second derivative"):
        torch.autograd.grad(plain_run(layer, x).sum(), x, create_graph=True)


def gradients_under_ddp(wrap, *, unused):
    model = made()
    if unused:
        model.unused = nn.Linear(2, 2)
    ddp = DistributedDataParallel(model, find_unused_parameters=unused)
    with wrap(model), torch.autocast("cpu", torch.bfloat16):
        out = ddp(drawn(8, D) + dist.get_rank())
    out.float().square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_finds_every_gradient(unused):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ours = gradients_under_ddp(mixed_linears, unused=unused)
        assert torch.equal(ours, gradients_under_ddp(nullcontext, unused=unused))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_the_same_gradients(tmp_path):
    launch_text(
        """
from contextlib import nullcontext
import torch
import torch.distributed as dist
from grpo_fast.mixed_linear import mixed_linears
from tests.test_mixed_linear import gradients_under_ddp

dist.init_process_group("gloo")
ours, theirs = (gradients_under_ddp(wrap, unused=True) for wrap in (mixed_linears, nullcontext))
assert torch.equal(ours, theirs)
both = [torch.zeros_like(ours) for _ in range(2)]
dist.all_gather(both, ours)
assert torch.equal(*both)
dist.destroy_process_group()
""",
        tmp_path,
    )
