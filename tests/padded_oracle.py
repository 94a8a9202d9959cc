"""A policy in plain PyTorch on TRL's padded layout: logits of left-padded prompts and right-padded completions.

The model's own forward pass, positions from 0 in each row, and torch's log-softmax; nothing of `grpo_fast`.

Letters: B rows of a micro-batch, P padded prompt length, C padded completion length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class StaysDouble(TorchFunctionMode):
    """Models cast to fp32 inside norms, rotations and softmaxes; here such casts go to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Padded:
    """Rows in TRL's layout; [B, P + C] int64 each but the mask of scored tokens, [B, C] bool."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    is_scored: Tensor

    @staticmethod
    def of(prompts: list[tuple[int, ...]], completions: list[tuple[int, ...]], is_kept: list[bool]) -> Padded:
        """Prompts padded left, completions right; one that is not kept is not attended to either."""
        width, length = max(map(len, prompts)), max([1, *map(len, completions)])
        ids = torch.zeros(len(prompts), width + length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids[i, width - len(prompt) : width + len(completion)] = torch.tensor(prompt + completion)
            mask[i, width - len(prompt) : width + len(completion) * is_kept[i]] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return Padded(ids, mask, positions, mask[:, width:].bool())


class PaddedPolicy:
    """A model whose weights can be set to those of a moment of a run; exact in float64."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float64) -> None:
        self.model, self.dtype = model.to(dtype).train(), dtype
        lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        lm.set_attn_implementation("eager")
        if lm._can_set_experts_implementation():
            lm.set_experts_implementation("eager")
        self.has_routers = hasattr(lm.config, "num_experts")
        self.experts = getattr(lm.config, "num_experts", 0), getattr(lm.config, "num_experts_per_tok", 0)
        self.load(weights)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the weights to a run's, which may have an adapter more."""
        missing, _ = self.model.load_state_dict(dict(weights), strict=False)
        assert not missing, missing

    def without_adapter(self) -> AbstractContextManager[Any]:
        model: Any = self.model
        return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()

    def score(self, rows: Padded, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies [B, C], 0 where not scored, and the routers' auxiliary loss or None."""
        length = rows.is_scored.shape[1]
        with StaysDouble() if self.dtype == torch.float64 else nullcontext():
            outputs = self.model(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                position_ids=rows.position_ids,
                use_cache=False,
                **({"output_router_logits": True} if self.has_routers else {}),
            )
            assert outputs.logits.dtype == self.dtype
            logps_BCV = (outputs.logits[:, -length - 1 : -1] / temperature).log_softmax(-1)
        logps = logps_BCV.gather(-1, rows.input_ids[:, -length:, None])[..., 0]
        entropies = -(logps_BCV.exp() * logps_BCV).sum(-1)
        aux_loss = self._aux_loss(outputs.router_logits, rows.attention_mask) if self.has_routers else None
        logps, entropies = (torch.where(rows.is_scored, values, 0.0) for values in (logps, entropies))
        return logps, entropies, aux_loss

    def _aux_loss(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
        """Switch Transformers (arXiv:2101.03961), eqs. 4 to 6, over the unpadded tokens of all layers."""
        num_experts, num_chosen = self.experts
        is_token = attention_mask.flatten().bool()
        probs = torch.cat([logits[is_token] for logits in router_logits]).softmax(-1)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(num_chosen).indices, 1.0)
        return num_experts * (chosen.mean(0) * probs.mean(0)).sum()

    @torch.no_grad()
    def logps_of(self, rows: Mapping[Any, Any], *, temperature: float) -> dict[Any, list[float]]:
        """The log-probs of every row's completion, by its key."""
        keys = list(rows)
        padded = Padded.of([key[0] for key in keys], [key[1] for key in keys], [True] * len(keys))
        logps, *_ = self.score(padded, temperature)
        return {key: row[: len(key[1])].tolist() for key, row in zip(keys, logps, strict=True)}
