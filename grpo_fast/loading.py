"""Models and tokenizers from what the user passed, with errors before anything large is read."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grpo_fast.config import GRPOConfig, as_dict


def load_config(model: str | nn.Module, args: GRPOConfig) -> Any:
    """The config of a model that may not be loaded yet; reads no weights.

    Raises:
        ValueError: If `model` is a path that does not exist, or a name that cannot be resolved.
    """
    if not isinstance(model, str):
        return model.config
    is_path = model.startswith((".", "~", os.sep)) or model.count("/") > 1
    if is_path and not (Path(model) / "config.json").is_file():
        what = "has no config.json" if Path(model).is_dir() else "does not exist"
        raise ValueError(f"model={model!r}: the folder {what}; pass a folder written by save_pretrained, or a hub id")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **_revision(args))
    except OSError as error:
        raise ValueError(f"model={model!r} is neither a folder nor a model the hub can give: {error}") from error


def load_model(model: str, args: GRPOConfig) -> PreTrainedModel:
    """The causal LM at `model`, fp32 unless `model_init_kwargs` says otherwise (mixed precision keeps fp32 masters)."""
    kwargs: dict[str, Any] = {"dtype": torch.float32, **as_dict(args.model_init_kwargs)}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    return AutoModelForCausalLM.from_pretrained(model, trust_remote_code=args.trust_remote_code, **kwargs)


def load_tokenizer(name: str, args: GRPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, padding and truncating on the left."""
    return AutoTokenizer.from_pretrained(
        name,
        truncation_side="left",
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
        **_revision(args),
    )


def _revision(args: GRPOConfig) -> dict[str, Any]:
    kwargs = as_dict(args.model_init_kwargs)
    return {"revision": kwargs["revision"]} if "revision" in kwargs else {}


def add_adapter(model: PreTrainedModel, peft_config: Any, args: GRPOConfig) -> nn.Module:
    """`model` with a new PEFT adapter.

    Raises:
        TypeError: If `peft_config` is not a `PeftConfig`.
        ValueError: If the model has an adapter already, or the adapter covers the LM head, whose weight the fused head
            reads directly.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, it is {type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("peft_config and a PeftModel cannot both be given: pass the base model, or no peft_config")
    adapted = get_peft_model(model, peft_config)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    check_adapter(adapted)
    return adapted


def check_adapter(model: nn.Module) -> None:
    """Refuse an adapter on the LM head (ValueError): it would not be trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model
    if isinstance(base.get_base_model().get_output_embeddings(), BaseTunerLayer):
        raise ValueError("peft_config covers the LM head (`lm_head`), whose adapter would not be trained; leave it out")


def make_reference(model: nn.Module) -> nn.Module | None:
    """A frozen copy of the initial policy, or None if the policy with its adapter disabled serves."""
    if hasattr(model, "disable_adapter"):
        return None
    return copy.deepcopy(model).requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout layer to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
