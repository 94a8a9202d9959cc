"""Tiny engines and trainers with vLLM."""

import ctypes

import psutil
import torch
from datasets import Dataset

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.batch import Sampling
from grpo_fast.generation import VLLMEngine
from tests.tiny_lm import make_model, make_tokenizer

# 40 tokens: one full block of 32 that vLLM's prefix cache holds
PROMPTS = [[5, 6, 7, 8] * 10, [9, 10], [11, 12, 13]]
GREEDY = Sampling(max_tokens=8, temperature=0)


def rss():
    """Bytes in use: what the C library keeps for itself after other tests goes back to the system first."""
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def tiny(seed=0):
    # vLLM's CPU attention takes heads of 32 and wider
    return make_model(seed=seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


def start(model, **kwargs):
    settings = {"processing_class": None, "dtype": torch.float32, "max_num_seqs": 4, "eos_token_ids": [1]}
    return VLLMEngine(model=model, **settings | kwargs)


def variety(completions, **kwargs):
    return [len(set(text)) / 8 for text in completions]


def make_trainer(folder, *, model=None, reward=variety, rollout_func=None, **kwargs):
    settings = {
        "use_cpu": True,
        "bf16": False,
        "use_vllm": True,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 3e-2,
        "max_steps": 3,
        "save_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 5,
    }
    return GRPOTrainer(
        model=model or tiny(seed=3),
        reward_funcs=reward,
        args=GRPOConfig(str(folder), **settings | kwargs),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i}="} for i in range(10)]),
        processing_class=make_tokenizer(),
        rollout_func=rollout_func,
    )
