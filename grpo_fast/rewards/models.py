"""Reward models: sequence classifiers with one output, whose first logit scores a prompt with its completion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from grpo_fast.config import GRPOConfig, as_dict

# padded tokens of one forward pass: 1 GiB of activations in a 7B model, and enough to fill a GPU
MAX_TOKENS = 16_384


def check_reward_model(model: str, name: str, args: GRPOConfig) -> None:
    """Refuse a reward model that cannot be found (ValueError), before any weights are read."""
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, revision=_revision(args))
    except OSError as error:
        raise ValueError(f"{name}={model!r} is neither a folder nor a model the hub can give: {error}") from error


def load_reward_model(model: str, args: GRPOConfig) -> nn.Module:
    """The sequence classifier at `model`, loaded with `model_init_kwargs` as the policy is."""
    kwargs: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **as_dict(args.model_init_kwargs)}
    if args.distributed_state is not None and args.distributed_state.use_distributed:
        # each process holds its own copy: a device map would spread it over the others' devices
        kwargs["device_map"] = None
    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **kwargs)


def load_reward_tokenizer(model: nn.Module, args: GRPOConfig, *, was_loaded: bool) -> Any:
    """The tokenizer at the path a reward model came from; `was_loaded`: by us, with the run's revision."""
    revision = _revision(args) if was_loaded else "main"
    config: Any = model.config
    return AutoTokenizer.from_pretrained(
        config._name_or_path, revision=revision, trust_remote_code=args.trust_remote_code
    )


def mirror_pad_token(model: nn.Module, processing_class: Any) -> None:
    """Give model and tokenizer one padding token: the model scores the last token that is not padding."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    config.get_text_config().pad_token_id = tokenizer.pad_token_id


def reward_texts(
    prompts: list[Any],
    completions: list[Any],
    processing_class: Any,
    *,
    is_conversational: bool,
    chat_template_kwargs: dict[str, Any],
) -> list[str]:
    """Each prompt with its completion as the text that a reward model reads."""
    joined = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if not is_conversational:
        return joined
    return [processing_class.apply_chat_template(chat, tokenize=False, **chat_template_kwargs) for chat in joined]


def longest_text(texts: list[str], processing_class: Any) -> int:
    """Tokens of the longest text."""
    return max(len(ids) for ids in processing_class(text=texts, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def score_texts(
    model: nn.Module, processing_class: Any, texts: list[str], *, rows_per_batch: int, device: torch.device
) -> Tensor:
    """First logits of `texts`, [texts] fp32 on the host.

    Args:
        model: A sequence classifier on `device`.
        processing_class: Its tokenizer.
        texts: As the model reads them; no special tokens are added.
        rows_per_batch: Texts of one forward pass. Shorter texts share a pass, so that little of it is padding.
        device: Where the token ids go.
    """
    scores = torch.empty(len(texts))
    longest_first = torch.tensor([-len(text) for text in texts]).argsort(stable=True)
    for rows in longest_first.split(rows_per_batch):
        batch = processing_class(
            text=[texts[i] for i in rows.tolist()],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        scores[rows] = model(**batch.to(device)).logits[:, 0].float().cpu()
    return scores


def _revision(args: GRPOConfig) -> str:
    return as_dict(args.model_init_kwargs).get("revision") or "main"
