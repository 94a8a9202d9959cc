"""Trainers with vLLM in two processes: what each process's engine runs is checked after every optimizer step.

Run under torchrun as `python -m tests.engines_of_processes FOLDER CASE ...`; fails if a check does.
"""

import logging
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.batch import Sampling
from grpo_fast.generation import shared_weights
from tests.allocations import Allocations
from tests.test_shared_weights import engine_tensors, is_inside, start
from tests.test_trainer_vllm import GREEDY, MAX_LOGP_DIFFERENCE, PROMPTS, greedy_by_transformers
from tests.tiny_lm import make_model, make_tokenizer
from tests.vllm_models import VOCABULARY, build

NUM_STEPS = 3
# different numbers in the processes, and the last prompt of one is the first of the other
OWN_PROMPTS = (slice(0, 3), slice(2, 4))


def make_policy():
    # vLLM's CPU attention takes heads of 32 and wider; two processes take a key-value head each
    return make_model(seed=3, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)


class Check(TrainerCallback):
    """Greedy completions of the engine are transformers' with the whole policy, and `check_weights` holds."""

    def __init__(self, check_weights):
        self.check_weights, self.outputs = check_weights, []

    def on_step_end(self, args, state, control, model, **kwargs):
        trainer, own = self.trainer, OWN_PROMPTS[dist.get_rank()]
        trainer.sync_engine()
        self.outputs.append(trainer.engine.generate(PROMPTS[own], GREEDY).ids)
        assert self.outputs[-1] == greedy_by_transformers(whole(model))[own]
        self.check_weights(trainer.model, trainer.engine)


def whole(model):
    """The model itself, or of a sharded one a copy on every process."""
    state = model.state_dict()
    if not isinstance(state["lm_head.weight"], DTensor):
        return model
    copy = make_policy()
    copy.load_state_dict({name: value.full_tensor() for name, value in state.items()})
    return copy


class ShardedOnCPU(GRPOTrainer):
    """As on a GPU: where `use_cpu=True`, accelerate leaves FSDP's settings unread and takes DDP."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


def train(folder, check_weights, kind=GRPOTrainer, **settings):
    check = Check(check_weights)
    trainer = kind(
        model=make_policy(),
        reward_funcs=lambda completions, **kwargs: [len(set(text)) / 8 for text in completions],
        args=GRPOConfig(
            folder,
            use_cpu=True,
            ddp_backend="gloo",
            bf16=False,
            use_vllm=True,
            per_device_train_batch_size=4,
            num_generations=8,
            max_completion_length=8,
            learning_rate=3e-2,
            max_steps=NUM_STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=5,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(12)]),
        processing_class=make_tokenizer(),
        callbacks=[check],
    )
    check.trainer = trainer
    trainer.train()
    assert len(check.outputs) == NUM_STEPS
    assert check.outputs[0] != check.outputs[-1], "the policy did not move: equal outputs would prove nothing"
    lines = [line for line in trainer.state.log_history if "reward" in line]
    assert len(lines) == NUM_STEPS
    for line in lines:
        # processes that drew different tokens together would have computed with a mixture of them
        assert line["sampling/sampling_logp_difference/max"] < MAX_LOGP_DIFFERENCE
    return trainer


def close(trainer):
    trainer.engine.close()
    assert all_processes_sum(1) == 2, "the process group ended with the engine"


def all_processes_sum(number):
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def matrix_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 2)


# -- the cases ---------------------------------------------------------------------------------------------------------


def ddp(folder):
    """Each process has an engine of its own, whose weights are the policy's through DDP."""

    def check_weights(model, engine):
        tensors = engine_tensors(engine)
        assert all(is_inside(parameter, tensors) for parameter in model.parameters())
        assert engine.weights.copied_bytes == 0

    close(train(folder, check_weights))


