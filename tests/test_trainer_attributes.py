"""Attributes of a trainer: the ones TRL's has, and what callbacks change is heard."""

import pytest
import torch
from transformers import TrainerCallback

import grpo_fast
from tests.tiny_lm import save
from tests.trainer_runs import SEED, assert_same_run, build, digits, is_same, plain, trained

# -- attributes that callbacks change ----------------------------------------------------------------------------------


class Annealing(TrainerCallback):
    """Sets attributes of the trainer after each step."""

    def __init__(self, **schedules):
        self.schedules = schedules

    def on_step_end(self, args, state, control, **kwargs):
        for name, values in self.schedules.items():
            setattr(self.trainer, name, values[state.global_step - 1])


def annealed(package, folder, schedules, **kwargs):
    callback = Annealing(**schedules)
    return trained(package, folder, callbacks=[callback], patch=lambda t: setattr(callback, "trainer", t), **kwargs)


@pytest.mark.trl
@pytest.mark.parametrize(
    ("schedules", "settings"),
    [
        ({"beta": [0.5, 0.0, 0.0]}, {"beta": 0.05, "num_iterations": 3, "learning_rate": 0.02}),
        ({"epsilon_low": [1e-4] * 3, "epsilon_high": [2e-4] * 3}, {"num_iterations": 3}),
        ({"loss_type": ["grpo", "dr_grpo", "grpo"], "max_completion_length": [5] * 3}, {}),
        ({"entropy_coef": [2.0, 0.3, 0.0]}, {"entropy_coef": 0.1}),
        ({"scale_rewards": ["none", "batch", "group"], "reward_weights": [torch.tensor([1.0, 3.0])] * 3}, {}),
        ({"mask_truncated_completions": [True] * 3, "top_entropy_quantile": [0.7, 0.4, 0.2]}, {}),
    ],
    ids=lambda value: ", ".join(value),
)
def test_annealed_attributes_are_heard_as_in_trl(tmp_path, schedules, settings):
    import trl

    if "beta" in settings:
        settings = {**settings, "model": save(tmp_path / "model", seed=SEED)}
    theirs = annealed(trl, tmp_path, schedules, **settings)
    ours = annealed(grpo_fast, tmp_path, schedules, **settings)
    assert_same_run(ours, theirs)
    assert not is_same(ours, plain(**settings)), "the attribute is not heard"


def test_beta_does_not_rise_without_a_reference_model(tmp_path):
    trainer = build(grpo_fast, tmp_path)
    trainer.beta = 0.1
    with pytest.raises(ValueError, match=r"beta=0\.1 needs a reference model, and a trainer made with beta=0 has none"):
        trainer.train()


def test_an_annealed_temperature_is_the_samplers_and_the_scorers(tmp_path):
    """TRL hears it in neither: its sampler and its head keep the temperature they were made with."""
    seen = []

    def spread(completions, **kwargs):
        seen.append(len(set(completions)))
        return digits(completions)

    trainer = annealed(
        grpo_fast, tmp_path, {"temperature": [1e-3, 1.0, 1.0]}, rewards=[spread], num_generations=8, max_steps=3
    )
    entropies = [line["entropy"] for line in trainer.state.log_history if "entropy" in line]
    # as cold as that, a prompt has one completion, and its tokens no doubt
    assert seen[1] == 1 < min(seen[0], seen[2])
    assert entropies[1] < 1e-3 < min(entropies[0], entropies[2])


# -- attributes that users read ----------------------------------------------------------------------------------------

ATTRIBUTES = (
    "_buffered_inputs", "_current_train_step_time", "_is_vlm", "_last_loaded_step", "_logs", "_metrics",
    "_pending_extra_logs", "_pending_metrics", "_step", "_textual_logs", "_tokenizer", "_total_train_tokens",
    "accelerator", "aux_loss_enabled", "beta", "chat_template", "chat_template_kwargs", "entropy_coef",
    "environments", "eos_token_ids", "epsilon_high", "epsilon_low", "generation_config", "generation_kwargs",
    "importance_sampling_level", "log_completions", "loss_type", "max_completion_length",
    "multi_objective_aggregation", "num_completions_to_print", "num_generations", "num_generations_eval",
    "num_iterations", "pad_to_multiple_of", "processing_class", "ref_model", "reward_func_names", "reward_funcs",
    "reward_processing_classes", "reward_weights", "rollout_func", "router_aux_loss_coef", "scale_rewards",
    "shuffle_dataset", "temperature", "tools", "top_entropy_quantile", "use_vllm", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_mode",
)  # fmt: skip
# helpers of TRL's own vLLM and ZeRO code, and of its tools, which live elsewhere here
NOT_OURS = {
    "_dist", "_multi_environment", "_image_pad_token_id",
    "_video_pad_token_id", "continuous_batching_config", "environment_factories",
}  # fmt: skip


def test_users_find_the_attributes_they_read(tmp_path):
    trainer = build(grpo_fast, tmp_path)
    assert not [name for name in ATTRIBUTES if not hasattr(trainer, name)]
    assert trainer._textual_logs is trainer._logs
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer.args.generation_batch_size == trainer.args.steps_per_generation * 8


@pytest.mark.trl
@pytest.mark.parametrize("settings", [{}, {"beta": 0.1, "reward_weights": [1.0, 0.5]}], ids=str)
def test_attributes_are_trls(tmp_path, settings):
    import trl

    model = save(tmp_path / "model", seed=SEED)
    ours, theirs = (build(package, tmp_path, model=model, **settings) for package in (grpo_fast, trl))
    for name, value in vars(theirs).items():
        if name in NOT_OURS:
            continue
        assert hasattr(ours, name), name
        own = getattr(ours, name)
        if name == "generation_kwargs":
            continue
        assert isinstance(own, type(value)) or type(value).__module__.startswith("trl"), name
        if isinstance(value, bool | int | float | str | list) and name not in ("model_accepts_loss_kwargs",):
            assert own == value, name
    assert set(ours._logs) == set(theirs._logs)
    # TRL leaves it to transformers, whose default it is
    assert vars(ours.generation_config) == vars(theirs.generation_config) | {"use_cache": True}
