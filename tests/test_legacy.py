"""Arguments that TRL and transformers dropped: one warning, and what they meant still happens."""

import dataclasses
import warnings

import pytest
from transformers import HfArgumentParser, TrainingArguments

from grpo_fast import GRPOConfig
from grpo_fast.legacy import ENGINE_KEYS, LEGACY, NO_EFFECT, SUCCESSORS

# legacy name -> a value, the field that takes its place and that field's value
MEANINGS = {
    "token_entropy_percentile_threshold": (0.8, "top_entropy_quantile", 0.2),
    "vllm_guided_decoding_regex": ("a+", "vllm_structured_outputs_regex", "a+"),
    "vllm_max_model_len": (2048, "vllm_max_model_length", 2048),
    "wandb_log_unique_prompts": (True, "log_unique_prompts", True),
    "adafactor": (True, "optim", "adafactor"),
    "evaluation_strategy": ("steps", "eval_strategy", "steps"),
    "include_tokens_per_second": (True, "include_num_input_tokens_seen", "all"),
    "no_cuda": (True, "use_cpu", True),
    "warmup_ratio": (0.1, "warmup_steps", 0.1),
    "vllm_dtype": ("bfloat16", "vllm_engine_kwargs", {"dtype": "bfloat16"}),
    "vllm_enable_prefix_caching": (False, "vllm_engine_kwargs", {"enable_prefix_caching": False}),
}


def make(tmp_path, **kwargs):
    return GRPOConfig(str(tmp_path), **{"use_cpu": True, "save_strategy": "no"} | kwargs)


def test_every_legacy_argument_is_told_what_it_means():
    assert set(MEANINGS) == set(SUCCESSORS) | set(ENGINE_KEYS)
    assert set(LEGACY) == set(MEANINGS) | set(NO_EFFECT) | {"max_prompt_length"}


@pytest.mark.trl
def test_none_is_an_argument_of_today():
    import trl

    assert not set(LEGACY) & {f.name for f in dataclasses.fields(trl.GRPOConfig)}
    assert not set(LEGACY) & {f.name for f in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("name", MEANINGS)
def test_its_successor_takes_the_value(tmp_path, name):
    value, successor, meaning = MEANINGS[name]
    with pytest.warns(FutureWarning, match=f"{name} .use {successor}"):
        args = make(tmp_path, **{name: value})
    assert getattr(args, successor) == meaning
    assert getattr(args, name) is None


@pytest.mark.parametrize("name", NO_EFFECT)
def test_one_without_effect_says_so(tmp_path, name):
    with pytest.warns(FutureWarning, match=f"{name} .has no effect: "):
        make(tmp_path, **{name: "auto"})


def test_warmup_ratio_is_a_share_of_all_steps(tmp_path):
    with pytest.warns(FutureWarning, match="warmup_ratio"):
        assert make(tmp_path, warmup_ratio=0.1).get_warmup_steps(200) == 20


def test_max_prompt_length_keeps_its_value(tmp_path):
    with pytest.warns(FutureWarning, match="max_prompt_length .*cut from the left"):
        assert make(tmp_path, max_prompt_length=32).max_prompt_length == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(tmp_path, max_prompt_length=None).max_prompt_length is None


def test_one_warning_names_all_and_points_at_the_caller(tmp_path):
    with pytest.warns(FutureWarning, match="max_prompt_length .*use_liger_loss .*no_cuda") as seen:
        GRPOConfig(str(tmp_path), no_cuda=True, max_prompt_length=32, use_liger_loss=False)
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"warmup_ratio": 0.1, "warmup_steps": 5},
            "warmup_ratio is the old name of warmup_steps: 0.1 and 5 were given",
        ),
        (
            {"evaluation_strategy": "steps", "eval_strategy": "epoch"},
            "evaluation_strategy is the old name of eval_stra",
        ),
        (
            {"vllm_dtype": "float16", "vllm_engine_kwargs": {"dtype": "auto"}},
            "vllm_dtype='float16' and .*'auto'.* were",
        ),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\); it is 1.0"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_agreement_is_no_contradiction(tmp_path):
    with pytest.warns(FutureWarning):
        args = make(tmp_path, eval_strategy="steps", evaluation_strategy="steps", warmup_ratio=0.2, warmup_steps=0.2)
    assert (args.eval_strategy, args.warmup_steps) == ("steps", 0.2)


def test_engine_settings_join_the_given_ones(tmp_path):
    with pytest.warns(FutureWarning):
        args = make(tmp_path, vllm_dtype="float16", vllm_engine_kwargs='{"enforce_eager": true}', use_vllm=True)
    assert args.vllm_engine_kwargs == {"enforce_eager": True, "dtype": "float16"}


def test_a_saved_configuration_loads_without_a_second_warning(tmp_path):
    given = {name: value for name, (value, _, _) in MEANINGS.items()} | dict.fromkeys(NO_EFFECT, "auto")
    with pytest.warns(FutureWarning):
        args = make(tmp_path, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GRPOConfig(**args.to_dict()).to_dict() == args.to_dict()


def test_flags_need_no_value(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--no_cuda", "--overwrite_output_dir", "--warmup_ratio", "0.03"]
    with pytest.warns(FutureWarning, match="no_cuda .*overwrite_output_dir .*warmup_ratio"):
        (args,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses([*argv, "--max_prompt_length", "16"])
    assert (args.use_cpu, args.warmup_steps, args.max_prompt_length) == (True, 0.03, 16)
