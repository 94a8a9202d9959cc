"""`GRPOTrainer`: the order of the steps. What each step does lives in the part it calls."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from grpo_fast import loading
from grpo_fast.attention import can_pack, native_attention, packed_attention
from grpo_fast.batch import Sampling
from grpo_fast.completions import CompletionLog
from grpo_fast.config import GRPOConfig, as_dict
from grpo_fast.data import (
    RepeatSampler,
    check_chat_template,
    check_dataset,
    check_prompt_lengths,
)
from grpo_fast.generation import Engine, context_length, make_engine, require_vllm
from grpo_fast.importance import Correction
from grpo_fast.interrupt import SaveOnInterrupt
from grpo_fast.loss import Objective
from grpo_fast.metrics import PhaseTimer, StepTimer, mean_without_nan
from grpo_fast.policy import check_scoring, install_scoring
from grpo_fast.rewards import RewardFunc, RewardFunctions
from grpo_fast.trainer.rollouts import RolloutTrainer

logger = logging.getLogger(__name__)

SHARE_PROMPTS: dict[str, Any] = {"auto": "auto", "always": True, "never": False}


class GRPOTrainer(RolloutTrainer):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300) with TRL 1.16's arguments and numbers.

    Args:
        model: A folder or hub id, a causal LM, or a `PeftModel`.
        reward_funcs: One reward function or several, called as in TRL; see `grpo_fast.rewards.RewardFunctions`.
        args: The settings; None means `GRPOConfig("{model name}-GRPO")`.
        train_dataset: A `datasets.Dataset` with a `prompt` column (text or messages); its other columns are passed to
            the reward functions.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer; None loads the one at the model's path.
        reward_processing_classes: For reward models, which are not supported: must be None.
        callbacks: As in `transformers.Trainer`.
        optimizers: As in `transformers.Trainer`.
        quantization_config: Not supported: must be None.
        peft_config: A new adapter to train on a frozen model.
        tools: Not supported: must be None.
        rollout_func: Not supported: must be None.
        environment_factory: Not supported: must be None.

    Raises:
        ValueError: For every mistake in the arguments that can be told without training; the message names the
            argument, what was needed and what came.
        ImportError: If `use_vllm=True` and vLLM is not installed.
    """

    _tag_names = ("grpo-fast", "grpo")
    _name = "GRPO"
    # the loss is divided by the accumulation steps here
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        unsupported = {
            "reward_processing_classes": reward_processing_classes,
            "quantization_config": quantization_config,
            "tools": tools,
            "rollout_func": rollout_func,
            "environment_factory": environment_factory,
        }
        for name, value in unsupported.items():
            if value is not None:
                raise ValueError(f"{name} is not supported; leave it None")
        model_name = model if isinstance(model, str) else str(model.config._name_or_path)  # type: ignore[union-attr]
        args = GRPOConfig(f"{model_name.rstrip('/').split('/')[-1] or 'model'}-GRPO") if args is None else args
        self.reward_functions = RewardFunctions(reward_funcs, args.reward_weights)
        tokenizer = self._checked_tokenizer(model, model_name, args, train_dataset, eval_dataset, processing_class)

        set_seed(args.seed)
        if isinstance(model, str):
            model = loading.load_model(model, args)
        elif args.model_init_kwargs:
            logger.warning("model_init_kwargs is ignored: the model was passed as an instance")
        if peft_config is not None:
            model = loading.add_adapter(model, peft_config, args)
        elif hasattr(model, "disable_adapter"):
            loading.check_adapter(model)
            if args.beta:
                raise ValueError(
                    f"beta={args.beta} with a PeftModel is not supported; pass the base model, peft_config"
                )
        if args.disable_dropout:
            loading.disable_dropout(model)
        install_scoring(model)
        check_scoring(model)
        self.unpackable = can_pack(model)
        if self.unpackable is not None:
            logger.warning("%s cannot be packed (%s): rows run one by one", type(model).__name__, self.unpackable)
        self.ref_model = loading.make_reference(model) if args.beta else None

        self._read_settings(args)
        self._interrupt = SaveOnInterrupt()
        super().__init__(
            model=model,
            args=args,
            data_collator=_identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), self._interrupt, StepTimer(self.timer, self._metrics["train"])],
            optimizers=optimizers,
        )
        self._mirror_special_tokens(tokenizer)
        if self.ref_model is not None:
            install_scoring(self.ref_model)
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        self.model.add_model_tags(list(self._tag_names))
        # each process samples differently
        set_seed(args.seed, device_specific=True)
        self.engine = self._make_engine(args)

    @staticmethod
    def _checked_tokenizer(
        model: Any,
        name: str,
        args: GRPOConfig,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> PreTrainedTokenizerBase:
        """The tokenizer, after every check that needs no weights."""
        check_dataset(train_dataset, "train_dataset")
        datasets = {"train_dataset": train_dataset}
        if isinstance(eval_dataset, dict):
            datasets |= {f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()}
        elif eval_dataset is not None:
            datasets["eval_dataset"] = eval_dataset
        if args.use_vllm:
            require_vllm()
        context = context_length(loading.load_config(model, args))
        if tokenizer is None:
            tokenizer = loading.load_tokenizer(name, args)
        elif not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"processing_class must be a tokenizer, it is {type(tokenizer).__name__}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        for key, dataset in datasets.items():
            check_dataset(dataset, key)
            check_chat_template(dataset, tokenizer, key)
            check_prompt_lengths(dataset, tokenizer, key, context, as_dict(args.chat_template_kwargs))
        return tokenizer

    def _read_settings(self, args: GRPOConfig) -> None:
        """TRL's attributes, and the trainer's own state."""
        self.reward_funcs = self.reward_functions.functions
        self.reward_func_names = self.reward_functions.names
        self.reward_weights = self.reward_functions.weights
        assert args.steps_per_generation is not None
        assert args.generation_batch_size is not None
        self.steps_per_generation = args.steps_per_generation
        self.prompts_per_generation = args.generation_batch_size // args.num_generations
        self.num_generations = args.num_generations
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        self.num_iterations = args.num_iterations
        self.max_completion_length = args.max_completion_length
        self.temperature = args.temperature
        assert not isinstance(args.pad_to_multiple_of, str)
        self.pad_to_multiple_of = args.pad_to_multiple_of
        self.beta = args.beta
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        self.loss_type = args.loss_type
        self.scale_rewards = args.scale_rewards
        self.use_vllm = args.use_vllm
        self.shuffle_dataset = args.shuffle_dataset
        self.mask_truncated_completions = args.mask_truncated_completions
        self.chat_template_kwargs = as_dict(args.chat_template_kwargs)
        self.log_completions = args.log_completions
        self.objective = Objective(
            loss_type=args.loss_type,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=args.delta,
            beta=args.beta,
            bias_correction_kl=args.use_bias_correction_kl,
            max_completion_length=args.max_completion_length,
            correction=Correction(
                mode=args.vllm_importance_sampling_mode,
                clip_min=args.vllm_importance_sampling_clip_min,
                clip_max=args.vllm_importance_sampling_clip_max,
            )
            if args.use_vllm and args.vllm_importance_sampling_correction
            else None,
        )
        self.sampling = Sampling(
            max_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            extra=as_dict(args.generation_kwargs),
        )
        self.timer = PhaseTimer()
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs = CompletionLog(max_rows=args.generation_batch_size)
        self._pending_stats: list[Tensor] = []
        self._pending_metrics: dict[str, list[float]] = defaultdict(list)
        self._pending_extra_logs: dict[str, list[Any]] = defaultdict(list)
        self._step = 0
        self._last_loaded_step = -1
        self._buffered_inputs: list[dict[str, Any]] | None = None
        self._current_train_step_time = 0.0

    def _mirror_special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        generation = self.model.generation_config
        self.model.config.pad_token_id = tokenizer.pad_token_id
        generation.pad_token_id = tokenizer.pad_token_id
        ends = generation.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_token_ids = sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})

    def _make_engine(self, args: GRPOConfig) -> Engine:
        return make_engine(
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            args,
            eos_token_ids=self.eos_token_ids,
            context=self._generation_context,
            seed=args.seed + self.accelerator.process_index,
        )

    @contextmanager
    def _generation_context(self) -> Iterator[None]:
        """What transformers' generate runs under: the model's own attention, in the run's mixed precision."""
        with native_attention(self.model), self.accelerator.autocast():
            yield

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one generation each: `steps_per_generation` micro-batches."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.prompts_per_generation,
            repeat_count=self.num_iterations * self.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int]:
        return RepeatSampler(data_source=eval_dataset, mini_repeat_count=self.num_generations_eval, seed=self.args.seed)

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: generate if it is time, then forward and backward."""
        start = time.perf_counter()
        # in force through the backward pass: gradient checkpointing runs the layers again there
        with packed_attention(self.model), self.timer.phase("train"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        self._current_train_step_time += time.perf_counter() - start
        if self._step % self.current_gradient_accumulation_steps == 0:
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
        with torch.no_grad(), packed_attention(self.model):
            loss = self.compute_loss(model, batch)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float | None], start_time: float | None = None) -> None:
        """Add the means of the metrics since the last log, then log as `Trainer` does, and show the completions."""
        self._flush_stats()
        mode = self._mode
        for name, values in self._metrics[mode].items():
            logs[name if mode == "train" else f"eval_{name}"] = mean_without_nan(values)
        super().log(logs, start_time)
        self._metrics[mode].clear()
        if self.log_completions and self.accelerator.is_main_process and self._logs["prompt"]:
            self._logs.print_table(self.state.global_step, self.args.num_completions_to_print)
            self._logs.write(self.state.global_step, Path(self.args.output_dir) / "completions")
            self._logs.send(self.state.global_step, self.args.report_to, self.args.log_unique_prompts)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; Ctrl-C or SIGTERM finishes the step and leaves a checkpoint."""
        with self._interrupt.installed():
            return super().train(*args, **kwargs)


def _identity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows
