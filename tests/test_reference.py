import copy
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerControl, TrainerState

from grpo_fast import GRPOConfig
from grpo_fast.loading import load_model
from grpo_fast.padding import pad_rows
from grpo_fast.policy import score
from grpo_fast.reference import (
    SyncRefModelCallback,
    inference_config,
    make_reference,
    mix,
    prepare_reference,
)
from tests.processes import launch_text
from tests.tiny_lm import make_model, save


def make_args(tmp_path, **kwargs):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.1} | kwargs
    return GRPOConfig(str(tmp_path / "out"), **settings)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 11).view(1, 8)).logits


def move(model, by=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)


def test_reference_is_the_initial_policy_whatever_training_does(tmp_path):
    # never saved, and changed after it was made
    model = make_model(attention_dropout=0.5).bfloat16().train()
    move(model, by=0.01)
    initial = logits(model.eval())
    reference = make_reference(model.train(), make_args(tmp_path))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert reference.dtype == torch.bfloat16
    move(model)
    assert torch.equal(logits(reference), initial)
    assert not torch.equal(logits(model.eval()), initial)


def test_tied_weights_stay_tied(tmp_path):
    reference = make_reference(make_model(tie_word_embeddings=True), make_args(tmp_path))
    assert reference.lm_head.weight is reference.model.embed_tokens.weight


def test_no_reference_where_none_is_read(tmp_path):
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"]))
    assert make_reference(make_model(), make_args(tmp_path, beta=0.0)) is None
    assert make_reference(adapted, make_args(tmp_path)) is None
    with pytest.raises(NotImplementedError, match="sync_ref_model=True is not supported with adapters"):
        make_reference(adapted, make_args(tmp_path, sync_ref_model=True))


