"""A vLLM engine in the trainer's process, generating from the trainer's own weights.

The engine is built from the model object alone: a temporary folder holds the config, and the weights are read from
the trainer's parameters, which then become views into the engine's tensors (`shared_weights`).
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.adapters import has_adapters
from grpo_fast.batch import Completions, Sampling
from grpo_fast.generation.base import (
    Engine,
    GroupCallback,
    base_model,
    check_options,
    check_prompts,
    report_groups,
)
from grpo_fast.generation.shared_weights import SharedWeights
from grpo_fast.generation.vllm_faults import (
    EngineError,
    explained_start,
    explained_wake,
)
from grpo_fast.generation.vllm_lifetime import RunningLLM
from grpo_fast.generation.vllm_loader import register_loader
from grpo_fast.generation.vllm_lora import EngineAdapter, lora_arguments, why_merged
from grpo_fast.generation.vllm_processes import (
    any_in,
    gather_batch,
    tensor_parallel_group,
)
from grpo_fast.generation.vllm_requests import request_seed, request_settings, runs_of_rows
from grpo_fast.generation.vllm_sampler import report_policy_logps
from grpo_fast.generation.vllm_sleep import EngineMemory, fill_before_steps, sleep_arguments
from grpo_fast.generation.vllm_start import (
    MAX_BATCHED_TOKENS,
    check_arguments,
    cpu_arguments,
    quiet_start,
    sequence_bytes,
)
from grpo_fast.generation.vllm_steps import completions_of, group_listener, run_requests, vllm_prompt
from grpo_fast.generation.vllm_weights import write_config
from grpo_fast.generation.weight_map import WeightMap

logger = logging.getLogger(__name__)

# rows of each weight that `check_weights` compares; all rows are seen in time
CHECKED_ROWS = 1
# options that vLLM resolves with a tokenizer
TEXT_OPTIONS = frozenset({"stop", "bad_words", "structured_outputs", "detokenize", "include_stop_str_in_output"})


class VLLMEngine(Engine):
    """vLLM's offline engine, one per process or one over several (tensor parallel).

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
        shows_progress: bool = False,
    ) -> None:
        """Start an engine on the weights of `model`, whose parameters become views into the engine's where they can.

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
            tensor_parallel_size: Processes that hold the engine's weights together: ranks 0 to T - 1, T to 2T - 1, ...
                Each of them makes the same calls of `generate`, with its own prompts.
            seed: Of the engine's start-up; the same on all processes that it spans.
            kv_cache_memory_bytes: Size of the KV cache. None means what `gpu_memory_utilization` leaves on a GPU, and
                what `max_num_seqs` completions need, at most 512 MiB, on a CPU.
            sampling: The run's own settings, used by `generate` unless it is given others; the attribute `sampling`.
            structured_outputs_regex: Completions match it; it wins over `structured_outputs` in `Sampling.extra`.
            trust_remote_code: Whether vLLM may run code that comes with the model.
            enable_sleep_mode: Whether the KV cache's memory is free outside of `awake`. On a CPU that of weights that
                are the engine's own, such as bf16 copies of an fp32 policy, is free, too: they are copied from `model`
                when they are first needed inside, and an optimizer writes none of them.
            vllm_engine_kwargs: More arguments of `vllm.LLM`; they win over all of the above. With `enable_lora=False`
                LoRA adapters are added into copies of the weights.
            shows_progress: Whether each generation has a progress bar.

        Raises:
            ImportError: vLLM is not installed.
            ValueError: an argument is not supported, vLLM's model has parameters that `model` does not fill, or no
                place for one of its adapters.
            RuntimeError: vLLM does not hold the weights it was given.
            EngineError: there is not enough memory; the message says which setting to change.
        """
        self._llm: Any = None
        self._memory: EngineMemory | None = None
        self._fault: str | None = None
        check_arguments(model, tensor_parallel_size, vllm_engine_kwargs or {})
        self.sampling = sampling
        self._eos_token_ids = eos_token_ids
        self._has_tokenizer = processing_class is not None
        self._structured_outputs_regex = structured_outputs_regex
        self._shows_progress = shows_progress
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
            "tensor_parallel_size": tensor_parallel_size,
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
        with quiet_start(), tempfile.TemporaryDirectory(prefix="grpo_fast_") as folder:
            write_config(model, folder)
            if self._has_tokenizer:
                processing_class.save_pretrained(folder)
            self._running = self._start(folder, arguments, vllm_engine_kwargs or {})
        self._llm = self._running.llm
        # the process's exit is the LLM's own business
        weakref.finalize(self, self._running.stop).atexit = False
        # of its own, so that checks leave the process's random state alone
        self._checked = torch.Generator().manual_seed(seed)
        try:
            # processes of one engine talk over it about what to generate
            self._group = tensor_parallel_group() if tensor_parallel_size > 1 else None
            self.weights = self._share(model)
            self.adapter = self._lend_adapter(model)
            self._llm.collective_rpc(report_policy_logps)
            if enable_sleep_mode:
                self._memory = EngineMemory(self._llm, self.weights.copies() if self._on_cpu else {})
            if self._releases_weights:
                fill_before_steps(self._llm, weakref.WeakMethod(self._fill))
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

        self._on_cpu = on_cpu = current_platform.is_cpu()
        if on_cpu:
            wanted = arguments | overrides | {"dtype": arguments["dtype"]}
            arguments |= cpu_arguments(base_model(self._live_model()).config, wanted)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # each process of the launcher runs an engine, or its part of one, on its own device
            arguments["distributed_executor_backend"] = "external_launcher"
        model = self._live_model()
        # None where vLLM runs the adapters itself, "" where there are none
        self._why_merged: str | None = ""
        if has_adapters(model):
            self._why_merged = why_merged(model, arguments | overrides, on_cpu=on_cpu)
        if self._why_merged is None:
            arguments |= lora_arguments(model, overrides)
        maps: list[WeightMap] = []
        load_format = register_loader(
            self._model, on_cpu=on_cpu, adapters=self._why_merged is not None, loaded=maps.append
        )
        self._arguments = arguments | overrides
        try:
            running = RunningLLM(lambda: LLM(folder, load_format=load_format, **self._arguments), load_format)
        except Exception as error:
            dtype = arguments["dtype"]
            reason = explained_start(
                error,
                self._arguments,
                sequence_bytes=sequence_bytes(base_model(model).config, self._arguments | {"dtype": dtype}),
                weight_bytes=sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize,
            )
            if not reason:
                raise
            raise EngineError(f"vLLM did not start: {reason}") from error
        (self._weight_map,) = maps
        return running

    def _share(self, model: nn.Module) -> SharedWeights:
        (target,) = self._llm.apply_model(lambda target: target)
        weights = SharedWeights(
            target,
            self._weight_map,
            reload=self._reload,
            adapters=self._why_merged is not None,
            why_computed=f"adapters are added to them: {self._why_merged}" if self._why_merged else "computed for vLLM",
        )
        del self._weight_map
        weights.share(model)
        return weights

    def _lend_adapter(self, model: nn.Module) -> EngineAdapter | None:
        """The policy's LoRA adapter in vLLM's slots, if vLLM runs it beside the base weights."""
        if self._why_merged is not None:
            return None
        (target,) = self._llm.apply_model(lambda target: target)
        adapter = EngineAdapter(target, model)
        adapter.use_for_requests(self._llm.llm_engine)
        return adapter

    def _reload(self, weights: Any) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling | None = None,
        *,
        images: list[list[Any] | None] | None = None,
        multimodal_fields: dict[str, Any] | None = None,
        on_group: GroupCallback | None = None,
    ) -> Completions:
        """See `Engine.generate`; vLLM reads `images` and processes them itself, and calls `on_group` between two steps.

        The log-probs are the policy's, of the whole vocabulary at the sampling temperature.
        With a seed, a completion depends on the seed, its prompt's place in the list and its own place in the group,
        not on what else is in the batch. Without, it draws from the process's random state. The processes of a tensor
        parallel engine call this together, each with its own prompts or none, and their lists follow each other.

        Raises:
            EngineError: vLLM failed, did not finish a completion, or reported a log-prob that is NaN; the engine is
                closed.
        """
        self._check_open()
        sampling = self.sampling if sampling is None else sampling
        if sampling is None:
            raise ValueError("sampling must be given: the engine was made without settings of its own")
        if self._group is None:
            return self._generate(prompt_ids, sampling, images, on_group)
        batch = gather_batch(self._group, prompt_ids, sampling, images)
        own = batch.own_of(self._generate(batch.prompt_ids, batch.sampling, batch.images))
        # groups that finish early may be another process's
        report_groups(prompt_ids, own.ids, on_group)
        return own

    def any_in_group(self, flag: bool) -> bool:
        """See `Engine.any_in_group`."""
        return flag if self._group is None else any_in(self._group, flag)

    def _generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        images: list[list[Any] | None] | None,
        on_group: GroupCallback | None = None,
    ) -> Completions:
        check_prompts(prompt_ids, context=self._llm.llm_engine.model_config.max_model_len)
        if not prompt_ids:
            return Completions(ids=[], logps=[])
        groups = runs_of_rows(prompt_ids, images)
        sizes = [size for _, size in groups]
        requests = [self._sampling_params(sampling, i, size) for i, size in enumerate(sizes)]
        # vLLM draws from the process's state even when every request has a seed
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        is_seeded = requests[0].seed is not None
        with self.awake(), self._failing_once(), torch.random.fork_rng(devices=devices, enabled=is_seeded):
            self._fill()
            outputs = run_requests(
                self._llm,
                [vllm_prompt(*row) for row, _ in groups],
                requests,
                on_finished=None if on_group is None else group_listener(sizes, on_group),
                shows_progress=self._shows_progress,
            )
            return completions_of(outputs, sizes)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """See `Engine.awake`.

        Raises:
            EngineError: its memory could not be taken back; the engine is closed.
        """
        self._check_open()
        self._take()
        with nullcontext() if self._memory is None else self._memory.held():
            yield

    def wake(self) -> None:
        """Take the engine's memory until the next `awake` or `generate` ends, for calls of `llm` itself.

        Raises:
            EngineError: it could not be taken back; the engine is closed.
        """
        self._take()
        self._fill()

    def _take(self) -> None:
        if self._memory is not None:
            try:
                self._memory.take()
            except RuntimeError as error:
                raise self._failed(explained_wake(self._arguments)) from error

    def _fill(self) -> None:
        """Copy the weights that were released, unless that has been done since."""
        if self._memory is not None and self._memory.needs_weights:
            self._copy_weights()

    def _copy_weights(self) -> None:
        self.weights.update(self._live_model())
        if self._memory is not None:
            self._memory.needs_weights = False

    @contextmanager
    def _failing_once(self) -> Iterator[None]:
        """Close the engine if the block finds that it has failed."""
        try:
            yield
        except EngineError as error:
            self._failed(str(error))
            raise
        except Exception:
            # refused before vLLM ran any of it, or `on_group` failed between two steps
            raise
        except BaseException as error:
            # maybe in the middle of a step
            self._failed(f"{type(error).__name__} while vLLM generated")
            raise

    def _failed(self, reason: str) -> EngineError:
        self._fault = reason
        self.close()
        return EngineError(reason)

    def update_weights(self, model: nn.Module) -> None:
        """Copy what of `model` the engine does not share, and forget the cached prefixes of the old weights.

        Where the memory of the copies is free, they are made once it is taken, of the policy as it is then.

        Raises:
            ValueError: `model` runs an adapter that vLLM has no room for.
        """
        self._check_open()
        self._model = weakref.ref(model)
        if self._memory is None or not self._memory.lacks_weights:
            self._copy_weights()
        if self.adapter is not None:
            self.adapter.update(model)
        self._llm.reset_prefix_cache()

    @property
    def copied_bytes(self) -> int:
        """What was last copied: weights that are not shared, and adapters."""
        return self.weights.copied_bytes + (0 if self.adapter is None else self.adapter.copied_bytes)

    def shadows(self) -> dict[nn.Parameter, Tensor]:
        """See `Engine.shadows`; none where their memory is free while the optimizer steps."""
        return {} if self._releases_weights else self.weights.shadows(self._live_model())

    def shadows_written(self) -> None:
        """See `Engine.shadows_written`."""
        if not self._releases_weights:
            self.weights.shadows_written(self._live_model())

    @property
    def _releases_weights(self) -> bool:
        return self._memory is not None and self._memory.has_weights

    @property
    def dtype(self) -> torch.dtype:
        """Of the engine's weights and activations."""
        return self._llm.llm_engine.model_config.dtype

    def check_weights(self) -> None:
        """Compare rows of every weight with the engine's, bit by bit; other rows at each call.

        Raises:
            RuntimeError: naming the weights that differ.
        """
        with self.awake() if self._releases_weights else nullcontext():
            self._fill()
            self.weights.check(self._live_model(), num_rows=CHECKED_ROWS, generator=self._checked)
        if self.adapter is not None:
            self.adapter.check(self._live_model())

    def set_temperature(self, temperature: float) -> None:
        """See `Engine.set_temperature`."""
        assert self.sampling is not None
        self.sampling = replace(self.sampling, temperature=temperature)

    def close(self) -> None:
        """Stop the engine and free its memory; a second call does nothing.

        A process group that was there before the engine stays, and must not end before it.
        """
        self._llm = self._group = None
        if self._memory is not None:
            self._memory.leave()
            self._memory = None
        self._running.stop()

    def _check_open(self) -> None:
        if self._llm is None:
            raise EngineError(f"the vLLM engine is closed: {self._fault or '`close` was called'}")

    def _live_model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "the engine outlived its trainer"
        return model

    def _sampling_params(self, sampling: Sampling, index: int, size: int) -> Any:
        """The request for `size` completions of the prompt at place `index`."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        settings = request_settings(sampling, self._eos_token_ids) | {"flat_logprobs": True}
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
