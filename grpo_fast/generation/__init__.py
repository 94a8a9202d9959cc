"""Generation behind one interface: transformers' `generate`, vLLM in the trainer's process, or a vLLM server."""

from grpo_fast.generation.base import Engine, context_length
from grpo_fast.generation.factory import make_engine
from grpo_fast.generation.transformers_engine import TransformersEngine
from grpo_fast.generation.unwrap import unwrap_model_for_generation
from grpo_fast.generation.vllm_engine import VLLMEngine
from grpo_fast.generation.vllm_faults import EngineError
from grpo_fast.generation.vllm_generation import VLLMGeneration
from grpo_fast.generation.vllm_server import VLLMServer
from grpo_fast.generation.vllm_start import require_vllm

__all__ = [
    "Engine",
    "EngineError",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMGeneration",
    "VLLMServer",
    "context_length",
    "make_engine",
    "require_vllm",
    "unwrap_model_for_generation",
]
