"""`GRPOConfig`: TRL's fields and defaults; what is wrong is named before anything is loaded."""

import dataclasses
import logging
import re
import subprocess
import sys
import warnings

import pytest
from transformers import HfArgumentParser

from grpo_fast import GRPOConfig
from grpo_fast.config_checks import CHOICES, EFFECTS, LOSS_TYPES, RANGES
from grpo_fast.legacy import LEGACY

OURS = {
    "max_tokens_per_pack",
    "share_prompts",
    "vllm_check_interval",
    "vllm_engine_kwargs",
    "log_memory",
    "overlap_rewards",
    "reward_errors",
    "skip_zero_gradient_rows",
    "dynamic_sampling_rounds",
    "checkpointed_layers",
}


def make(tmp_path, **kwargs):
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **kwargs)


@pytest.mark.trl
def test_fields_and_defaults_are_trls():
    import trl

    ours = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    assert set(ours) - set(theirs) == OURS | set(LEGACY)
    assert {name: ours[name] for name in theirs if ours[name] != theirs[name]} == {}


@pytest.mark.trl
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fp16": True},
        {"scale_rewards": True},
        {"scale_rewards": False},
        {"pad_to_multiple_of": "null"},
        {"pad_to_multiple_of": "64"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"generation_batch_size": 32},
        {"steps_per_generation": 3},
        {"eval_strategy": "steps", "num_generations_eval": 2},
        {"chat_template_kwargs": '{"enable_thinking": false}'},
    ],
    ids=str,
)
def test_derived_values_are_trls(tmp_path, settings):
    import trl

    ours = make(tmp_path, **settings)
    theirs = trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    shared = {f.name for f in dataclasses.fields(trl.GRPOConfig)} - {"accelerator_config"}
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2.*it is 1"),
        ({"num_generations": None}, "num_generations must be at least 2.*it is None"),
        ({"per_device_train_batch_size": 6}, "divisible by num_generations"),
        ({"generation_batch_size": 12}, "generation_batch_size must be divisible by the global batch size"),
        (
            {"generation_batch_size": 16, "steps_per_generation": 1},
            "means 2 steps_per_generation; 1 was given.*not both",
        ),
        ({"eval_strategy": "steps", "per_device_eval_batch_size": 3}, "per_device_eval_batch_size"),
        ({"loss_type": "ppo"}, "loss_type must be one of .*'ppo'"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level must be one of token, sequence; it is 'row'"),
        ({"scale_rewards": "row"}, "scale_rewards must be one of"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation must be one of"),
        ({"vllm_importance_sampling_mode": "token"}, "vllm_importance_sampling_mode must be one of"),
        ({"vllm_mode": "remote"}, "vllm_mode must be one of"),
        ({"vllm_server_base_url": "localhost:8000"}, "vllm_server_base_url must start with http"),
        (
            {"use_vllm": True, "vllm_tensor_parallel_size": 2},
            r"vllm_tensor_parallel_size must divide the number of processes \(1\); it is 2",
        ),
        ({"use_vllm": True, "loss_type": "vespo"}, "loss_type='vespo' .* it is 'sequence_mask'"),
        ({"log_memory": True, "skip_memory_metrics": False}, "log_memory=True starts the counters again"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
        ({"max_completion_length": None}, "max_completion_length must be a number of tokens"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of must be a whole number, 'auto' or 'none'; it is 'many'"),
        ({"delta": 1.5, "loss_type": "cispo"}, "delta=1.5 bounds .* loss_type is 'cispo'"),
        ({"sync_ref_model": True}, "sync_ref_model=True needs a reference model"),
        ({"entropy_coef_min": 0.5, "entropy_coef_max": 0.1}, "entropy_coef_min must not be above .*0.1.; it is 0.5"),
        ({"log_completions_hub_repo": "me/logs"}, "log_completions_hub_repo='me/logs' needs log_completions=True"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "vllm_importance_sampling_clip_min .* must be below"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "needs vllm_importance_sampling_clip_min",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_a_server_s_own_parallelism_is_no_business_of_the_trainer_s(tmp_path, caplog):
    make(tmp_path, use_vllm=True, vllm_mode="server", vllm_tensor_parallel_size=2)
    assert "vllm_tensor_parallel_size (needs vllm_mode='colocate')" in caplog.text


def test_a_batch_is_not_split_over_processes(tmp_path, monkeypatch):
    make(tmp_path, accelerator_config={"split_batches": True})
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="split_batches=True is not supported"):
        make(tmp_path, accelerator_config={"split_batches": True})


# what a range needs -> values just inside and outside
EDGES = {
    "at least 1": ([1], [0]),
    "at least 0": ([0], [-2]),
    "above 0": ([1e-3], [0, -1]),
    "at least 1e-4": ([1e-4], [0.9e-4]),
    "in (0, 1]": ([1e-3, 1], [0, 1.001]),
    "in [0, 1]": ([0, 1], [-0.001, 1.001]),
    "in [1, 65535]": ([1, 65535], [0, 65536]),
}


@pytest.mark.parametrize(("needed", "holds", "names"), RANGES, ids=[needed for needed, _, _ in RANGES])
def test_every_range_is_checked(tmp_path, needed, holds, names):
    inside, outside = EDGES[needed]
    assert all(holds(value) for value in inside)
    for name in names:
        for value in outside:
            with pytest.raises(ValueError, match=re.escape(f"{name} must be {needed}; it is {value}")):
                make(tmp_path, **{name: value})


def test_choices_and_ranges_name_fields():
    names = {f.name for f in dataclasses.fields(GRPOConfig)}
    tables = [*CHOICES, *(n for _, _, group in RANGES for n in group), *(n for _, _, group in EFFECTS for n in group)]
    assert set(tables) <= names


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_and_level_is_taken(tmp_path, loss_type, level):
    args = make(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    assert (args.loss_type, args.importance_sampling_level) == (loss_type, level)


def test_everything_of_trl_is_taken(tmp_path):
    args = make(
        tmp_path,
        beta=0.1,
        cast_lm_head_to_fp32=True,
        entropy_coef=0.01,
        log_completions=True,
        log_completions_hub_repo="me/logs",
        max_tool_calling_iterations=3,
        off_policy_mask_threshold=0.5,
        router_aux_loss_coef=0.001,
        sync_ref_model=True,
        top_entropy_quantile=0.2,
        use_adaptive_entropy=True,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config='{"max_memory_percent": 0.4}',
    )
    assert args.transformers_continuous_batching_config == {"max_memory_percent": 0.4}


def test_deprecated_fields_of_trl_keep_their_meaning(tmp_path):
    with pytest.warns(FutureWarning, match="use_transformers_paged .*vllm_importance_sampling_cap") as seen:
        args = make(tmp_path, use_transformers_paged=True, vllm_importance_sampling_cap=2.0, use_liger_kernel=True)
    assert len(seen) == 1
    assert args.use_transformers_continuous_batching
    assert args.vllm_importance_sampling_clip_max == 2.0
    assert args.liger_kernel_config == {"fused_linear_cross_entropy": False}
    with (
        pytest.warns(FutureWarning, match="use_liger_kernel"),
        pytest.raises(ValueError, match="fused_linear_cross_entropy"),
    ):
        make(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "luspo"}, "loss_type='luspo' is defined with importance_sampling_level='sequence'"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "leave importance_sampling_level at 'token'"),
        ({"importance_sampling_level": "sequence"}, "GSPO uses loss_type='grpo'"),
        ({"vllm_model_impl": "transformers", "top_p": 0.9}, r"without effect: vllm_model_impl \(needs use_vllm=True\)"),
        ({"use_vllm": True, "vllm_server_port": 1}, r"vllm_server_port \(needs vllm_mode='server'\)"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_gpu_memory_utilization": 0.5},
            r"vllm_gpu_memory_utilization \(needs vllm_mode='colocate'\)",
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://a", "vllm_server_port": 1},
            r"vllm_server_port \(needs vllm_server_base_url=None\)",
        ),
        ({"num_completions_to_print": 2, "vespo_k_pos": 1.0}, "vespo_k_pos .*, num_completions_to_print"),
    ],
)
def test_doubtful_settings_are_named_in_one_line(tmp_path, caplog, settings, message):
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        make(tmp_path, **settings)
    (record,) = (r for r in caplog.records if r.name.startswith("grpo_fast"))
    assert re.search(message, record.getMessage())


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"use_vllm": True, "vllm_model_impl": "auto"}],
)
def test_sound_settings_pass_without_a_word(tmp_path, caplog, settings):
    with caplog.at_level(logging.WARNING, logger="grpo_fast"), warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, **settings)
    assert [r for r in caplog.records if r.name.startswith("grpo_fast")] == []


