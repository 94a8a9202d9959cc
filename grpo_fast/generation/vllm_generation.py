"""TRL's `trainer.vllm_generation`, for scripts and rollout functions that use it: a thin face of the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from grpo_fast.generation.vllm_client import ServerClient
from grpo_fast.generation.vllm_engine import VLLMEngine
from grpo_fast.generation.vllm_server import VLLMServer


class _Setting:
    """One field of the engine's own sampling, readable and writable as an attribute."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __get__(self, face: Any, owner: type) -> Any:
        return self if face is None else getattr(face.engine.sampling, self._field)

    def __set__(self, face: Any, value: Any) -> None:
        face.engine.sampling = replace(face.engine.sampling, **{self._field: value})


class VLLMGeneration:
    """The engine under TRL's names. What is set here, such as `temperature`, holds for the trainer's rollouts too."""

    temperature = _Setting("temperature")
    top_p = _Setting("top_p")
    top_k = _Setting("top_k")
    min_p = _Setting("min_p")
    repetition_penalty = _Setting("repetition_penalty")
    max_completion_length = _Setting("max_tokens")
    generation_kwargs = _Setting("extra")

    def __init__(self, engine: VLLMEngine | VLLMServer, policy: Callable[[], nn.Module]) -> None:
        """A face of `engine`; `policy` gives the unwrapped model whose weights it takes."""
        self.engine = engine
        self._policy = policy

    @property
    def mode(self) -> str:
        """`"server"` or `"colocate"`, as `vllm_mode`."""
        return "server" if isinstance(self.engine, VLLMServer) else "colocate"

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`, awake. A server has none.

        Its log-probs are the policy's, at the temperature of the request, LoRA adapters included.
        """
        if isinstance(self.engine, VLLMServer):
            raise AttributeError("vllm_mode='server' has no llm in this process; vllm_client talks to the server")
        self.engine.wake()
        return self.engine.llm

    @property
    def vllm_client(self) -> ServerClient:
        """What talks to the server, in the main process; not TRL's client, whose methods are `generate`'s here."""
        client = self.engine.client if isinstance(self.engine, VLLMServer) else None
        if client is None:
            raise AttributeError("vllm_client is there with vllm_mode='server', in the main process alone")
        return client

    def sync_weights(self) -> None:
        """Generate from the policy's present weights."""
        self.engine.update_weights(self._policy())

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list[Any] | None] | None = None,
        num_generations: int = 1,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float | None]]] | None, list[list[list[int]]] | None]:
        """One completion per entry of `prompts`.

        Args:
            prompts: Token ids; a prompt that is wanted G times is listed G times in a row.
            images: Each prompt's PIL images.
            num_generations: G, which the list already says; TRL's server mode needs it.
            profiler: Entered around the generation.

        Returns:
            Prompt ids, completion ids, and of each token a list with the one log-prob of the sampled token and a list
            with its id.
        """
        with profiler or nullcontext():
            drawn = self.engine.generate(prompts, images=images)
        if drawn.logps is None:
            return prompts, drawn.ids, None, None
        logps: list[list[list[float | None]]] = [[[logp] for logp in row] for row in drawn.logps]
        return prompts, drawn.ids, logps, [[[token] for token in row] for row in drawn.ids]
