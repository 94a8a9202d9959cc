"""The reference model of the KL penalty: a frozen copy of the initial policy, and its steps towards the policy."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grpo_fast.attention import causal_lm
from grpo_fast.config import GRPOConfig
from grpo_fast.loading import cast_lm_head_to_fp32, load_model
from grpo_fast.policy import install_scoring


def make_reference(model: nn.Module, args: GRPOConfig) -> nn.Module | None:
    """A frozen copy of the policy as it is, or None where `beta` is 0 or the policy's adapters serve.

    Call it after `policy.install_scoring` and `loading.cast_lm_head_to_fp32`.

    The copy is taken in memory, so it is right for models that were never saved or were changed after loading, which
    TRL reads from disk again. Only a model whose weights DeepSpeed ZeRO-3 has already spread is read again.

    Raises:
        NotImplementedError: If `sync_ref_model` is set for a model with adapters.
    """
    has_adapters = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if args.sync_ref_model and has_adapters:
        raise NotImplementedError(
            "sync_ref_model=True is not supported with adapters: their reference is the model without them, or a frozen"
            " copy of the adapter. Train all weights, or set sync_ref_model=False"
        )
    if not args.beta or has_adapters:
        return None
    reference = _reloaded(model, args) if _is_spread(model) else copy.deepcopy(model)
    return reference.requires_grad_(False).eval()


def _is_spread(model: nn.Module) -> bool:
    # DeepSpeed numbers the parameters it has partitioned; their tensors are empty
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _reloaded(model: nn.Module, args: GRPOConfig) -> nn.Module:
    lm = causal_lm(model)
    settings = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    settings |= {"dtype": lm.dtype, "attn_implementation": lm.config._attn_implementation}
    settings.pop("torch_dtype", None)
    args = copy.copy(args)
    args.model_init_kwargs = settings
    reference = load_model(lm.config._name_or_path, args)
    install_scoring(reference)
    if args.cast_lm_head_to_fp32:
        cast_lm_head_to_fp32(reference)
    return reference


def prepare_reference(trainer: Trainer, reference: nn.Module) -> nn.Module:
    """Place a reference model as the run places its policy: by DeepSpeed, FSDP or accelerate alone; in evaluation mode.

    Args:
        trainer: After `Trainer.__init__`.
        reference: From `make_reference`.
    """
    if trainer.is_deepspeed_enabled:
        return _prepare_deepspeed(trainer.accelerator, reference)
    if trainer.is_fsdp_enabled:
        return _prepare_fsdp(trainer.accelerator, reference)
    prepared: nn.Module = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    return prepared.eval()


def _prepare_deepspeed(accelerator: Any, reference: nn.Module) -> nn.Module:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=reference,
        config=inference_config(accelerator.state.deepspeed_plugin.deepspeed_config, causal_lm(reference).config),
    )
    evaluated: nn.Module = engine.eval()
    return evaluated


def inference_config(config: dict[str, Any], model_config: Any) -> dict[str, Any]:
    """A run's DeepSpeed config for a model that is never trained.

    ZeRO-3 spreads it like the policy, with buckets of its own width where the config leaves them "auto"; other stages
    would spread optimizer states and gradients, which it has not.
    """
    config = copy.deepcopy(config)
    for training_only in ("optimizer", "scheduler"):
        config.pop(training_only, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0
        return config
    width = max(getattr(model_config, "hidden_sizes", None) or [model_config.get_text_config().hidden_size])
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_param_persistence_threshold": 10 * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
    }
    for name, size in sizes.items():
        if zero.get(name, "auto") == "auto":
            zero[name] = size
    return config


def _prepare_fsdp(accelerator: Any, reference: nn.Module) -> nn.Module:
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        prepared: nn.Module = fsdp2_prepare_model(accelerator, reference)
    else:
        # wraps like the policy; its own evaluation mode would leave the model whole
        prepared = accelerator.prepare_model(reference)
    return prepared.eval()


class SyncRefModelCallback(TrainerCallback):
    """Move a reference model towards the policy (TR-DPO, arXiv:2404.09656): `ref = alpha policy + (1 - alpha) ref`.

    It happens every `ref_model_sync_steps` optimizer steps with alpha = `ref_model_mixup_alpha`.
    """

    def __init__(self, ref_model: nn.Module, accelerator: Any) -> None:
        self.ref_model = ref_model
        self.accelerator = accelerator

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After an optimizer step, before a checkpoint is written."""
        assert isinstance(args, GRPOConfig)
        if state.global_step % args.ref_model_sync_steps == 0:
            mix(kwargs["model"], self.ref_model, alpha=args.ref_model_mixup_alpha, state=self.accelerator.state)


def mix(policy: nn.Module, reference: nn.Module, *, alpha: float, state: Any) -> None:
    """Set the reference's weights to `alpha` times the policy's plus `1 - alpha` times its own, in place.

    ZeRO-3 and FSDP1 hold both models whole meanwhile. FSDP1 keeps its outermost weights from the forward pass before,
    which TRL mixes past: its reference goes on with the old ones.

    Args:
        policy: The model in training.
        reference: The same architecture, spread over processes in the same way.
        alpha: The policy's share.
        state: accelerate's, which knows whether ZeRO-3 must gather the weights.
    """
    plugin = getattr(state, "deepspeed_plugin", None)
    with ExitStack() as stack:
        is_writer = True
        if plugin is not None and plugin.zero_stage == 3:
            import deepspeed

            # process 0 writes, and its weights are spread again at the end
            parameters = [*policy.parameters(), *reference.parameters()]
            stack.enter_context(deepspeed.zero.GatheredParameters(parameters, modifier_rank=0))
            is_writer = deepspeed.comm.get_rank() == 0
        _reach_weights(stack, policy, writes=False)
        _reach_weights(stack, reference, writes=True)
        if is_writer:
            for own, other in zip(reference.parameters(), policy.parameters(), strict=True):
                own.data.mul_(1.0 - alpha).add_(other.data, alpha=alpha)


def _reach_weights(stack: ExitStack, model: nn.Module, *, writes: bool) -> None:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    modules = list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=writes))
    for module in modules:
        # FSDP2 leaves some weights whole after a forward pass, which are other parameters than the sharded ones
        if isinstance(module, FSDPModule):
            module.reshard()
