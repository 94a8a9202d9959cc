"""Generation behind one interface: transformers' `generate`, or vLLM in the trainer's process."""

from grpo_fast.generation.base import Engine, context_length
from grpo_fast.generation.factory import make_engine
from grpo_fast.generation.vllm_engine import require_vllm

__all__ = ["Engine", "context_length", "make_engine", "require_vllm"]
