"""A `vllm serve` process as the engine: token ids and log-probs by HTTP, weights by vLLM's native transfer API."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass, replace
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from grpo_fast.batch import Completions, Sampling
from grpo_fast.generation.base import Engine, GroupCallback, check_options, check_prompts, report_groups
from grpo_fast.generation.vllm_client import MAX_REQUESTS, ServerClient
from grpo_fast.generation.vllm_requests import request_seed, request_settings, runs_of_rows
from grpo_fast.generation.vllm_transfer import Description, WeightTransfer, describe
from grpo_fast.generation.vllm_weights import named_weights, refuse_8bit

logger = logging.getLogger(__name__)

EXTENSION = "grpo_fast.generation.vllm_worker.WorkerExtension"
# what a request says whatever the user wants
OWN_OPTIONS = frozenset({"model", "prompt", "n", "stream", "echo", "return_token_ids", "return_tokens_as_token_ids"})
# options that leave tokens out of the distribution or reweigh them, with the values that do not
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
T = TypeVar("T")


class VLLMServer(Engine):
    """One server for all trainer processes; the main one talks to it."""

    name = "vllm server"

    def __init__(
        self,
        *,
        model: nn.Module,
        base_url: str,
        eos_token_ids: list[int],
        timeout_s: float = 240.0,
        group_port: int = 51216,
        sampling: Sampling | None = None,
        structured_outputs_regex: str | None = None,
    ) -> None:
        """Wait for the server and join its workers; it keeps its own weights until `update_weights`.

        Args:
            model: The unwrapped policy, to compare with the server's.
            base_url: Where the server listens, as in "http://localhost:8000".
            eos_token_ids: Any of these ends a completion and is kept as its last token.
            timeout_s: How long to wait for the server.
            group_port: A free port of the main process's machine, where the server's workers find it.
            sampling: The run's own settings, used by `generate` unless it is given others; the attribute `sampling`.
            structured_outputs_regex: Completions match it; it wins over `structured_outputs` in `Sampling.extra`.

        Raises:
            ConnectionError: no server is up in time.
            ValueError: the server's model or settings do not fit.
            RuntimeError: the server refuses a request.
        """
        refuse_8bit(model)
        self.sampling = sampling
        self._eos_token_ids = eos_token_ids
        self._regex = structured_outputs_regex
        # both of the main process alone
        self.client: ServerClient | None = None
        self._transfer: WeightTransfer | None = None
        self._described: list[Description] | None = None

        def connect() -> int:
            self.client = ServerClient(base_url, timeout_s=timeout_s)
            _check_vocabulary(self.client, model)
            self._prepare_logps(self.client)
            self._transfer = WeightTransfer(self.client, device=PartialState().device, port=group_port)
            return self.client.max_model_len

        self.max_model_len = _in_main_process(connect)

    def _prepare_logps(self, client: ServerClient) -> None:
        settings = client.settings()
        mode = settings["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            logger.warning(
                "the vLLM server at %s runs with --logprobs-mode %s: its log-probs lack the temperature and bias the "
                "importance weights; restart it with --logprobs-mode processed_logprobs",
                client.base_url,
                mode,
            )
        if settings["parallel_config"].get("worker_extension_cls") == EXTENSION:
            client.post("collective_rpc", {"method": "report_policy_logps_once"})
            return
        chosen = {} if self.sampling is None else request_settings(self.sampling, [])
        shaping = [name for name, neutral in NEUTRAL.items() if chosen.get(name, neutral) != neutral]
        if shaping or self._regex is not None or (self.sampling is not None and self.sampling.extra):
            logger.warning(
                "the vLLM server at %s reports log-probs over the tokens that its sampling leaves, so %s may bias the "
                "importance weights; start it with --worker-extension-cls %s",
                client.base_url,
                ", ".join(shaping) or "generation_kwargs or vllm_structured_outputs_regex",
                EXTENSION,
            )

    def generate(
        self,
        prompt_ids: list[list[int]],
        sampling: Sampling | None = None,
        *,
        images: list[list[Any] | None] | None = None,
        multimodal_fields: dict[str, Any] | None = None,
        on_group: GroupCallback | None = None,
    ) -> Completions:
        """See `Engine.generate`; to be called by all processes, each with its own prompts, of which there may be none.

        With a seed, a completion depends on the seed, its prompt's place among all prompts of all processes and its own
        place in the group. Without, it draws from the server's random state.

        Raises:
            ValueError: also for images, which are not sent.
            RuntimeError: the server is gone, refuses a request, or gives a token without a log-prob.
        """
        sampling = self.sampling if sampling is None else sampling
        if sampling is None:
            raise ValueError("sampling must be given: the engine was made without settings of its own")
        state = PartialState()
        counts: list[int] = gather_object([len(prompt_ids)])
        prompts: list[list[int]] = gather_object(prompt_ids)
        has_images: list[bool] = gather_object([any(images or [])])
        if any(has_images):
            raise ValueError("vllm_mode='server' takes text only, and the prompts have images; use 'colocate'")
        drawn: Completions = _in_main_process(lambda: self._complete(prompts, sampling))
        first = sum(counts[: state.process_index])
        own = slice(first, first + len(prompt_ids))
        report_groups(prompt_ids, drawn.ids[own], on_group)
        return Completions(ids=drawn.ids[own], logps=None if drawn.logps is None else drawn.logps[own])

    def any_in_group(self, flag: bool) -> bool:
        """See `Engine.any_in_group`; all processes call `generate` together."""
        return any(gather_object([flag]))

    def update_weights(self, model: nn.Module) -> None:
        """Send `model`'s weights, adapters merged in copies; to be called by all processes.

        Raises:
            RuntimeError: the server is gone, or its model does not take a weight.
            ValueError: the weights cannot be sent.
        """
        _check_sendable(model)
        if self._described is None:
            self._described = describe(named_weights(model))
        described = self._described
        weights = _whole(named_weights(model))

        def send() -> None:
            assert self._transfer is not None
            self._transfer.send(described, weights)

        # a sharded weight is gathered by all processes together
        _in_main_process(send, meanwhile=lambda: _exhaust(weights) if _is_sharded(model) else None)

    def set_temperature(self, temperature: float) -> None:
        """See `Engine.set_temperature`."""
        assert self.sampling is not None
        self.sampling = replace(self.sampling, temperature=temperature)

    def close(self) -> None:
        """Leave the server, which goes on; a second call does nothing."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def _complete(self, prompts: list[list[int]], sampling: Sampling) -> Completions:
        check_prompts(prompts, context=self.max_model_len)
        if not prompts:
            return Completions(ids=[], logps=[])
        settings = self._settings(sampling)
        groups = [(prompt, size) for (prompt, _), size in runs_of_rows(prompts, None)]
        with ThreadPoolExecutor(min(len(groups), MAX_REQUESTS)) as pool:
            replies = [
                pool.submit(self._ask, settings, index, prompt, size) for index, (prompt, size) in enumerate(groups)
            ]
            try:
                choices = [choice for reply in replies for choice in reply.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        is_scored = all(choice["logprobs"] is not None for choice in choices)
        return Completions(
            ids=[choice["token_ids"] for choice in choices],
            logps=[choice["logprobs"]["token_logprobs"] for choice in choices] if is_scored else None,
        )

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        """What all requests of a call say."""
        assert self.client is not None
        extra = dict(sampling.extra or {})
        if extra:
            check_options(extra, known=self.client.completion_options() - OWN_OPTIONS)
        if self._regex is not None:
            extra["structured_outputs"] = {"regex": self._regex}
        structured = extra.get("structured_outputs")
        if is_dataclass(structured) and not isinstance(structured, type):
            extra["structured_outputs"] = {name: value for name, value in asdict(structured).items() if value}
        return request_settings(sampling, self._eos_token_ids) | extra

    def _ask(self, settings: dict[str, Any], index: int, prompt: list[int], size: int) -> list[dict[str, Any]]:
        """`size` completions of the prompt at place `index`."""
        assert self.client is not None
        wanted = min(settings["max_tokens"], self.max_model_len - len(prompt))
        # vLLM takes no n > 1 when all n are equal
        count = 1 if settings["temperature"] == 0 else size
        body = settings | {
            "model": self.client.model,
            "prompt": prompt,
            "n": count,
            "max_tokens": wanted,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if settings["seed"] is not None:
            body["seed"] = request_seed(settings["seed"], index)
        choices = sorted(self.client.post("v1/completions", body)["choices"], key=lambda choice: choice["index"])
        _check_choices(choices, count, wanted)
        return choices if count == size else choices * size


def _check_choices(choices: list[dict[str, Any]], count: int, wanted: int) -> None:
    """Refuse replies that would train on something else than was asked for (RuntimeError)."""
    if len(choices) != count:
        raise RuntimeError(f"the vLLM server gave {len(choices)} completions of a prompt where {count} were asked for")
    for choice in choices:
        reason, length = choice["finish_reason"], len(choice["token_ids"])
        if reason not in ("stop", "length"):
            raise RuntimeError(f"the vLLM server ended a completion with {reason!r}; its log says why")
        if reason == "length" and length < wanted:
            raise RuntimeError(
                f"the vLLM server cut a completion at {length} of {wanted} tokens: start it with --generation-config "
                "vllm, so that it has no limit of its own"
            )
        logps = choice["logprobs"]["token_logprobs"] if choice["logprobs"] is not None else []
        for place, logp in enumerate(logps):
            if logp is None or math.isnan(logp):
                raise RuntimeError(
                    f"the vLLM server's log-prob of token {place} of a completion is {logp}: its weights or logits "
                    "are not finite"
                )


def _check_vocabulary(client: ServerClient, model: Any) -> None:
    """Refuse a server whose model does not know the trainer's last token (ValueError)."""
    vocabulary: int = model.config.get_text_config().vocab_size
    try:
        client.post("v1/completions", {"model": client.model, "prompt": [vocabulary - 1], "max_tokens": 1})
    except RuntimeError as error:
        if "vocabulary" not in str(error):
            raise
        raise ValueError(
            f"the vLLM server at {client.base_url} serves {client.model!r}, which is not the trainer's model: that one "
            f"has a vocabulary of {vocabulary} tokens, of which the server does not know the last"
        ) from error


def _check_sendable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"vllm_mode='server' does not gather the weights that DeepSpeed's ZeRO-3 shards ({name}): use stage 2 "
                "or FSDP2"
            )


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _whole(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights with FSDP2's shards gathered, one at a time."""
    for name, weight in weights:
        yield name, weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _exhaust(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass


def _in_main_process(make: Callable[[], T], *, meanwhile: Callable[[], None] | None = None) -> T:
    """What `make` gives in the main process, in all of them; what it raises is raised in all of them."""
    state = PartialState()
    if state.num_processes == 1:
        return make()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    elif meanwhile is not None:
        meanwhile()
    shared = list(outcome)
    broadcast_object_list(shared)
    # the main process raises its own, which knows its cause
    failure = outcome[1] or shared[1]
    if failure is not None:
        raise failure
    value: T = shared[0]
    return value