def test_a_saved_configuration_loads(tmp_path):
    args = make(tmp_path, generation_batch_size=32, scale_rewards=False, model_init_kwargs={"dtype": "bfloat16"})
    again = GRPOConfig(**args.to_dict())
    assert again.to_dict() == args.to_dict()
    assert dataclasses.replace(args, learning_rate=1e-5).learning_rate == 1e-5


def test_subclasses_extend_it(tmp_path):
    @dataclasses.dataclass
    class Config(GRPOConfig):
        _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["extra"]  # noqa: RUF005 - as scripts write it
        extra: dict | str | None = None

    assert Config(str(tmp_path), use_cpu=True, extra='{"a": 1}').extra == {"a": 1}


def test_every_field_can_be_given_on_the_command_line(tmp_path):
    parser = HfArgumentParser((GRPOConfig,))
    assert "--max_tokens_per_pack" in parser.format_help()
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--epsilon_high", "0.28", "--top_p", "0.9"]
    argv += ["--generation_kwargs", '{"seed": 1}', "--scale_rewards", "false", "--top_k", "-1", "--no_shuffle_dataset"]
    (args,) = parser.parse_args_into_dataclasses(argv)
    assert (args.epsilon_high, args.top_p, args.generation_kwargs) == (0.28, 0.9, {"seed": 1})
    assert (args.scale_rewards, args.top_k, args.shuffle_dataset) == ("none", 0, False)


