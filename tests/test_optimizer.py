"""`ShadowAdamW` is torch's AdamW to every caller of it, and its shadows are its parameters after every step."""

import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import nn

import grpo_fast
from grpo_fast.optimizer import ShadowAdamW
from tests.tiny_lm import make_model
from tests.trainer_runs import build, trained, weights_of

LR = 0.05


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 1))


def groups_of(net):
    matrices = [p for p in net.parameters() if p.ndim > 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in net.parameters() if p.ndim < 2]}]


def shadows_of(net, dtype=torch.bfloat16):
    return {p: torch.zeros_like(p, dtype=dtype, requires_grad=False) for p in net.parameters()}


def assert_fresh(shadows):
    assert all(torch.equal(shadow, param.to(shadow.dtype)) for param, shadow in shadows.items())


def loss_of(net, seed):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    return (net(x)[:, 0] - x.sum(1)).square().mean()


def train(net, optimizer, steps, scheduler=None):
    """With made-up gradients: a product's last bits depend on where its operands lie in memory."""
    for seed in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        for param in (p for p in net.parameters() if p.requires_grad):
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(net, other):
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def make_theirs(net, **kwargs):
    return torch.optim.AdamW(groups_of(net), lr=LR, **{"fused": True} | kwargs)


def make_ours(net, **kwargs):
    shadows = shadows_of(net)
    return ShadowAdamW(groups_of(net), lr=LR, shadows=shadows, **kwargs), shadows


@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.9), "eps": 1e-5}, {"maximize": True}], ids=str)
def test_bitwise_torchs_fused_adamw_with_groups_and_a_schedule(options):
    net, other = make_net(), make_net()
    (ours, shadows), theirs = make_ours(net, **options), make_theirs(other, **options)
    schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    schedules = schedule(ours), schedule(theirs)
    for step in range(6):
        train(net, ours, [step], schedules[0])
        train(other, theirs, [step], schedules[1])
        assert_same(net, other)
        assert_fresh(shadows)
    assert ours.param_groups[0]["lr"] == pytest.approx(LR / 7)


