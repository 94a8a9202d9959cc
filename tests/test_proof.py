"""A run stops when its engine strays from the policy, whatever the fault, and names it."""

import copy

import pytest
import torch
from transformers import TrainerCallback

from grpo_fast import GRPOTrainer
from grpo_fast.generation import canary, shared_weights
from grpo_fast.generation.canary import Pace
from grpo_fast.optimizer import ShadowAdamW
from tests import vllm_engines
from tests.tiny_lm import make_model

pytestmark = [pytest.mark.vllm, pytest.mark.skipif("not __import__('importlib').util.find_spec('vllm')")]


class AtStep(TrainerCallback):
    """Does something after the first optimizer step."""

    def __init__(self, fault):
        self.fault = fault

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.fault()


def make_trainer(folder, **settings):
    # as many key-value heads as heads: projections that can be swapped
    model = make_model(seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    checked = {"logging_steps": 1, "vllm_check_interval": 1, "save_strategy": "no"}
    return vllm_engines.make_trainer(folder, model=model, **checked | settings)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A trainer whose engine shares its weights."""
    trainer = make_trainer(tmp_path_factory.mktemp("proof"))
    yield trainer
    trainer.engine.close()


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A trainer whose engine has bf16 copies."""
    trainer = make_trainer(tmp_path_factory.mktemp("proof"), vllm_engine_kwargs={"dtype": "bfloat16"}, optim="sgd")
    yield trainer
    trainer.engine.close()


def run_with(trainer, fault):
    callback = AtStep(fault)
    trainer.add_callback(callback)
    trainer._last_loaded_step = -1
    weights = copy.deepcopy(trainer.model.state_dict())
    try:
        trainer.train()
    finally:
        trainer.remove_callback(callback)
        trainer.model.load_state_dict(weights)
        trainer._last_loaded_step = -1
        trainer.engine.update_weights(trainer.model)


def test_a_sound_run_passes_every_check(shared, monkeypatch):
    seen = []
    check = GRPOTrainer._mean_difference
    monkeypatch.setattr(GRPOTrainer, "_mean_difference", lambda *a: seen.append(check(*a)) or seen[-1])
    run_with(shared, lambda: None)
    assert len(seen) == 3
    # two orders of summation in fp32
    assert 0 < max(seen) < 1e-4
    lines = [line for line in shared.state.log_history if "reward" in line]
    assert all(line["sync/copied_mib"] == 0 and line["time/check"] > 0 for line in lines)


def test_a_bf16_engine_passes_every_check(copied):
    run_with(copied, lambda: None)
    lines = [line for line in copied.state.log_history if "reward" in line]
    assert lines[-1]["sync/copied_mib"] > 0


def test_the_default_optimizer_writes_the_engine_s_weights(copied, monkeypatch):
    monkeypatch.setattr(copied.args, "optim", "adamw_torch_fused")
    monkeypatch.setattr(copied, "optimizer", None)
    monkeypatch.setattr(copied, "lr_scheduler", None)
    run_with(copied, lambda: None)
    assert isinstance(copied.optimizer.optimizer, ShadowAdamW)
    first, *later = [line["sync/copied_mib"] for line in copied.state.log_history if "reward" in line]
    # an update that `run_with` forces before the first step cannot know that all is fresh
    assert first > 0
    assert later == [0, 0]


def test_one_weight_that_is_not_updated_is_named(copied, monkeypatch):
    name = "model.layers.1.self_attn.k_proj.weight"
    forgotten = copied.engine.weights._links[name]
    add = shared_weights._Bucket.add

    def fault():
        monkeypatch.setattr(
            shared_weights._Bucket, "add", lambda self, link, w: 0 if link is forgotten else add(self, link, w)
        )

    with pytest.raises(RuntimeError, match=f"does not run the policy's weights: {name}: its rows are not the policy's"):
        run_with(copied, fault)
    monkeypatch.undo()
    copied.engine.update_weights(copied.model)


def test_swapped_projections_are_named(copied):
    links = copied.engine.weights._links
    q, k = (links[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")

    def swap():
        q.view, k.view = k.view, q.view
        q.pieces, k.pieces = k.pieces, q.pieces

    # written where the other belongs: each weight agrees with where it was put
    with pytest.raises(RuntimeError, match=r"the weights agree, but a canary's log-probs differ by"):
        run_with(copied, swap)
    swap()
    copied.engine.update_weights(copied.model)

    def swap_values():
        update = copied.engine.weights.update

        def swapped_update(model):
            update(model)
            rows = q.view.clone()
            q.view.copy_(k.view)
            k.view.copy_(rows)

        copied.engine.weights.update = swapped_update

    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.k_proj\.weight, model.layers\.0\.self_attn\.q_proj"):
        run_with(copied, swap_values)
    del copied.engine.weights.update
    copied.engine.update_weights(copied.model)


def test_a_tensor_that_vllm_replaced_is_named(shared):
    (target,) = shared.engine.llm.apply_model(lambda target: target)
    layer = target.model.layers[1].mlp.down_proj
    before = layer.weight

    def fault():
        layer.weight = torch.nn.Parameter(before.detach().clone(), requires_grad=False)

    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj\.weight: vLLM has replaced its tensors"):
        run_with(shared, fault)
    layer.weight = before


def test_wrong_temperature_is_told(shared):
    def fault():
        shared.vllm_generation.temperature = 0.5

    with pytest.raises(RuntimeError, match=r"Temperature of the trainer: 1.0, of the engine: 0.5"):
        run_with(shared, fault)
    shared.vllm_generation.temperature = 1.0


def test_rollouts_of_another_policy_are_told_where_no_canary_sings(shared, monkeypatch):
    monkeypatch.setattr(shared.args, "vllm_check_interval", 100)
    monkeypatch.setattr(shared, "_pace", Pace(100))

    def fault():
        shared.vllm_generation.temperature = 0.5

    with pytest.raises(RuntimeError, match=r"did not sample from the policy at step 1"):
        run_with(shared, fault)
    shared.vllm_generation.temperature = 1.0


def test_a_sampler_of_the_user_s_own_is_left_to_the_importance_weights(shared, monkeypatch):
    own = shared._generate_single_turn

    def shifted(*args, **kwargs):
        ids, logps = own(*args, **kwargs)
        return ids, [[logp - 1.0 for logp in row] for row in logps]

    monkeypatch.setattr(shared, "_generate_single_turn", shifted)
    run_with(shared, lambda: None)
    line = [line for line in shared.state.log_history if "reward" in line][-1]
    assert line["sampling/sampling_logp_difference/mean"] > 0.9


def test_checks_can_be_switched_off(shared, monkeypatch):
    monkeypatch.setattr(shared.args, "vllm_check_interval", 0)

    def fault():
        shared.vllm_generation.temperature = 0.5

    run_with(shared, fault)
    shared.vllm_generation.temperature = 1.0


def test_checks_leave_the_random_state_alone(shared):
    shared._last_loaded_step = -1
    state = torch.get_rng_state()
    shared.sync_engine()
    assert torch.equal(torch.get_rng_state(), state)


def test_all_rows_are_seen_in_time(shared):
    weights = shared.engine.weights
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = shared.model.get_parameter(name)
    view = parameter.data
    # one row of 48 differs
    parameter.data = view.clone()
    parameter.data[17] += 1.0
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(200):
        try:
            weights.check(shared.model, num_rows=2, generator=generator)
        except RuntimeError:
            found += 1
    # the chance of a row in one check is 1 - (47 / 48)^2 = 0.041: 8.2 of 200 expected
    assert 2 <= found <= 20
    parameter.data = view


def test_pace_keeps_to_its_share_of_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(canary.time, "perf_counter", lambda: now[0])
    pace = Pace(None)
    assert pace.is_due(0)
    pace.took(1.0)
    spent = 0
    for step in range(1, 2001):
        now[0] += 1.0
        if pace.is_due(step):
            pace.took(0.5)
            spent += 0.5
    # the first one is not counted: it also starts the engine's kernels; its cost still delays the second
    assert 0.8 * canary.SHARE_OF_TIME * 2000 <= spent <= canary.SHARE_OF_TIME * 2000
    assert [Pace(2).is_due(step) for step in range(4)] == [True, False, True, False]
    assert not Pace(0).is_due(0)