def test_weights_that_zero3_has_spread_are_read_again(tmp_path):
    folder = save(tmp_path / "model")
    args = make_args(tmp_path, model_init_kwargs={"attn_implementation": "sdpa"})
    model = load_model(folder, make_args(tmp_path, model_init_kwargs={"dtype": "bfloat16"}))
    model.set_attn_implementation("eager")
    initial = logits(model)
    # DeepSpeed marks its parameters so and leaves nothing in them
    for parameter in model.parameters():
        parameter.ds_id = 0
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    args.cast_lm_head_to_fp32 = True
    reference = make_reference(model, args)
    assert reference.config._attn_implementation == "eager"
    assert (reference.dtype, reference.lm_head.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(logits(reference).bfloat16(), initial)
    (row,) = pad_rows([[3, 4]], [[5, 6]], max_tokens=None)
    expected = logits(reference)[0, 1:3].log_softmax(-1)
    logps = score(reference, row, temperature=1.0)[0]
    # the attention's rounding to 8 bits depends on the length of a row
    torch.testing.assert_close(logps, torch.stack([expected[0, 5], expected[1, 6]]), rtol=0, atol=0.02)
    assert args.model_init_kwargs == {"attn_implementation": "sdpa"}


@pytest.mark.parametrize("bf16", [False, True])
def test_prepared_reference_runs_in_the_runs_precision(tmp_path, bf16):
    model = make_model()
    args = make_args(tmp_path, bf16=bf16)
    reference = make_reference(model, args)
    expected = logits(reference)
    prepared = prepare_reference(Trainer(model=model, args=args), reference)
    assert not prepared.training
    assert torch.equal(logits(prepared), expected) is not bf16
    # the norm of the difference is a few roundings to 8 bits
    assert (logits(prepared) - expected).norm() < 0.03 * expected.norm()


def trained(tmp_path, callback):
    """What a trainer's callbacks see over eight optimizer steps; the policy moves by 0.1 a step."""
    args = make_args(tmp_path, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.7)
    policy = make_model(seed=1)
    reference = make_reference(policy, args)
    trainer = Trainer(model=policy, args=args)
    sync = callback(ref_model=prepare_reference(trainer, reference), accelerator=trainer.accelerator)
    state, values = TrainerState(), []
    for step in range(1, 9):
        move(policy)
        state.global_step = step
        sync.on_step_end(args, state, TrainerControl(), model=policy)
        values.append(torch.cat([parameter.detach().flatten() for parameter in reference.parameters()]))
    return values


def test_reference_steps_towards_the_policy(tmp_path):
    values = trained(tmp_path, SyncRefModelCallback)
    initial = torch.cat([parameter.detach().flatten() for parameter in make_model(seed=1).parameters()])
    # step 3: 0.7 of the policy at +0.3; step 6: 0.7 of the policy at +0.6 and 0.3 of the reference
    shifts = [0, 0, 0.21, 0.21, 0.21, 0.42 + 0.063, 0.42 + 0.063, 0.42 + 0.063]
    for value, shift in zip(values, shifts, strict=True):
        # fp32 sums of numbers up to 1
        torch.testing.assert_close(value, initial + shift, rtol=0, atol=1e-6)


@pytest.mark.trl
def test_reference_steps_equal_trls(tmp_path):
    from trl.trainer.callbacks import SyncRefModelCallback as Theirs

    for ours, theirs in zip(trained(tmp_path, SyncRefModelCallback), trained(tmp_path, Theirs), strict=True):
        assert torch.equal(ours, theirs)


FSDP = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from types import SimpleNamespace
from grpo_fast.reference import mix
from tests.tiny_lm import make_model

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
ids = torch.arange(3, 11).view(1, 8)


def fsdp1(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


with torch.no_grad():
    expected = make_model(seed=1)
    for own, other in zip(expected.parameters(), make_model(seed=2).parameters()):
        own.mul_(0.5).add_(other, alpha=0.5)
    logits = expected(input_ids=ids).logits
    for shard in (fsdp1, fsdp2):
        reference, policy = shard(make_model(seed=1)), shard(make_model(seed=2))
        reference(input_ids=ids)
        mix(policy, reference, alpha=0.5, state=SimpleNamespace())
        torch.testing.assert_close(reference(input_ids=ids).logits, logits)
        torch.testing.assert_close(policy(input_ids=ids).logits, make_model(seed=2)(input_ids=ids).logits)
dist.destroy_process_group()
"""


def test_sharded_models_are_mixed_after_a_forward_pass(tmp_path):
    launch_text(FSDP, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_zero3_gathers_both_models_and_one_process_mixes(monkeypatch, rank):
    gathered = []

    @contextmanager
    def gather(parameters, modifier_rank):
        gathered.append((list(parameters), modifier_rank))
        yield
        gathered.append("spread")

    deepspeed = SimpleNamespace(
        zero=SimpleNamespace(GatheredParameters=gather), comm=SimpleNamespace(get_rank=lambda: rank)
    )
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    policy, reference = make_model(seed=1), make_model(seed=2)
    initial = copy.deepcopy(reference)
    mix(policy, reference, alpha=0.5, state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    (parameters, writer), spread = gathered
    assert writer == 0
    assert spread == "spread"
    assert {id(p) for p in parameters} == {id(p) for model in (policy, reference) for p in model.parameters()}
    expected = (initial.lm_head.weight + policy.lm_head.weight) / 2 if rank == 0 else initial.lm_head.weight
    torch.testing.assert_close(reference.lm_head.weight, expected, rtol=0, atol=1e-6)


def test_deepspeed_config_of_a_reference_trains_nothing():
    given = {
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": 7,
        },
    }
    before = copy.deepcopy(given)
    assert inference_config(given, make_model().config) == {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 32 * 32,
            "stage3_prefetch_bucket_size": 7,
            "stage3_param_persistence_threshold": 10 * 32,
        },
    }
    assert given == before
    given["zero_optimization"] = {"stage": 2, "allgather_bucket_size": 5}
    assert inference_config(given, make_model().config)["zero_optimization"] == {
        "stage": 0,
        "allgather_bucket_size": 5,
    }