def tensor_parallel(folder):
    """One engine spans both processes: matrices are copied to where their halves lie, vectors are shared."""

    def check_weights(model, engine):
        tensors = engine_tensors(engine)
        assert all(is_inside(parameter, tensors) == (parameter.dim() == 1) for parameter in model.parameters())
        assert all_processes_sum(engine.weights.copied_bytes) == matrix_bytes(model)

    with mock.patch.object(shared_weights, "logger") as logger:
        trainer = train(folder, check_weights, vllm_tensor_parallel_size=2)
    (announced,) = logger.warning.call_args_list
    assert announced.args[-1] == "sharded over vLLM's processes"
    assert trainer.engine.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 2 * 4
    check_sampling(trainer.engine)
    close(trainer)


def check_sampling(engine):
    rank = dist.get_rank()
    sampling = Sampling(max_tokens=8, temperature=2.0)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed + 10 * rank)
        draws.append(engine.generate([PROMPTS[0]] * 2, sampling).ids)
    assert draws[0] == draws[1] != draws[2]
    # one request for four completions, two for each process
    both = [None, None]
    dist.all_gather_object(both, draws[0])
    assert len({tuple(ids) for ids in both[0] + both[1]}) == 4
    # one process has nothing to generate
    alone = engine.generate([] if rank else PROMPTS, GREEDY).ids
    assert len(alone) == (0 if rank else 4)
    assert engine.any_in_group(rank == 1)
    assert not engine.any_in_group(False)
    refused(engine, [[5] * (64 if rank else 1)], GREEDY, "prompt 1 has 64 tokens")
    refused(engine, PROMPTS, Sampling(max_tokens=8 + rank), "must sample alike")


def refused(engine, prompts, sampling, message):
    """Both processes refuse, though one alone is wrong: no process waits for another."""
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, sampling)


def fsdp2(folder):
    """The policy is sharded: every weight is gathered and copied, a bucket at a time."""
    bucket_bytes = 2**14
    peaks = []

    def check_weights(model, engine):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        with Allocations() as seen:
            engine.update_weights(model)
        assert engine.weights.copied_bytes == sum(parameter.nbytes for parameter in model.parameters())
        peaks.append(seen.peak_bytes)

    with (
        mock.patch.object(shared_weights, "logger") as logger,
        mock.patch.object(shared_weights, "BUCKET_BYTES", bucket_bytes),
    ):
        # wraps layers, whose weights' names change
        settings = {"activation_checkpointing": True}
        trainer = train(folder, check_weights, ShardedOnCPU, fsdp=True, fsdp_config=settings)
    (announced,) = logger.warning.call_args_list
    assert announced.args[-1] == "the policy is sharded over processes"
    # full buckets, and the weight that overfills one, with what gathering it makes besides
    largest = max(parameter.nbytes for parameter in make_policy().parameters())
    assert bucket_bytes <= max(peaks) <= bucket_bytes + 4 * largest < matrix_bytes(make_policy())
    close(trainer)


def fsdp2_tensor_parallel(folder):
    """Whole weights are gathered, and each process copies its half."""

    def check_weights(model, engine):
        vectors = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 1)
        assert all_processes_sum(engine.weights.copied_bytes) == matrix_bytes(model) + 2 * vectors

    close(train(folder, check_weights, ShardedOnCPU, fsdp=True, vllm_tensor_parallel_size=2))


def zero(stage):
    """Without a trainer: accelerate does not run DeepSpeed on a CPU."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = build("llama")
    engine = start(model)
    wrapped, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            # smaller parameters would not be sharded
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    outputs = []
    for seed in range(NUM_STEPS):
        ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
        wrapped.backward(wrapped(input_ids=ids, labels=ids).loss)
        wrapped.step()
        engine.update_weights(model)
        outputs.append(engine.generate(PROMPTS, GREEDY).ids)
        copy = build("llama")
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            copy.load_state_dict(model.state_dict())
        assert outputs[-1] == greedy_by_transformers(copy)
    assert outputs[0] != outputs[-1]
    engine.close()


CASES = {case.__name__: case for case in (ddp, tensor_parallel, fsdp2, fsdp2_tensor_parallel)}
CASES |= {f"zero{stage}": lambda folder, stage=stage: zero(stage) for stage in (2, 3)}

if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    for name in sys.argv[2:]:
        CASES[name](f"{sys.argv[1]}/{name}")
