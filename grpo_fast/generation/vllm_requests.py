"""What the requests to vLLM have in common, whether it runs in this process or as a server."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from grpo_fast.batch import Sampling

# one prompt's tokens and images
Row = tuple[list[int], list[Any] | None]


def runs_of_rows(prompt_ids: list[list[int]], images: list[list[Any] | None] | None) -> list[tuple[Row, int]]:
    """Equal rows that follow each other, as one row and how often it is wanted."""
    rows = zip(prompt_ids, images or itertools.repeat(None, len(prompt_ids)), strict=True)
    return [(row, len(list(run))) for row, run in itertools.groupby(rows)]


def request_settings(sampling: Sampling, stop_token_ids: list[int]) -> dict[str, Any]:
    """The sampling parameters under vLLM's names; log-probs are of the sampled token alone."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "stop_token_ids": stop_token_ids,
        # 0 asks for the sampled token alone
        "logprobs": 0,
    }


def request_seed(seed: int, index: int) -> int:
    """A 62-bit seed for request `index`; vLLM adds the place in the group, so consecutive ones must lie far apart."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(2))
