"""Arguments that TRL or transformers once had and users' scripts still give: accepted, honoured, one warning.

They are fields, so the constructor, `HfArgumentParser` and YAML files all take them. Their default None means "not
given"; one that has a successor hands its value over and is None again afterwards, so that a saved configuration loads
without a second warning. `max_prompt_length` has none: it keeps its value and its meaning.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

_TEXT = {"help": "Deprecated: its warning names what to use instead."}
# `--overwrite_output_dir` alone means true, as it always did
_FLAG = {**_TEXT, "nargs": "?", "const": True}


@dataclass(kw_only=True)
class LegacyArguments:
    """The legacy fields; `replace_legacy_arguments` gives them their meaning."""

    max_prompt_length: int | None = field(default=None, metadata=_TEXT)
    token_entropy_percentile_threshold: float | None = field(default=None, metadata=_TEXT)
    use_liger_loss: bool | None = field(default=None, metadata=_FLAG)
    vllm_device: str | None = field(default=None, metadata=_TEXT)
    vllm_dtype: str | None = field(default=None, metadata=_TEXT)
    vllm_enable_prefix_caching: bool | None = field(default=None, metadata=_FLAG)
    vllm_guided_decoding_regex: str | None = field(default=None, metadata=_TEXT)
    vllm_max_model_len: int | None = field(default=None, metadata=_TEXT)
    wandb_log_unique_prompts: bool | None = field(default=None, metadata=_FLAG)

    adafactor: bool | None = field(default=None, metadata=_FLAG)
    evaluation_strategy: str | None = field(default=None, metadata=_TEXT)
    fp16_backend: str | None = field(default=None, metadata=_TEXT)
    group_by_length: bool | None = field(default=None, metadata=_FLAG)
    half_precision_backend: str | None = field(default=None, metadata=_TEXT)
    include_tokens_per_second: bool | None = field(default=None, metadata=_FLAG)
    logging_dir: str | None = field(default=None, metadata=_TEXT)
    no_cuda: bool | None = field(default=None, metadata=_FLAG)
    overwrite_output_dir: bool | None = field(default=None, metadata=_FLAG)
    save_safetensors: bool | None = field(default=None, metadata=_FLAG)
    use_mps_device: bool | None = field(default=None, metadata=_FLAG)
    warmup_ratio: float | None = field(default=None, metadata=_TEXT)


LEGACY = tuple(f.name for f in fields(LegacyArguments))


def _same(value: Any) -> Any:
    return value


def _warmup_steps(ratio: float) -> float:
    # transformers 5 reads warmup_steps below 1 as a share of all steps, and 1 as one step
    if not 0 <= ratio < 1:
        raise ValueError(f"warmup_ratio must be in [0, 1); it is {ratio}")
    return ratio


# legacy name -> its successor, and the successor's value
SUCCESSORS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "token_entropy_percentile_threshold": ("top_entropy_quantile", lambda masked_share: round(1 - masked_share, 9)),
    "vllm_guided_decoding_regex": ("vllm_structured_outputs_regex", _same),
    "vllm_max_model_len": ("vllm_max_model_length", _same),
    "wandb_log_unique_prompts": ("log_unique_prompts", _same),
    "adafactor": ("optim", lambda adafactor: "adafactor" if adafactor else None),
    "evaluation_strategy": ("eval_strategy", _same),
    "include_tokens_per_second": ("include_num_input_tokens_seen", _same),
    "no_cuda": ("use_cpu", _same),
    "warmup_ratio": ("warmup_steps", _warmup_steps),
}

# legacy name -> the key of vllm_engine_kwargs
ENGINE_KEYS = {"vllm_dtype": "dtype", "vllm_enable_prefix_caching": "enable_prefix_caching"}

NO_EFFECT = {
    "use_liger_loss": "the fused loss is always on",
    "vllm_device": "the engine shares the trainer's device",
    "fp16_backend": "use fp16 or bf16",
    "group_by_length": "batches hold whole groups of completions",
    "half_precision_backend": "use fp16 or bf16",
    "logging_dir": "use the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": "use a new output_dir, or resume_from_checkpoint",
    "save_safetensors": "weights are always saved as safetensors",
    "use_mps_device": "mps is used where it is the device",
}


def replace_legacy_arguments(args: Any) -> None:
    """Move the legacy arguments that were given to their successors, with one FutureWarning for all of them.

    Args:
        args: The configuration, before its own `__post_init__` has derived anything; changed in place.

    Raises:
        ValueError: If a legacy argument and its successor are given with different values, or one is out of range.
    """
    given = {name: getattr(args, name) for name in LEGACY if getattr(args, name) is not None}
    if not given:
        return
    advice = []
    for name, value in given.items():
        if name == "max_prompt_length":
            if value < 1:
                raise ValueError(f"max_prompt_length must be at least 1, or None to keep prompts whole; it is {value}")
            advice.append("max_prompt_length (prompts are cut from the left; cut or filter the data set instead)")
            continue
        setattr(args, name, None)
        if name in NO_EFFECT:
            advice.append(f"{name} (has no effect: {NO_EFFECT[name]})")
        elif name in ENGINE_KEYS:
            advice.append(f"{name} (use vllm_engine_kwargs={{{ENGINE_KEYS[name]!r}: {value!r}}})")
            _set_engine_key(args, name, value)
        else:
            advice.append(f"{name} (use {SUCCESSORS[name][0]})")
            _set_successor(args, name, value)
    warnings.warn(f"deprecated arguments: {', '.join(advice)}", FutureWarning, stacklevel=4)


def _set_successor(args: Any, name: str, value: Any) -> None:
    successor, convert = SUCCESSORS[name]
    value = convert(value)
    if value is None:
        return
    default = next(f.default for f in fields(args) if f.name == successor)
    present = getattr(args, successor)
    if present not in (default, value):
        raise ValueError(
            f"{name} is the old name of {successor}: {value!r} and {present!r} were given; set {successor}"
        )
    setattr(args, successor, value)


def _set_engine_key(args: Any, name: str, value: Any) -> None:
    key = ENGINE_KEYS[name]
    present = args.vllm_engine_kwargs or {}
    engine_kwargs = json.loads(present) if isinstance(present, str) else dict(present)
    if engine_kwargs.setdefault(key, value) != value:
        raise ValueError(
            f"{name}={value!r} and vllm_engine_kwargs={{{key!r}: {engine_kwargs[key]!r}}} were given; set the latter"
        )
    args.vllm_engine_kwargs = engine_kwargs
