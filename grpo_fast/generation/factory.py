"""The engine a run asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from grpo_fast.config import GRPOConfig, as_dict
from grpo_fast.generation.base import Engine
from grpo_fast.generation.transformers_engine import TransformersEngine
from grpo_fast.generation.vllm_engine import VLLMEngine


def make_engine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: GRPOConfig,
    *,
    eos_token_ids: list[int],
    context: Callable[[], AbstractContextManager[Any]],
    seed: int,
) -> Engine:
    """An engine: vLLM with `use_vllm=True`, transformers' `generate` otherwise.

    Args:
        model: The unwrapped policy.
        tokenizer: Its tokenizer.
        args: The run's settings.
        eos_token_ids: Tokens that end a completion.
        context: Entered around transformers' `generate`.
        seed: Of vLLM's start-up.
    """
    if not args.use_vllm:
        return TransformersEngine(
            model=model,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_ids=eos_token_ids,
            bos_token_id=tokenizer.bos_token_id,
            cache_implementation=args.cache_implementation,
            context=context,
        )
    assert args.steps_per_generation is not None
    # a sampler in the precision of the trainer's matrix products keeps importance ratios near 1
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return VLLMEngine(
        model=model,
        tokenizer=tokenizer,
        dtype=mixed or next(model.parameters()).dtype,
        max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,
        eos_token_ids=eos_token_ids,
        max_model_len=args.vllm_max_model_length,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        seed=seed,
        sampling_options=as_dict(args.generation_kwargs),
        vllm_engine_kwargs={"model_impl": args.vllm_model_impl} | as_dict(args.vllm_engine_kwargs),
    )
