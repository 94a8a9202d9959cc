"""Which optimizer trains the policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_fast.optimizer import ShadowAdamW
from grpo_fast.trainer.engines import EngineTrainer


class OptimizerTrainer(EngineTrainer):
    """The part of `GRPOTrainer` that makes the optimizer."""

    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`; where that makes torch's AdamW, its step writes the engine's shadows, too."""
        chosen = self._shadowing_adamw(model)
        if chosen is None:
            return super().create_optimizer(model)
        # where `Trainer` looks before it asks for a class itself
        self.optimizer_cls_and_kwargs = chosen
        try:
            optimizer = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None
        optimizer.register_step_post_hook(lambda *_: self.engine.shadows_written())
        return optimizer

    def _shadowing_adamw(self, model: nn.Module | None) -> tuple[type[ShadowAdamW], dict[str, Any]] | None:
        """Class and arguments; None where the user chose an optimizer, it is sharded, or nothing has a shadow."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None or is_sharded:
            return None
        shadows = {param: shadow for param, shadow in self.engine.shadows().items() if param.requires_grad}
        if not shadows:
            return None
        theirs, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model if model is None else model)
        if theirs is not torch.optim.AdamW:
            return None
        return ShadowAdamW, {"fused": None} | kwargs | {"shadows": shadows}
