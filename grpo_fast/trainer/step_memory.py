"""What a training step holds in memory beside weights, gradients and the optimizer's state."""

from __future__ import annotations

from grpo_fast.activations import decoder_layers
from grpo_fast.attention import causal_lm
from grpo_fast.heap import keep_peak
from grpo_fast.mixed_linear import install_mixed_linear
from grpo_fast.tied_embedding import install_lookup
from grpo_fast.trainer.base import BaseTrainer


class StepMemoryTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that makes training steps smaller, and changes no number."""

    def _shrink_steps(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile:
            # they put weights and layers into places of their own
            return
        lm = causal_lm(self.model)
        install_lookup(lm.get_input_embeddings())
        if self.accelerator.mixed_precision in ("bf16", "fp16"):
            install_mixed_linear(self.model)
        if self.args.device.type == "cpu":
            keep_peak(self.model, decoder_layers(self.model), lm.get_output_embeddings())