def test_state_and_groups_are_torchs():
    net, other = make_net(), make_net()
    (ours, _), theirs = make_ours(net), make_theirs(other)
    train(net, ours, range(2))
    train(other, theirs, range(2))
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, expected in theirs["state"].items():
        assert list(ours["state"][key]) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(ours["state"][key][name], value, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_checkpoints_load_in_both_directions(tmp_path, first, fused):
    """Four steps by one class are two by each; what torch did unfused is within its own rounding."""
    net, whole = make_net(), make_net()
    train(whole, make_theirs(whole), range(4))

    def make(net, kind):
        return make_ours(net, fused=fused)[0] if kind == "ours" else make_theirs(net, fused=fused)

    optimizer = make(net, first)
    train(net, optimizer, range(2))
    torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    weights, state = torch.load(tmp_path / "checkpoint.pt")
    other = make_net(seed=1)
    other.load_state_dict(weights)
    second = make(other, "theirs" if first == "ours" else "ours")
    second.load_state_dict(state)
    assert all(s["step"] == 2 for s in second.state.values())
    train(other, second, range(2, 4))
    if fused:
        assert_same(other, whole)
    for param, expected in zip(other.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_an_unfused_optimizer_keeps_a_scalers_protocol():
    net = make_net()
    theirs = make_theirs(net, fused=None)
    train(net, theirs, range(1))
    ours, shadows = make_ours(net)
    ours.load_state_dict(theirs.state_dict())
    assert all(group["fused"] for group in ours.param_groups)
    train(net, ours, [1])
    assert_fresh(shadows)


@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
def test_a_checkpoint_of_another_algorithm_is_refused(option):
    net = make_net()
    ours, _ = make_ours(net)
    state = ours.state_dict()
    state["param_groups"][0][option] = True
    with pytest.raises(ValueError, match=f"saved with {option}=True.* pass an optimizer"):
        ours.load_state_dict(state)


def test_shadows_that_do_not_fit_are_refused():
    net = make_net()
    shadows = shadows_of(net) | {net[0].bias: torch.zeros(3)}
    with pytest.raises(ValueError, match=r"shadows of a parameter must be \[8\] on cpu, got \[3\]"):
        ShadowAdamW(net.parameters(), shadows=shadows)


def test_what_has_no_gradient_is_left_and_what_has_no_shadow_is_trained():
    net, other = make_net(), make_net()
    shadows = shadows_of(net)
    del shadows[net[2].weight]
    marked = shadows[net[0].bias].fill_(7)
    ours, theirs = ShadowAdamW(groups_of(net), lr=LR, shadows=shadows), make_theirs(other)
    for each in (net, other):
        each[0].bias.requires_grad_(False)
    train(net, ours, range(2))
    train(other, theirs, range(2))
    assert_same(net, other)
    assert (marked == 7).all()
    assert net[0].bias not in ours.state
    del shadows[net[0].bias]
    assert_fresh(shadows)


def test_parameters_of_two_dtypes():
    net, other = make_net(), make_net()
    for each in (net, other):
        each[2].bfloat16()
        each[1].register_forward_hook(lambda _, inputs, out: out.bfloat16())
        each[2].register_forward_hook(lambda _, inputs, out: out.float())
    ours, theirs = ShadowAdamW(groups_of(net), lr=LR, shadows=shadows_of(net[0])), make_theirs(other)
    train(net, ours, range(2))
    train(other, theirs, range(2))
    assert_same(net, other)


def test_post_hooks_find_the_shadows_written():
    net = make_net()
    ours, shadows = make_ours(net)
    seen = []

    def hook(optimizer, args, kwargs):
        assert_fresh(shadows)
        seen.append(optimizer)

    ours.register_step_post_hook(hook)
    train(net, ours, range(2))
    assert seen == [ours, ours]


def test_closure_is_called_with_gradients_on():
    net, other = make_net(), make_net()
    (ours, shadows), theirs = make_ours(net), make_theirs(other)

    def closure(net, optimizer):
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    assert ours.step(lambda: closure(net, ours)) == theirs.step(lambda: closure(other, theirs))
    assert_same(net, other)
    assert_fresh(shadows)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_divides_and_skips(fused, unscale):
    net, other = make_net(), make_net()
    (ours, shadows), theirs = make_ours(net, fused=fused), make_theirs(other, fused=True)
    before = copy.deepcopy(net.state_dict())
    for each, optimizer in ((net, ours), (other, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(each, seed) * (float("inf") if seed == 0 else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if seed == 0:
                assert all(torch.equal(value, before[name]) for name, value in each.state_dict().items())
    assert_same(net, other)
    assert_fresh(shadows)
    assert all(
        ours.state[p]["step"] == theirs.state[q]["step"] == 3
        for p, q in zip(net.parameters(), other.parameters(), strict=True)
    )


def test_under_accelerate():
    net, other = make_net(), make_net()
    (ours, shadows), theirs = make_ours(net), make_theirs(other)
    # a process has one, and an earlier test's run may have ended between two micro-batches
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(ours)
    train(net, prepared, range(2))
    train(other, theirs, range(2))
    prepared.load_state_dict(prepared.state_dict())
    train(net, prepared, range(2, 4))
    train(other, theirs, range(2, 4))
    assert_same(net, other)
    assert_fresh(shadows)


def test_a_copy_has_no_shadows():
    net = make_net()
    ours, shadows = make_ours(net)
    train(net, ours, [0])
    twin_net, twin = copy.deepcopy((net, ours))
    train(twin_net, twin, [1])
    assert not twin.shadows
    assert_fresh(shadows)


# -- in the trainer ----------------------------------------------------------------------------------------------------

# fp32 weights that the default optimizer trains
RUN = {"optim": "adamw_torch_fused", "learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 8}


def shadowed(base):
    """A trainer whose engine has a bf16 copy of every weight."""

    class Shadowed(base):
        def _start_engine(self):
            super()._start_engine()
            self.shadows = shadows_of(self.model)
            self.engine.shadows = lambda: self.shadows

    return Shadowed


def optimizer_of(trainer):
    optimizer = trainer.create_optimizer()
    return type(optimizer), {name: value for name, value in optimizer.defaults.items() if name != "params"}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_trainer_takes_it_where_the_engine_has_shadows(tmp_path, optim):
    settings = RUN | {"optim": optim, "adam_beta2": 0.95, "weight_decay": 0.1}
    kind, defaults = optimizer_of(build(grpo_fast, tmp_path, shadowed, **settings))
    theirs, expected = optimizer_of(build(grpo_fast, tmp_path, **settings))
    assert kind is ShadowAdamW
    assert theirs is torch.optim.AdamW
    assert defaults == expected


def test_the_trainer_keeps_to_what_the_user_chose(tmp_path):
    assert optimizer_of(build(grpo_fast, tmp_path, shadowed, **RUN | {"optim": "adafactor"}))[0] is not ShadowAdamW

    def choosing(base):
        class Choosing(shadowed(base)):
            @staticmethod
            def get_optimizer_cls_and_kwargs(args, model=None):
                return torch.optim.SGD, {"lr": args.learning_rate}

        return Choosing

    assert optimizer_of(build(grpo_fast, tmp_path, choosing, **RUN))[0] is torch.optim.SGD
    trainer = build(grpo_fast, tmp_path, shadowed, **RUN)
    trainer.optimizer = theirs = torch.optim.AdamW(trainer.model.parameters())
    assert trainer.create_optimizer() is theirs
    for sharding in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        sharded = build(grpo_fast, tmp_path, shadowed, **RUN)
        setattr(sharded, sharding, True)
        assert optimizer_of(sharded)[0] is torch.optim.AdamW
    frozen = build(grpo_fast, tmp_path, shadowed, **RUN)
    frozen.model.requires_grad_(False)
    frozen.model.lm_head.requires_grad_(True)
    frozen.shadows.pop(frozen.model.lm_head.weight)
    assert optimizer_of(frozen)[0] is torch.optim.AdamW


def test_a_run_is_the_same_and_ends_with_fresh_shadows(tmp_path):
    ours = trained(grpo_fast, tmp_path / "ours", shadowed, **RUN)
    theirs = trained(grpo_fast, tmp_path / "theirs", **RUN)
    assert type(ours.optimizer.optimizer) is ShadowAdamW
    assert torch.equal(weights_of(ours), weights_of(theirs))
    assert_fresh(ours.shadows)
    assert not torch.equal(weights_of(ours), torch.cat([p.flatten() for p in make_model(seed=2).parameters()]))


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_run_resumes_with_the_other_class(tmp_path, first):
    """With one class for all four steps, or with one for two and the other after: bitwise the same weights."""
    kinds = {"ours": shadowed, "theirs": None}
    second = "theirs" if first == "ours" else "ours"
    settings = RUN | {"save_strategy": "steps", "save_steps": 2}
    whole = trained(grpo_fast, tmp_path, kinds[first], **settings)
    resumed = build(grpo_fast, tmp_path, kinds[second], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "grpo_fast" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert torch.equal(weights_of(resumed), weights_of(whole))
    if second == "ours":
        assert_fresh(resumed.shadows)
