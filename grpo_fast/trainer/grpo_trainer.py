"""`GRPOTrainer`: what a run is made of. What each step does lives in the part it calls."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from grpo_fast import activations, adapters, data, loading, reference
from grpo_fast.attention import adds_virtual_tokens
from grpo_fast.compatibility import refuse_patched_library
from grpo_fast.completions import CompletionLog
from grpo_fast.config import GRPOConfig, as_dict
from grpo_fast.generation import context_length, require_vllm
from grpo_fast.interrupt import SaveOnInterrupt
from grpo_fast.memory import make_meter
from grpo_fast.metrics import PhaseTimer, Stats, StepTimer
from grpo_fast.policy import aux_loss_coef, install_scoring
from grpo_fast.rewards import RewardFunc, check_rewards, is_async, make_rewards
from grpo_fast.self_check import check_scoring
from grpo_fast.tools import Toolbox, make_toolbox, warn_experimental
from grpo_fast.trainer.dataloaders import DataTrainer, settle_stream_loading
from grpo_fast.trainer.memory_planning import MemoryPlanning
from grpo_fast.trainer.names import *  # noqa: F403 - scripts import them from TRL's module of this name
from grpo_fast.trainer.optimizers import OptimizerTrainer
from grpo_fast.trainer.refilling import RefillTrainer
from grpo_fast.trainer.reporting import ReportingTrainer
from grpo_fast.trainer.step_memory import StepMemoryTrainer

logger = logging.get_logger(__name__)


class SupportsReset(Protocol):
    """An environment: `reset` begins an episode and may show something; other public methods are tools."""

    def reset(self, **row: Any) -> str | list[dict[str, Any]] | None: ...


RolloutFunc = Callable[[list[Any], "GRPOTrainer"], dict[str, Any]]
EnvironmentFactory = Callable[[], SupportsReset]


class GRPOTrainer(RefillTrainer, OptimizerTrainer, DataTrainer, ReportingTrainer, StepMemoryTrainer):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300) with TRL 1.16's arguments and numbers.

    Args:
        model: A folder or hub id, a model (causal or vision-language), or a `PeftModel`.
        reward_funcs: One source of rewards or several, called as in TRL: functions (also async), folders or hub ids of
            sequence classifiers, modules.
        args: The settings; None means `GRPOConfig("{model name}-GRPO")`.
        train_dataset: A data set with a `prompt` column (text or messages); its other columns are passed to the reward
            functions. None where an environment brings the prompts.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer or processor; None loads the one at the model's path.
        reward_processing_classes: Tokenizers of reward models; None loads theirs.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.
        quantization_config: How a model given by name is quantised.
        peft_config: A new adapter to train on a frozen model.
        tools: Functions that completions may call.
        rollout_func: Takes the place of generation: `rollout_func(prompts, trainer)` returns `prompt_ids`,
            `completion_ids`, `logprobs` and further fields for the reward functions.
        environment_factory: Makes environments, or a dict of such by the column `environment`.

    Raises:
        ValueError: For every mistake in the arguments that can be told without training; the message names the
            argument, what was needed and what came.
        TypeError: If an argument is of a type that cannot be used.
        ImportError: If `use_vllm=True` and vLLM is not installed, or `peft_config` is given and peft is not.
    """

    # the loss is divided by the accumulation steps here
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
    ) -> None:
        refuse_patched_library()
        args = _settled_args(args, model)
        if rollout_func is not None:
            warn_experimental("rollout_func")
        # all that needs no weights first
        config = loading.load_config(model, args)
        processing_class = self._settle_processing_class(model, args, processing_class)
        toolbox = make_toolbox(
            processing_class,
            tools,
            environment_factory,
            chat_template_kwargs=as_dict(args.chat_template_kwargs),
            eos_token_ids=loading.declared_eos_token_ids(config),
        )
        environment_rewards = toolbox.environment_rewards if toolbox else []
        check_rewards(reward_funcs, reward_processing_classes, args, environment_rewards=environment_rewards)
        train_dataset = data.settle_train_dataset(train_dataset, args, environment_factory)
        self._check_datasets(train_dataset, eval_dataset, args, config, processing_class, toolbox)
        settle_stream_loading(args, train_dataset, eval_dataset)
        if args.use_vllm:
            require_vllm()

        set_seed(args.seed)
        model = self._settle_model(model, args, quantization_config, peft_config)
        rewards = make_rewards(reward_funcs, reward_processing_classes, args, environment_rewards=environment_rewards)
        self.reward_funcs, self.reward_func_names = rewards.functions, rewards.names
        self.reward_processing_classes, self.reward_weights = rewards.processing_classes, rewards.weights
        self._read_settings(args)
        self._settle_tools(toolbox, rollout_func)
        self.ref_model = reference.make_reference(model, args)
        self._interrupt = SaveOnInterrupt()
        super().__init__(
            model=model,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[
                *(callbacks or []),
                self._interrupt,
                StepTimer(self.timer, self._metrics["train"]),
                MemoryPlanning(self),
            ],
            optimizers=optimizers,
        )
        loading.refuse_data_parallel(args)
        self._prepare_reporting()
        self._prepare_reward_models()
        if self.ref_model is not None:
            self.ref_model = reference.prepare_reference(self, self.ref_model)
            if args.sync_ref_model:
                self.add_callback(reference.SyncRefModelCallback(self.ref_model, self.accelerator))
        self.model.add_model_tags(list(self._tag_names))
        # each process samples differently
        set_seed(args.seed, device_specific=True)
        self._start_engine()

    # -- settling the arguments ----------------------------------------------------------------------------------------

    def _settle_processing_class(
        self, model: Any, args: GRPOConfig, processing_class: Any
    ) -> PreTrainedTokenizerBase | ProcessorMixin:
        if processing_class is None:
            processing_class = loading.load_processing_class(model, args)
        self._tokenizer = loading.prepare_tokenizer(processing_class)
        self._is_vlm = isinstance(processing_class, ProcessorMixin)
        if self._is_vlm and args.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching=True generates from text alone, processing_class is a processor; "
                "use use_vllm=True"
            )
        if self._is_vlm:
            loading.find_unused_parameters(args)
            if args.max_prompt_length is not None:
                raise ValueError(
                    f"max_prompt_length={args.max_prompt_length} would cut images out of prompts: leave it None with a "
                    "processor, and drop long prompts from the data set"
                )
        return processing_class

    def _check_datasets(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        args: GRPOConfig,
        config: Any,
        processing_class: Any,
        toolbox: Toolbox | None,
    ) -> None:
        has_environment = toolbox is not None and toolbox.environments is not None
        for name, dataset in {"train_dataset": train_dataset, **data.named_eval_datasets(eval_dataset)}.items():
            data.check_dataset(dataset, name, has_environment=has_environment)
            data.check_chat_template(dataset, processing_class, name)
            if toolbox is not None:
                data.check_conversational(dataset, name)
            data.check_prompt_lengths(
                dataset,
                self._tokenizer,
                name,
                context_length(config),
                as_dict(args.chat_template_kwargs),
                max_prompt_length=args.max_prompt_length,
            )

    def _settle_model(self, model: Any, args: GRPOConfig, quantization_config: Any, peft_config: Any) -> nn.Module:
        """The policy, ready to be scored; and how its rows run."""
        if isinstance(model, str):
            model = loading.load_model(model, args, quantization_config)
        else:
            loading.warn_of_ignored_settings(args, quantization_config)
        loading.mirror_pad_token(model, self._tokenizer)
        self.eos_token_ids = loading.eos_token_ids(model, self._tokenizer)
        self.router_aux_loss_coef = aux_loss_coef(model, args.router_aux_loss_coef)
        self.aux_loss_enabled = self.router_aux_loss_coef != 0
        activations.check_count(model, args.checkpointed_layers)
        model = adapters.prepare_adapters(model, peft_config, args)
        if args.disable_dropout:
            loading.disable_dropout(model)
        install_scoring(model)
        self.unpackable = check_scoring(model)
        if args.cast_lm_head_to_fp32:
            loading.cast_lm_head_to_fp32(model)
        self.pads_rows = self._is_vlm or adds_virtual_tokens(model)
        if self.pads_rows:
            logger.warning("%s: rows run padded, not packed", self._why_padded(model))
        elif self.unpackable is not None:
            name = type(model).__name__
            logger.warning("%s cannot be packed (%s): rows run padded, sorted by length", name, self.unpackable)
        return model

    def _why_padded(self, model: nn.Module) -> str:
        if self._is_vlm:
            return f"{type(model).__name__} sees images"
        return str(self.unpackable)

    def _settle_tools(self, toolbox: Toolbox | None, rollout_func: RolloutFunc | None) -> None:
        self.toolbox, self.rollout_func = toolbox, rollout_func
        self.tools = toolbox.tools if toolbox else []
        self._standalone_tools = toolbox.standalone if toolbox else []
        self._has_async_funcs = any(is_async(function) for function in (*self.reward_funcs, *self.tools))
        self.chat_template = toolbox.chat_template if toolbox else None
        self.environments = None

    def _read_settings(self, args: GRPOConfig) -> None:
        """TRL's attributes, which users read and change; and the trainer's own state."""
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        iterations = args.max_tool_calling_iterations
        self.max_tool_calling_iterations = sys.maxsize if iterations is None else iterations
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        self.chat_template_kwargs = as_dict(args.chat_template_kwargs)
        self.generation_kwargs = as_dict(args.generation_kwargs)
        for name in SAME_NAMED:
            setattr(self, name, getattr(args, name))
        self._entropy_bonus_enabled = args.entropy_coef != 0 or args.use_adaptive_entropy
        # no bonus before a window's entropy is known
        self._last_world_entropy = math.inf
        self._entropy_window_stats = None
        self.timer = PhaseTimer(make_meter(args.device) if args.log_memory else None)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs = CompletionLog(max_rows=(args.generation_batch_size or 0) * (1 + args.dynamic_sampling_rounds))
        self._pending_stats: list[Stats] = []
        self._pending_metrics = defaultdict(list)
        self._pending_extra_logs = defaultdict(list)
        self._step = 0
        self._last_loaded_step = -1
        self._buffered_inputs = None
        self._host_rows = []
        self._current_train_step_time = 0.0

    @property
    def _textual_logs(self) -> CompletionLog:
        """`_logs` under its former name."""
        return self._logs

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: generate if it is time, then forward and backward."""
        start = time.perf_counter()
        # in force through the backward pass: gradient checkpointing runs the layers again there
        with self._scoring_attention(self.model), self.timer.phase("train"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        self._current_train_step_time += time.perf_counter() - start
        if self.accelerator.sync_gradients:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
            self._flush_stats()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Generate for a batch and compute its loss."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self._scoring_attention(self.model):
            loss = self.compute_loss(model, batch)
        return loss.mean().detach(), None, None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; Ctrl-C or SIGTERM finishes the step and leaves a checkpoint."""
        # an earlier run may have ended within a generation batch
        self._step, self._buffered_inputs, self._running = 0, None, None
        with self._interrupt.installed(), self._small_steps():
            return super().train(*args, **kwargs)


# settings that are attributes of the trainer under their own name, as in TRL
SAME_NAMED = (
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "use_transformers_continuous_batching",
    "pad_to_multiple_of",
    "shuffle_dataset",
    "beta",
    "loss_type",
    "importance_sampling_level",
    "scale_rewards",
    "multi_objective_aggregation",
    "mask_truncated_completions",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "use_vllm",
    "vllm_mode",
    "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "num_completions_to_print",
)


def _settled_args(args: GRPOConfig | None, model: Any) -> GRPOConfig:
    if args is None:
        name = model if isinstance(model, str) else str(model.config._name_or_path)
        return GRPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-GRPO")
    if not isinstance(args, GRPOConfig):
        raise TypeError(
            f"args must be a grpo_fast.GRPOConfig, it is {type(args).__module__}.{type(args).__name__}: import "
            "GRPOConfig from grpo_fast"
        )
    return args


def identity(rows: Any) -> Any:
    """The data collator: rows stay a list of dicts."""
    return rows
