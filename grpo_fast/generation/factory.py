"""The engine a run asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grpo_fast.batch import Sampling
from grpo_fast.config import GRPOConfig, as_dict
from grpo_fast.generation.base import Engine
from grpo_fast.generation.continuous_batch import ContinuousBatch
from grpo_fast.generation.transformers_engine import PaddedBatch, TransformersEngine
from grpo_fast.generation.vllm_engine import VLLMEngine
from grpo_fast.generation.vllm_server import VLLMServer


def make_engine(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: GRPOConfig,
    *,
    eos_token_ids: list[int],
    context: Callable[[], AbstractContextManager[Any]],
    seed: int,
    unwrap: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Engine:
    """The engine: vLLM with `use_vllm=True`, in this process or as a server, else transformers, paged if asked for.

    Args:
        model: The unwrapped policy.
        processing_class: Its tokenizer or processor.
        args: The run's settings.
        eos_token_ids: Tokens that end a completion.
        context: Entered around transformers' generation.
        seed: Of vLLM's start-up; the same on all processes that an engine spans.
        unwrap: Gives transformers' generation the model to call; see `unwrap_model_for_generation`.

    Raises:
        ValueError: The settings do not fit the model or each other; the message names them.
    """
    sampling = Sampling(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        extra=as_dict(args.generation_kwargs),
    )
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if args.use_vllm and args.vllm_mode == "server":
        return VLLMServer(
            model=model,
            base_url=args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}",
            eos_token_ids=eos_token_ids,
            timeout_s=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            sampling=sampling,
            structured_outputs_regex=args.vllm_structured_outputs_regex,
        )
    if args.use_vllm:
        return _vllm_engine(model, processing_class, args, sampling, mixed, eos_token_ids=eos_token_ids, seed=seed)
    is_processor = isinstance(processing_class, ProcessorMixin)
    tokenizer: Any = processing_class.tokenizer if is_processor else processing_class
    batching: Any = PaddedBatch(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=_multiple(args))
    if args.use_transformers_continuous_batching:
        if is_processor:
            raise ValueError(
                "use_transformers_continuous_batching=True takes text only; processing_class is the processor "
                f"{type(processing_class).__name__}"
            )
        options = as_dict(args.transformers_continuous_batching_config)
        batching = ContinuousBatch(dtype=mixed, fp32_head=args.cast_lm_head_to_fp32, options=options)
    config: Any = model.config
    return TransformersEngine(
        model=model,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_ids=eos_token_ids,
        bos_token_id=tokenizer.bos_token_id,
        cache_implementation=args.cache_implementation,
        # a drawn image token would have no image behind it
        suppress_tokens=[config.image_token_id] if is_processor else None,
        sampling=sampling,
        batching=batching,
        context=context,
        unwrap=unwrap,
    )


def _multiple(args: GRPOConfig) -> int | None:
    assert not isinstance(args.pad_to_multiple_of, str), "GRPOConfig parses strings"
    return args.pad_to_multiple_of


def _vllm_engine(
    model: nn.Module,
    processing_class: Any,
    args: GRPOConfig,
    sampling: Sampling,
    mixed: torch.dtype | None,
    *,
    eos_token_ids: list[int],
    seed: int,
) -> VLLMEngine:
    assert args.steps_per_generation is not None
    own = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return VLLMEngine(
        model=model,
        processing_class=processing_class,
        # a sampler in the precision of the trainer's matrix products keeps importance ratios near 1
        dtype=mixed or own,
        max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation * args.vllm_tensor_parallel_size,
        eos_token_ids=eos_token_ids,
        max_model_len=args.vllm_max_model_length,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        seed=seed,
        sampling=sampling,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        trust_remote_code=args.trust_remote_code,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        vllm_engine_kwargs={"model_impl": args.vllm_model_impl} | as_dict(args.vllm_engine_kwargs),
        shows_progress=not args.disable_tqdm and args.process_index == 0,
    )