YAML = """
model_name_or_path: some/model
dataset_name: some/data
output_dir: {output_dir}
use_cpu: true
learning_rate: 2.0e-6
loss_type: grpo
scale_rewards: false
reward_weights: [1.0, 0.5]
chat_template_kwargs:
  enable_thinking: false
max_prompt_length: 64
"""


@pytest.mark.trl
@pytest.mark.parametrize("scale_rewards", ["group", "true", "False", "batch"])
def test_trl_parser_takes_it_beside_trls_other_arguments(tmp_path, scale_rewards):
    from trl import ModelConfig, ScriptArguments, TrlParser

    file = tmp_path / "config.yaml"
    file.write_text(YAML.format(output_dir=tmp_path))
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "--beta", "0.1", "--scale_rewards", scale_rewards]
    )
    assert (args.beta, args.max_prompt_length) == (0.1, None)
    assert args.scale_rewards == {"true": "group", "False": "none"}.get(scale_rewards, scale_rewards)

    with pytest.warns(FutureWarning, match="max_prompt_length"):
        script, args, model = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config(
            ["--config", str(file), "--loss_type", "bnpo"]
        )
    assert (script.dataset_name, model.model_name_or_path) == ("some/data", "some/model")
    assert (args.learning_rate, args.loss_type, args.scale_rewards) == (2e-6, "bnpo", "none")
    assert (args.reward_weights, args.chat_template_kwargs) == ([1.0, 0.5], {"enable_thinking": False})
    assert args.max_prompt_length == 64


def test_import_is_light():
    """`import grpo_fast` brings neither transformers nor an engine nor a kernel compiler."""
    code = (
        "import time, torch; start = time.perf_counter(); import grpo_fast; seconds = time.perf_counter() - start;"
        "import sys; heavy = {'vllm', 'flash_attn', 'triton', 'peft', 'transformers'} & set(sys.modules);"
        "before = set(sys.modules); assert not heavy - {'triton'}, heavy; print(seconds)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 1.5
