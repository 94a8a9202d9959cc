"""What scripts import from TRL's trainer module beside the trainer, each from the part where it belongs."""

from grpo_fast.advantages import nanstd
from grpo_fast.compatibility import apply_chat_template, nanmax, nanmin
from grpo_fast.config import GRPOConfig
from grpo_fast.data import RepeatSampler, is_conversational, repeat_iterable_dataset
from grpo_fast.generation import VLLMGeneration, unwrap_model_for_generation
from grpo_fast.multimodal import prepare_multimodal_messages, split_pixel_values_by_grid, unsplit_pixel_values_by_grid
from grpo_fast.profiling import profiling_context, profiling_decorator
from grpo_fast.reference import SyncRefModelCallback
from grpo_fast.rewards import RewardFunc
from grpo_fast.rollout import pad, shuffle_sequence_dict, split_tensor_dict

__all__ = [
    "GRPOConfig",
    "RepeatSampler",
    "RewardFunc",
    "SyncRefModelCallback",
    "VLLMGeneration",
    "apply_chat_template",
    "is_conversational",
    "nanmax",
    "nanmin",
    "nanstd",
    "pad",
    "prepare_multimodal_messages",
    "profiling_context",
    "profiling_decorator",
    "repeat_iterable_dataset",
    "shuffle_sequence_dict",
    "split_pixel_values_by_grid",
    "split_tensor_dict",
    "unsplit_pixel_values_by_grid",
    "unwrap_model_for_generation",
]
