"""What went wrong in vLLM, in the words of the trainer's settings."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

# room that a suggested share of the GPU leaves for what neither weights nor KV cache account for
UTILIZATION_MARGIN = 0.05
_CUDA_MEMORY = re.compile(r"out of memory", re.IGNORECASE)
_KV_TOO_SMALL = re.compile(r"larger than the available KV cache memory")
_ESTIMATED_LENGTH = re.compile(r"estimated maximum model length is (\d+)")
_NO_ROOM_FOR_KV = re.compile(r"No available memory for the cache blocks")
_DEVICE_FULL = re.compile(r"on device [^(]*\(([\d.]+)/([\d.]+) GiB\).*less than desired")
_HOST_FULL = re.compile(r"on node [^(]*\(([\d.]+)/([\d.]+) GiB\).*less than requested memory for kv")
_ONE_POOL = re.compile(r"one instance per process")


class EngineError(RuntimeError):
    """vLLM could not start or generate. An engine that raised it is closed."""


def explained_start(error: Exception, arguments: dict[str, Any], *, sequence_bytes: int, weight_bytes: int) -> str:
    """Why vLLM did not start and which setting to change, to what; "" if it is not for want of memory.

    Args:
        error: What `vllm.LLM` raised.
        arguments: What it was given.
        sequence_bytes: KV cache that one completion of the full length needs.
        weight_bytes: What the weights take in the engine's dtype.
    """
    text = str(error)
    if _KV_TOO_SMALL.search(text):
        return _kv_too_small(text, arguments, sequence_bytes)
    if _NO_ROOM_FOR_KV.search(text):
        return (
            "no memory is left for the KV cache: raise vllm_gpu_memory_utilization to "
            f"{_share(arguments, weight_bytes + sequence_bytes)}, it is {arguments['gpu_memory_utilization']}"
        )
    if match := _DEVICE_FULL.search(text):
        free, total = map(float, match.groups())
        return (
            f"{free:g} of the device's {total:g} GiB are free, fewer than the share it may take: lower "
            f"vllm_gpu_memory_utilization to at most {math.floor(100 * free / total) / 100:g}, it is "
            f"{arguments['gpu_memory_utilization']}, or free the device"
        )
    if match := _HOST_FULL.search(text):
        return (
            f"{match[1]} GiB of memory are free: lower kv_cache_memory_bytes in vllm_engine_kwargs below that, it is "
            f"{arguments['kv_cache_memory_bytes']}; one completion needs {sequence_bytes}"
        )
    if _ONE_POOL.search(text):
        return (
            "vllm_enable_sleep_mode=True allows one engine a process: call `trainer.engine.close()` on the trainer "
            "that has the other"
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CUDA_MEMORY.search(text):
        return (
            f"the device ran out of memory: the weights take {_mib(weight_bytes)} MiB; lower "
            f"vllm_gpu_memory_utilization (it is {arguments['gpu_memory_utilization']}), or in vllm_engine_kwargs "
            f"max_num_seqs (it is {arguments['max_num_seqs']}) or max_num_batched_tokens (it is "
            f"{arguments['max_num_batched_tokens']}), or set enforce_eager=True there"
        )
    return ""


def explained_wake(arguments: dict[str, Any]) -> str:
    """Which setting to change when the KV cache's memory could not be taken back."""
    return (
        "the KV cache's memory, released for training, could not be taken back: the trainer holds too much of the "
        f"device. Lower vllm_gpu_memory_utilization (it is {arguments['gpu_memory_utilization']}) or set "
        "kv_cache_memory_bytes in vllm_engine_kwargs"
    )


def _kv_too_small(text: str, arguments: dict[str, Any], sequence_bytes: int) -> str:
    given = arguments["kv_cache_memory_bytes"]
    length = arguments["max_model_len"]
    what = f"a completion of the full length needs {sequence_bytes} bytes of KV cache"
    if given is None:
        more = (
            f"raise vllm_gpu_memory_utilization (it is {arguments['gpu_memory_utilization']}), or set "
            f"kv_cache_memory_bytes in vllm_engine_kwargs to at least {sequence_bytes}"
        )
    else:
        more = f"raise kv_cache_memory_bytes in vllm_engine_kwargs to at least {sequence_bytes}, it is {given}"
    estimated = _ESTIMATED_LENGTH.search(text)
    if estimated is None:
        return f"{what}: {more}"
    return (
        f"{what}: {more}; or lower vllm_max_model_length to at most {estimated[1]}, it is "
        f"{length if length is not None else 'None, the whole context of the model'}"
    )


def _share(arguments: dict[str, Any], needed_bytes: int) -> str:
    """The share of the device that holds `needed_bytes`, in words."""
    if not torch.cuda.is_available():
        return "more"
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    share = max(arguments["gpu_memory_utilization"], needed_bytes / total) + UTILIZATION_MARGIN
    return f"at least {min(share, 1.0):.2f}"


def _mib(count: int) -> int:
    return math.ceil(count / 2**20)


def check_request(output: Any, sizes: set[int], prompt: int) -> None:
    """Refuse what a failed request left.

    Args:
        output: vLLM's `RequestOutput`.
        sizes: How many completions it may have.
        prompt: The first place of its prompt in the list that was given.

    Raises:
        EngineError: a completion is missing, was aborted, or failed.
    """
    if len(output.outputs) not in sizes:
        raise EngineError(
            f"vLLM returned {len(output.outputs)} completions of prompt {prompt}, asked for were {max(sizes)}"
        )
    for completion in output.outputs:
        if completion.finish_reason in (None, "abort", "error"):
            raise EngineError(
                f"vLLM did not finish completion {completion.index} of prompt {prompt}: its finish_reason is "
                f"{completion.finish_reason!r} after {len(completion.token_ids)} tokens"
            )


def check_logps(logps: list[float], prompt: int) -> None:
    """Refuse log-probs that are missing or NaN: the weights or the activations are not finite.

    Raises:
        EngineError: naming the prompt and the token.
    """
    for place, logp in enumerate(logps):
        if logp is None or math.isnan(logp):
            raise EngineError(
                f"vLLM reports the log-prob {logp} for token {place} of a completion of prompt {prompt}: the policy's "
                "weights or activations are not finite"
            )
