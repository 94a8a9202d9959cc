"""What is refused or warned about in a configuration, from its settings alone.

Every function takes the `GRPOConfig` after its spellings are normalised. A mistake is a ValueError that names the
field, what was needed and what came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

logger = logging.getLogger(__name__)

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED_LOSSES, "cispo", "sapo", "vespo")
IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": LOSS_TYPES,
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "reward_errors": ("raise", "none"),
    "scale_rewards": ("group", "batch", "none"),
    "share_prompts": ("auto", "always", "never"),
    "vllm_importance_sampling_mode": IS_MODES,
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers", "auto"),
}

# (what is needed, what holds then, fields); None passes
RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("generation_batch_size", "steps_per_generation", "num_iterations", "num_generations_eval"),
            *("max_completion_length", "max_tokens_per_pack", "pad_to_multiple_of", "num_completions_to_print"),
            *("ref_model_sync_steps", "vllm_max_model_length", "vllm_tensor_parallel_size"),
        ),
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        (
            *("beta", "epsilon", "epsilon_high", "router_aux_loss_coef", "entropy_coef_delta", "top_k"),
            *("max_tool_calling_iterations", "vllm_check_interval", "vllm_server_timeout"),
            *("off_policy_mask_threshold", "vllm_importance_sampling_clip_min", "dynamic_sampling_rounds"),
            "checkpointed_layers",
        ),
    ),
    (
        "above 0",
        lambda value: value > 0,
        (
            *("temperature", "repetition_penalty", "delta", "sapo_temperature_pos", "sapo_temperature_neg"),
            "vllm_importance_sampling_clip_max",
        ),
    ),
    ("in [1, 65535]", lambda value: 1 <= value <= 65535, ("vllm_server_port", "vllm_group_port")),
    # smaller ones TRL raises to 1e-4 without a word
    ("at least 1e-4", lambda value: value >= 1e-4, ("vespo_lambda_pos", "vespo_lambda_neg")),
    ("in (0, 1]", lambda value: 0 < value <= 1, ("top_p", "top_entropy_quantile", "vllm_gpu_memory_utilization")),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ("min_p", "ref_model_mixup_alpha")),
)

_VLLM_SERVER = (
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
    "vllm_group_port",
)
_VLLM_COLOCATED = (
    *("vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
    *("vllm_tensor_parallel_size", "vllm_engine_kwargs", "vllm_check_interval"),
)
_IS = tuple(f"vllm_importance_sampling_{name}" for name in ("mode", "clip_max", "clip_min"))
_VLLM = (
    *("vllm_mode", "vllm_structured_outputs_regex", *_VLLM_COLOCATED, *_VLLM_SERVER),
    *("vllm_importance_sampling_correction", *_IS),
)

# (what the fields need to have an effect, whether it is there, fields)
EFFECTS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("use_vllm=True", lambda args: args.use_vllm, _VLLM),
    ("vllm_mode='server'", lambda args: args.vllm_mode == "server", _VLLM_SERVER),
    ("vllm_mode='colocate'", lambda args: args.vllm_mode == "colocate", _VLLM_COLOCATED),
    (
        "vllm_server_base_url=None",
        lambda args: args.vllm_server_base_url is None,
        ("vllm_server_host", "vllm_server_port"),
    ),
    ("vllm_importance_sampling_correction=True", lambda args: args.vllm_importance_sampling_correction, _IS),
    (
        "use_vllm=False",
        lambda args: not args.use_vllm,
        ("cache_implementation", "use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    ),
    (
        "use_transformers_continuous_batching=True",
        lambda args: args.use_transformers_continuous_batching,
        ("transformers_continuous_batching_config",),
    ),
    ("loss_type='sapo'", lambda args: args.loss_type == "sapo", ("sapo_temperature_pos", "sapo_temperature_neg")),
    (
        "loss_type='vespo'",
        lambda args: args.loss_type == "vespo",
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    ),
    (
        "a loss_type that clips",
        lambda args: args.loss_type not in ("sapo", "vespo"),
        ("epsilon", "epsilon_high"),
    ),
    (
        "multi_objective_aggregation='sum_then_normalize'",
        lambda args: args.multi_objective_aggregation == "sum_then_normalize",
        ("scale_rewards",),
    ),
    ("sync_ref_model=True", lambda args: args.sync_ref_model, ("ref_model_mixup_alpha", "ref_model_sync_steps")),
    (
        "use_adaptive_entropy=True",
        lambda args: args.use_adaptive_entropy,
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    ),
    ("log_completions=True", lambda args: args.log_completions, ("num_completions_to_print", "log_unique_prompts")),
    ("use_liger_kernel=True", lambda args: args.use_liger_kernel, ("liger_kernel_config",)),
    ("gradient_checkpointing=True", lambda args: args.gradient_checkpointing, ("checkpointed_layers",)),
)


def check_supported(args: Any) -> None:
    """Refuse what the trainer cannot do (ValueError)."""
    if args.max_completion_length is None:
        raise ValueError("max_completion_length must be a number of tokens; it is None")
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True is not supported: a smaller batch would tear a prompt's completions apart; "
            "lower per_device_train_batch_size or max_tokens_per_pack instead"
        )
    if args.world_size > 1 and args.accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config: split_batches=True is not supported: per_device_train_batch_size counts the rows of a "
            "process; leave it False"
        )
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("parallelism_config with cp_size > 1 or sp_size > 1 is not supported")
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config={'fused_linear_cross_entropy': True} would replace the model's forward, which the "
            "fused LM head needs; leave the key out or set it to False"
        )


def check_values(args: Any) -> None:
    """Refuse a value that its field alone rules out (ValueError)."""
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; it is {getattr(args, name)!r}")
    for needed, holds, names in RANGES:
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {needed}; it is {value}")
    if (args.num_generations or 0) < 2:
        raise ValueError(
            f"num_generations must be at least 2, to compare completions of one prompt; it is {args.num_generations}"
        )


def check_combinations(args: Any) -> None:
    """Refuse settings that contradict each other (ValueError)."""
    is_colocated = args.use_vllm and args.vllm_mode == "colocate"
    if is_colocated and args.world_size % args.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size must divide the number of processes ({args.world_size}); it is "
            f"{args.vllm_tensor_parallel_size}"
        )
    _check_importance_sampling(args)
    url = args.vllm_server_base_url
    if url is not None and not url.startswith(("http://", "https://")):
        raise ValueError(f"vllm_server_base_url must start with http:// or https://; it is {url!r}")
    if args.delta is not None and args.loss_type not in CLIPPED_LOSSES:
        raise ValueError(
            f"delta={args.delta} bounds the ratio of the losses {', '.join(CLIPPED_LOSSES)}; loss_type is "
            f"{args.loss_type!r}, so leave delta None"
        )
    if args.sync_ref_model and args.beta == 0:
        raise ValueError("sync_ref_model=True needs a reference model, and beta=0.0 loads none; set beta above 0")
    if args.entropy_coef_min > args.entropy_coef_max:
        raise ValueError(
            f"entropy_coef_min must not be above entropy_coef_max ({args.entropy_coef_max}); it is "
            f"{args.entropy_coef_min}"
        )
    if args.log_memory and not args.skip_memory_metrics:
        raise ValueError(
            "log_memory=True starts the counters again that skip_memory_metrics=False reads for whole stages: set one "
            "of them only"
        )
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if args.dynamic_sampling_rounds and rows % args.num_generations:
        raise ValueError(
            f"dynamic_sampling_rounds={args.dynamic_sampling_rounds} replaces whole groups, so every process must have "
            f"whole groups: per_device_train_batch_size ({args.per_device_train_batch_size}) x steps_per_generation "
            f"({args.steps_per_generation}) = {rows} must be divisible by num_generations ({args.num_generations})"
        )
    kwargs = args.gradient_checkpointing_kwargs or {}
    if args.checkpointed_layers is not None and kwargs.get("every_n_layers", 1) != 1:
        raise ValueError(
            f"checkpointed_layers={args.checkpointed_layers} and gradient_checkpointing_kwargs['every_n_layers']="
            f"{kwargs['every_n_layers']} both say which layers recompute: set one of them only"
        )
    if args.log_completions_hub_repo is not None and not args.log_completions:
        raise ValueError(
            f"log_completions_hub_repo={args.log_completions_hub_repo!r} needs log_completions=True, which writes the "
            "completions to be uploaded"
        )


def _check_importance_sampling(args: Any) -> None:
    mode = args.vllm_importance_sampling_mode
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        raise ValueError(
            f"vllm_importance_sampling_clip_min ({low}) must be below vllm_importance_sampling_clip_max ({high})"
        )
    if args.vllm_importance_sampling_correction and mode.endswith("truncate") and low is None and high is None:
        raise ValueError(
            f"vllm_importance_sampling_mode={mode!r} needs vllm_importance_sampling_clip_min or "
            "vllm_importance_sampling_clip_max"
        )
    is_corrected = args.use_vllm and args.vllm_importance_sampling_correction
    if args.loss_type == "vespo" and is_corrected and not mode.startswith("token"):
        raise ValueError(
            "loss_type='vespo' weighs sequences itself: vllm_importance_sampling_mode must be 'token_truncate' or "
            f"'token_mask'; it is {mode!r}"
        )


def warn_of_doubtful_settings(args: Any) -> None:
    """Log what departs from the losses' papers, as TRL does, and in one line what was set without effect."""
    level = args.importance_sampling_level
    if args.loss_type == "luspo" and level != "sequence":
        logger.warning("loss_type='luspo' is defined with importance_sampling_level='sequence'; it is %r", level)
    if args.loss_type == "vespo" and level != "token":
        logger.warning("loss_type='vespo' weighs sequences itself: leave importance_sampling_level at 'token'")
    if args.loss_type in ("bnpo", "dr_grpo", "dapo", "cispo") and level == "sequence":
        logger.warning(
            "importance_sampling_level='sequence' with loss_type=%r weighs a sequence by its length; GSPO uses "
            "loss_type='grpo'",
            args.loss_type,
        )
    if args.fsdp and args.device.type == "cpu":
        logger.warning("fsdp is without effect on a CPU: accelerate wraps the model in DDP there")
    unused = _settings_without_effect(args)
    if unused:
        logger.warning("without effect: %s", ", ".join(f"{name} (needs {need})" for name, need in unused.items()))


def _settings_without_effect(args: Any) -> dict[str, str]:
    """Field -> what it would need, for fields that differ from their default."""
    defaults = {f.name: f.default for f in fields(args)}
    unused: dict[str, str] = {}
    for need, is_met, names in EFFECTS:
        if not is_met(args):
            for name in names:
                if getattr(args, name) != defaults[name]:
                    unused.setdefault(name, need)
    return unused
