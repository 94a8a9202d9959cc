"""`GRPOConfig`: TRL's fields and defaults; what is wrong is named before anything is loaded."""

import dataclasses
import subprocess
import sys

import pytest
from transformers import HfArgumentParser

from grpo_fast import GRPOConfig

OURS = {"max_tokens_per_pack", "share_prompts", "vllm_engine_kwargs"}


def make(tmp_path, **kwargs):
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **kwargs)


@pytest.mark.trl
def test_fields_and_defaults_are_trls():
    import trl

    ours = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    assert set(ours) - set(theirs) == OURS
    assert {name: ours[name] for name in theirs if ours[name] != theirs[name]} == {}


def test_derived_values(tmp_path):
    args = make(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, scale_rewards=True)
    assert (args.steps_per_generation, args.generation_batch_size) == (2, 8)
    assert args.bf16 is True
    assert args.scale_rewards == "group"
    assert args.pad_to_multiple_of is None
    args = make(tmp_path, per_device_train_batch_size=8, generation_batch_size=32)
    assert args.steps_per_generation == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2.*it is 1"),
        ({"per_device_train_batch_size": 6}, "divisible by num_generations"),
        ({"generation_batch_size": 12}, "generation_batch_size must be divisible by the global batch size"),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "not both"),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 3}, "per_device_eval_batch_size"),
        ({"loss_type": "ppo"}, "loss_type must be one of .*'ppo'"),
        ({"loss_type": "cispo"}, "loss_type must be one of .*'cispo'"),
        ({"scale_rewards": "row"}, "scale_rewards must be one of"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' is not supported"),
        ({"sync_ref_model": True}, "sync_ref_model=True is not supported"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 is not supported"),
        ({"vllm_mode": "server"}, "vllm_mode must be 'colocate'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"max_tokens_per_pack": 0}, "max_tokens_per_pack must be at least 1"),
        ({"vllm_importance_sampling_mode": "token"}, "vllm_importance_sampling_mode must be one of"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "vllm_importance_sampling_clip_min .* must be below"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "needs vllm_importance_sampling_clip_min",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **change)


def test_every_field_can_be_given_on_the_command_line(tmp_path):
    parser = HfArgumentParser((GRPOConfig,))
    assert "--max_tokens_per_pack" in parser.format_help()
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--epsilon_high", "0.28", "--top_p", "0.9"]
    (args,) = parser.parse_args_into_dataclasses([*argv, "--generation_kwargs", '{"seed": 1}'])
    assert (args.epsilon_high, args.top_p, args.generation_kwargs) == (0.28, 0.9, {"seed": 1})


def test_import_is_light():
    """`import grpo_fast` brings neither transformers nor an engine nor a kernel compiler."""
    code = (
        "import time, torch; start = time.perf_counter(); import grpo_fast; seconds = time.perf_counter() - start;"
        "import sys; heavy = {'vllm', 'flash_attn', 'triton', 'peft', 'transformers'} & set(sys.modules);"
        "before = set(sys.modules); assert not heavy - {'triton'}, heavy; print(seconds)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 1.5
