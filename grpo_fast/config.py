"""`GRPOConfig`: TRL 1.16's fields, names and defaults, on `transformers.TrainingArguments`, plus ours at the end.

Source of the names and defaults: TRL 1.16 `GRPOConfig`. What the settings alone show to be wrong is refused here
(`grpo_fast.config_checks`), also where TRL notices only in its trainer or at the first loss.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from grpo_fast import config_checks
from grpo_fast.config_checks import IS_MODES, LOSS_TYPES
from grpo_fast.legacy import LegacyArguments, replace_legacy_arguments


def _help(text: str, default: Any) -> Any:
    """A dataclass field with its help text, escaped for argparse."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class GRPOConfig(LegacyArguments, TrainingArguments):
    """Settings of `GRPOTrainer`: a flat dataclass that `HfArgumentParser` and `TrlParser` can fill.

    Every field of `transformers.TrainingArguments` is here too, and arguments that TRL or transformers once had
    (`grpo_fast.legacy`). Sizes are counted in completions, as in TRL: `per_device_train_batch_size=8` with
    `num_generations=8` is one prompt a device.

    Raises:
        ValueError: If sizes do not divide, a choice is unknown, a bound is out of range, or settings contradict each
            other. The message names the field, what was needed and what came.
    """

    # a list, as in TRL: subclasses add theirs to it
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "transformers_continuous_batching_config",
        "generation_kwargs",
        "chat_template_kwargs",
        "vllm_engine_kwargs",
    ]

    # defaults that differ from TrainingArguments, as in TRL
    learning_rate: float = _help("The initial learning rate.", 1e-6)
    logging_steps: float = _help("Log every this many optimizer steps; below 1, a share of all steps.", 10)
    gradient_checkpointing: bool = _help("Recompute activations in the backward pass to save memory.", True)
    bf16: bool | None = _help("bfloat16 mixed precision; None means True unless fp16 is set.", None)
    remove_unused_columns: bool | None = _help("Drop the columns other than `prompt`: rewards then see none.", False)

    # model and reference
    model_init_kwargs: dict[str, Any] | str | None = _help("Arguments of from_pretrained when model is a string.", None)
    trust_remote_code: bool = _help("Allow code that comes with the model.", False)
    router_aux_loss_coef: float | None = _help(
        "Mixture of experts: weight of the auxiliary loss; None is the model's.", None
    )
    disable_dropout: bool = _help("Set every dropout probability of the policy and the reference to 0.", False)
    cast_lm_head_to_fp32: bool = _help("Keep the LM head in fp32.", False)

    # data and batches
    num_generations: int = _help("Completions a prompt (G); at least 2.", 8)
    num_generations_eval: int | None = _help("Completions a prompt in evaluation; None means num_generations.", None)
    max_completion_length: int = _help("Most new tokens of a completion.", 512)
    ds3_gather_for_generation: bool = _help("DeepSpeed ZeRO-3: gather the whole model to generate.", True)
    shuffle_dataset: bool | None = _help("Shuffle the prompts.", True)
    pad_to_multiple_of: int | str | None = _help(
        "Pad the id tensors to a multiple of this; 'auto' is 128 on Neuron, else none.", "auto"
    )
    generation_batch_size: int | None = _help("Completions generated at a time, over all devices.", None)
    steps_per_generation: int | None = _help(
        "Micro-batches a generation serves; None means gradient_accumulation_steps.", None
    )

    # sampling
    temperature: float = _help("Sampling temperature; log-probs are of logits / temperature too.", 1.0)
    top_p: float = _help("Sample from the smallest set of tokens with this probability mass.", 1.0)
    top_k: int = _help("Sample from this many most probable tokens; 0 means all.", 0)
    min_p: float | None = _help("Drop tokens below this share of the most probable token's probability.", None)
    generation_kwargs: dict[str, Any] | str | None = _help("More sampling arguments; they win over the others.", None)
    chat_template_kwargs: dict[str, Any] | str | None = _help("More arguments of the chat template.", None)
    repetition_penalty: float = _help("Above 1 discourages repetition.", 1.0)
    cache_implementation: str | None = _help("Key-value cache of transformers' generate.", None)
    use_transformers_continuous_batching: bool = _help("Generate with transformers' continuous batching.", False)
    transformers_continuous_batching_config: dict[str, Any] | str | None = _help("Its settings.", None)
    use_transformers_paged: bool = _help("Deprecated name of use_transformers_continuous_batching.", False)

    # vLLM
    use_vllm: bool = _help("Generate with vLLM.", False)
    vllm_mode: str = _help("'colocate': in the trainer's process; 'server': a `vllm serve` process.", "colocate")
    vllm_model_impl: str = _help("vLLM's model implementation: 'vllm' or 'transformers'.", "vllm")
    vllm_enable_sleep_mode: bool = _help(
        "Release vLLM's KV cache while training, and on a CPU its own copies of weights (a bf16 engine's of an fp32 "
        "policy), which each rollout fills anew. Weights that the policy shares stay, and on a GPU all do.",
        False,
    )
    vllm_structured_outputs_regex: str | None = _help("Regular expression completions must match.", None)
    vllm_server_base_url: str | None = _help("Server mode: base URL.", None)
    vllm_server_host: str = _help("Server mode: host.", "0.0.0.0")
    vllm_server_port: int = _help("Server mode: port.", 8000)
    vllm_server_timeout: float = _help("Server mode: seconds to wait for the server.", 240.0)
    vllm_group_port: int = _help("Server mode: port of the weight-update group.", 51216)
    vllm_gpu_memory_utilization: float = _help("Share of the GPU's memory vLLM may take.", 0.3)
    vllm_max_model_length: int | None = _help("vLLM's context length; None means the model's.", None)
    vllm_tensor_parallel_size: int = _help("GPUs a vLLM engine spans.", 1)

    # objective
    beta: float = _help("Weight of the KL penalty to the reference model; 0 loads no reference.", 0.0)
    num_iterations: int = _help("Passes over each generation batch (mu).", 1)
    epsilon: float = _help("The importance ratio is clipped below at 1 - epsilon.", 0.2)
    delta: float | None = _help("Upper bound of the unclipped ratio (two-sided clip).", None)
    epsilon_high: float | None = _help(
        "The ratio is clipped above at 1 + epsilon_high (cispo: at epsilon_high); None means epsilon.", None
    )
    sapo_temperature_neg: float = _help("loss_type='sapo': temperature for negative advantages.", 1.05)
    sapo_temperature_pos: float = _help("loss_type='sapo': temperature for positive advantages.", 1.0)
    vespo_k_pos: float = _help("loss_type='vespo': k for positive advantages.", 2.0)
    vespo_lambda_pos: float = _help("loss_type='vespo': lambda for positive advantages.", 3.0)
    vespo_k_neg: float = _help("loss_type='vespo': k for negative advantages.", 3.0)
    vespo_lambda_neg: float = _help("loss_type='vespo': lambda for negative advantages.", 2.0)
    importance_sampling_level: str = _help("One importance ratio a 'token', or one a 'sequence' (GSPO).", "token")
    reward_weights: list[float] | None = _help("One weight a reward function; None means 1.", None)
    multi_objective_aggregation: str = _help(
        "'sum_then_normalize' or 'normalize_then_sum' (GDPO).", "sum_then_normalize"
    )
    scale_rewards: str = _help("Divide advantages by the std of the 'group', the 'batch', or 'none'.", "group")
    loss_type: str = _help(f"One of {', '.join(LOSS_TYPES)}.", "dapo")
    mask_truncated_completions: bool = _help("Leave completions without an end token out of the loss.", False)
    sync_ref_model: bool = _help("Move the reference towards the policy.", False)
    ref_model_mixup_alpha: float = _help("sync_ref_model: share of the policy in the mix.", 0.6)
    ref_model_sync_steps: int = _help("sync_ref_model: steps between two mixes.", 512)
    top_entropy_quantile: float = _help("Share of tokens, by entropy, in the policy loss.", 1.0)
    entropy_coef: float = _help("Weight of the entropy bonus.", 0.0)
    use_adaptive_entropy: bool = _help("Adapt entropy_coef to entropy_target.", False)
    entropy_coef_min: float = _help("use_adaptive_entropy: least entropy_coef.", 0.0)
    entropy_coef_max: float = _help("use_adaptive_entropy: greatest entropy_coef.", 1.0)
    entropy_coef_delta: float = _help("use_adaptive_entropy: step of entropy_coef.", 0.005)
    entropy_target: float = _help("use_adaptive_entropy: target entropy.", 0.2)
    max_tool_calling_iterations: int | None = _help(
        "Most rounds of tool calls a completion; None means no limit.", None
    )
    vllm_importance_sampling_correction: bool = _help(
        "Weight the policy loss by trainer's over sampler's probability.", True
    )
    vllm_importance_sampling_mode: str = _help(f"One of {', '.join(IS_MODES)}.", "sequence_mask")
    vllm_importance_sampling_clip_max: float | None = _help("Upper bound of the importance weight.", 3.0)
    vllm_importance_sampling_clip_min: float | None = _help("Lower bound of the importance weight.", None)
    off_policy_mask_threshold: float | None = _help(
        "Leave sequences of negative advantage further off-policy than this out of the loss.", None
    )
    use_bias_correction_kl: bool = _help("Multiply the KL term by the importance ratio.", True)

    # logging
    log_completions: bool = _help("Print, and write as parquet, a table of completions at every log.", False)
    log_multimodal: bool = _help("Log images beside completions.", True)
    num_completions_to_print: int | None = _help("Completions to print; None means all.", None)
    log_unique_prompts: bool = _help("Weights & Biases, trackio: log a prompt once.", False)
    log_completions_hub_repo: str | None = _help(
        "Hub data set the completions are uploaded to; needs log_completions.", None
    )

    # deprecated in TRL 1.16
    vllm_importance_sampling_cap: float | None = _help("Deprecated: vllm_importance_sampling_clip_max.", None)

    # grpo-fast's own
    max_tokens_per_pack: int | None = _help(
        "Most tokens of a packed or padded forward pass (a longer row runs alone); None goes by device and memory.",
        None,
    )
    share_prompts: str = _help(
        "Run a prompt once for its completions of the same pack: True ('always'), False ('never'), or 'auto' where it "
        "saves 2% of the tokens.",
        "auto",
    )
    skip_zero_gradient_rows: bool = _help(
        "Do not run rows of which nothing reaches a gradient: advantage 0, no KL, no entropy bonus, no auxiliary loss. "
        "Metrics of the loss are then of the other rows.",
        True,
    )
    vllm_engine_kwargs: dict[str, Any] | str | None = _help("More arguments of vLLM's LLM(...).", None)
    vllm_check_interval: int | None = _help(
        "Optimizer steps between two comparisons of vLLM's log-probs with the trainer's on a canary; None as often as "
        "0.2% of the run's time allows. 0 checks nothing, not even weights.",
        None,
    )
    log_memory: bool = _help(
        "Log the peak memory of each phase. The counters that it is read from, torch.cuda.max_memory_allocated or the "
        "process's peak resident set, then start again at every phase, for whoever else reads them, too.",
        False,
    )
    overlap_rewards: bool = _help(
        "use_vllm: score each group of completions while vLLM still generates others. Reward functions are then called "
        "once a group, not once a batch, and in another thread, one call at a time (async ones side by side): they "
        "must not need the other groups, the main thread, or torch's global random state.",
        False,
    )
    reward_errors: str = _help(
        "What a reward function that raises, or returns NaN or an infinity, does: 'raise' stops the run; 'none' gives "
        "those completions the reward None and logs their share as rewards/<name>/error.",
        "raise",
    )
    dynamic_sampling_rounds: int = _help(
        "DAPO: further rollouts, at most this many a generation, that replace groups without a signal; 0 is off. Each "
        "generates as many prompts as such groups are left, from a pass of its own over train_dataset. A step costs "
        "more generation, s + s^2 + ... of it where a share s of the groups has no signal, in small batches one after "
        "another; and the training pass has more rows with a gradient. Metrics are of all that was rolled out.",
        0,
    )
    checkpointed_layers: int | None = _help(
        "gradient_checkpointing: how many of the model's layers, from the first on, recompute; None as few as the free "
        "memory allows.",
        None,
    )

    def __post_init__(self) -> None:
        """Fill derived values, and check everything that can be checked without data or a model."""
        replace_legacy_arguments(self)
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()
        self._replace_deprecated()
        self._normalise_spellings()
        config_checks.check_supported(self)
        config_checks.check_values(self)
        self._derive_batch_sizes()
        config_checks.check_combinations(self)
        if self.should_log:
            config_checks.warn_of_doubtful_settings(self)

    def _replace_deprecated(self) -> None:
        """Fields that TRL 1.16 has and deprecates, with its meaning."""
        advice = {
            "use_liger_kernel": 'use model_init_kwargs={"use_kernels": True}; the fused LM head is always on',
            "use_transformers_paged": "use use_transformers_continuous_batching",
            "vllm_importance_sampling_cap": "use vllm_importance_sampling_clip_max",
        }
        given = [f"{name} ({text})" for name, text in advice.items() if getattr(self, name) not in (None, False)]
        if given:
            warnings.warn(f"deprecated arguments: {', '.join(given)}", FutureWarning, stacklevel=4)
        if self.use_transformers_paged:
            self.use_transformers_continuous_batching = True
        if self.vllm_importance_sampling_cap is not None:
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        if self.use_liger_kernel:
            # True is refused below
            defaults = {"fused_linear_cross_entropy": False}
            self.liger_kernel_config: dict[str, bool] = defaults | (self.liger_kernel_config or {})

    def _normalise_spellings(self) -> None:
        """Values that the command line gives as text, and values that mean the same."""
        self.scale_rewards = _spelled_out(self.scale_rewards, true="group", false="none")
        self.share_prompts = _spelled_out(self.share_prompts, true="always", false="never")
        if self.top_k == -1:
            # vLLM's other spelling of the whole vocabulary, which transformers' generate does not know
            self.top_k = 0
        multiple = self.pad_to_multiple_of
        if not isinstance(multiple, str):
            return
        if multiple.lower() == "auto":
            # Neuron compiles anew for every shape
            self.pad_to_multiple_of = 128 if self.device.type == "neuron" else None
        elif multiple.lower() in ("none", "null"):
            self.pad_to_multiple_of = None
        elif multiple.isdecimal():
            self.pad_to_multiple_of = int(multiple)
        else:
            raise ValueError(f"pad_to_multiple_of must be a whole number, 'auto' or 'none'; it is {multiple!r}")

    def _derive_batch_sizes(self) -> None:
        """Fill generation_batch_size and steps_per_generation; TRL refuses both together even where they agree."""
        step = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is None:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            self.generation_batch_size = step * self.steps_per_generation
        if self.generation_batch_size % step:
            raise ValueError(
                f"generation_batch_size must be divisible by the global batch size "
                f"(per_device_train_batch_size x processes = {step}); it is {self.generation_batch_size}"
            )
        steps = self.generation_batch_size // step
        if self.steps_per_generation not in (None, steps):
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} means {steps} steps_per_generation; "
                f"{self.steps_per_generation} was given: set one of them, not both"
            )
        self.steps_per_generation = steps
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                "generation_batch_size (per_device_train_batch_size x processes x steps_per_generation = "
                f"{self.generation_batch_size}) must be divisible by num_generations ({self.num_generations}): "
                "a prompt's completions are generated together"
            )
        generations_eval = self.num_generations_eval or self.num_generations
        eval_batch = self.per_device_eval_batch_size * self.world_size
        if self.do_eval and self.eval_strategy != "no" and eval_batch % generations_eval:
            raise ValueError(
                f"per_device_eval_batch_size x processes ({eval_batch}) must be divisible by the completions a prompt "
                f"in evaluation ({generations_eval})"
            )


def _spelled_out(value: Any, *, true: str, false: str) -> str:
    """A choice given as a bool, or as the text of one."""
    text = str(value).lower()
    return true if text == "true" else false if text == "false" else value


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A dict field after `TrainingArguments` has parsed it, {} for None."""
    assert not isinstance(value, str), "TrainingArguments parses strings"
    return value or {}
