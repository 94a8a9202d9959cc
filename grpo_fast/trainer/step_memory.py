"""What a training step holds in memory beside weights, gradients and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from grpo_fast.activations import decoder_layers
from grpo_fast.attention import causal_lm
from grpo_fast.heap import kept_peak
from grpo_fast.mixed_linear import mixed_linears
from grpo_fast.tied_embedding import joined_lookups
from grpo_fast.trainer.base import BaseTrainer


class StepMemoryTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that makes training steps on a CPU smaller, and changes no number."""

    @contextmanager
    def _small_steps(self) -> Iterator[None]:
        """Around a training run, after which the model is as it was."""
        # FSDP, DeepSpeed and torch.compile put weights and layers into places of their own. An accelerator gains too
        # little from rounding weights twice: of 1.5 B weights the copies are 3 GB of 80, for 6 bytes a weight at
        # 3.3 TB/s, which beside 6 operations a token and weight at 400 TFLOP/s are 1 % of a pass of 16,384 tokens and
        # 6 % of 2,048, and a kernel and a Python call more a layer
        if (
            self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or self.args.torch_compile
            or self.args.device.type != "cpu"
        ):
            yield
            return
        lm = causal_lm(self.model)
        with ExitStack() as stack:
            stack.enter_context(joined_lookups(lm, lm.get_output_embeddings()))
            # accelerate has no fp16 on a CPU
            if self.accelerator.mixed_precision == "bf16":
                stack.enter_context(mixed_linears(self.model))
            stack.enter_context(kept_peak(self.model, decoder_layers(self.model), lm.get_output_embeddings()))
            yield
