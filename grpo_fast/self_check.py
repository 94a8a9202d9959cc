"""The check of a model's scores against its own logits, which settles whether its rows run packed or padded."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from grpo_fast.attention import attention_implementation, can_pack, causal_lm, comparing_windows, packed_attention
from grpo_fast.batch import Pack
from grpo_fast.modes import evaluating, training
from grpo_fast.packing import pack_rows
from grpo_fast.padding import pad_rows
from grpo_fast.policy import Scored, score

# tokens of the self-check: one prompt, two completions of different lengths
CHECK_PROMPT = 4
CHECK_COMPLETIONS = (6, 9)


def check_scoring(model: nn.Module) -> str | None:
    """Settle how a model's rows run, by comparing scores with its own logits on some two dozen random tokens.

    Rows run packed where that gives the model's own log-probs, and padded where that does and packing does not. Runs a
    few small forward passes without gradients, and leaves modes and the random state alone.

    Returns:
        Why the model cannot be packed, in words, or None if it can.

    Raises:
        ValueError: If padded rows' scores differ too: the model does something to its logits or between its tokens that
            is not known here.
    """
    lm = causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    vocabulary = min(lm.get_input_embeddings().weight.shape[0], lm.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (CHECK_PROMPT + sum(CHECK_COMPLETIONS),), generator=generator)
    prompt, *completions = (part.tolist() for part in ids.split([CHECK_PROMPT, *CHECK_COMPLETIONS]))
    prompts = [prompt] * len(completions)
    unpackable = can_pack(model)
    devices = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.no_grad(), torch.random.fork_rng(**devices):
        if unpackable is None:
            (pack,) = pack_rows(prompts, completions, max_tokens=None, share_prompts=True)
            unpackable = _why_packs_differ(model, pack.to(device), prompt, completions)
        if unpackable is not None:
            (rows,) = pad_rows(prompts, completions, max_tokens=None)
            with evaluating(model):
                error, allowed = _error(model, rows.to(device), _own_logits(model, prompt, completions, device))
            if not error <= allowed:
                raise ValueError(
                    f"model must compute its logits as its LM head times the last hidden states, with the soft cap and "
                    f"scale of its config, and from a row's own earlier tokens: {type(lm).__name__}'s own log-probs "
                    f"differ from that by {error:.3g} (allowed {allowed:.3g})"
                )
    return unpackable


def _why_packs_differ(model: nn.Module, pack: Pack, prompt: list[int], completions: list[list[int]]) -> str | None:
    """How a model's scores of a pack differ from its own log-probs, or what keeps it from running packs; or None."""
    name = type(causal_lm(model)).__name__
    try:
        # torch's own attention leaves out a soft cap on scores without a word
        with evaluating(model), attention_implementation(model, "eager"):
            own = _own_logits(model, prompt, completions, pack.input_ids.device)
        with packed_attention(model):
            with evaluating(model):
                error, allowed = _error(model, pack, own)
            # a window may reach over the whole pack, and dropout acts in training only
            with training(model), comparing_windows():
                score(model, pack, temperature=1.0)
    except torch.OutOfMemoryError:
        raise
    # whatever else keeps a model from running packs, its padded rows are checked next
    except Exception as exception:
        return f"{name} does not run packs: {exception}"
    if error <= allowed:
        return None
    return f"{name}'s scores of a pack differ from its own log-probs by {error:.3g} (allowed {allowed:.3g})"


def _own_logits(
    model: nn.Module, prompt: list[int], completions: list[list[int]], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """For each completion its ids [C] and the logits [C, V] fp32 that predict them, of its row alone."""
    rows = []
    for completion in completions:
        ids = torch.tensor([prompt + completion], device=device)
        # from the end, because an adapter may put positions of its own before the row
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(completion) - 1 : -1].float()
        rows.append((ids[0, len(prompt) :].to(logits.device), logits))
    return rows


def _error(model: nn.Module, scored: Scored, own: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """How far a completion's scores are from its own log-probs, the worst of all; and how far they may be."""
    found = score(model, scored, temperature=1.0)[0].split(scored.row_lengths)
    largest = max(logits.abs().max().item() for _, logits in own)
    errors = []
    for logps, (ids, logits) in zip(found, own, strict=True):
        expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        # the median, because a mixture of experts in bf16 may route a token otherwise
        errors.append((logps.float() - expected.to(logps.device)).abs().median().item())
    return max(errors, key=lambda error: (math.isnan(error), error)), 1e-4 + 8 * _precision(model) * max(1.0, largest)


def _precision(model: nn.Module) -> float:
    """The step of the coarsest type in the forward pass, seen from 1."""
    device = causal_lm(model).device
    # accelerate runs a model it has prepared for mixed precision under its own autocast
    prepared = any("_original_forward" in vars(module) for module in model.modules())
    autocast = prepared or torch.is_autocast_enabled(device.type)
    dtype = torch.bfloat16 if autocast else causal_lm(model).dtype
    return float(torch.finfo(dtype).eps)
