"""PEFT adapters: adding one to a model, and the reference that a policy with adapters carries in itself.

A new adapter starts as the identity, so its reference is the model without it. A `PeftModel` comes with an adapter that
is trained already; a frozen copy of that, named "ref", is its reference.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from grpo_fast.attention import causal_lm
from grpo_fast.config import GRPOConfig

logger = logging.getLogger(__name__)

REFERENCE = "ref"


def prepare_adapters(model: nn.Module, peft_config: Any, args: GRPOConfig) -> nn.Module:
    """The model to train: with a new adapter, with the adapters it has, or as it is where there are none.

    Call it before `policy.install_scoring` and `Trainer.__init__`.

    Args:
        model: A transformers model or a `PeftModel`.
        peft_config: Of the adapter to add, or None.
        args: Read for `beta`, `gradient_checkpointing` and DeepSpeed; `gradient_checkpointing_kwargs` may be changed.

    Raises:
        ImportError: If `peft_config` is given and peft is not installed.
        TypeError: If `peft_config` is not a `PeftConfig`.
        ValueError: If the model has an adapter already, if an adapter covers the LM head, whose weight the fused head
            reads directly, or if nothing is left to train.
    """
    if peft_config is not None:
        model = _add_adapter(model, peft_config, args)
    elif has_adapters(model) and args.beta:
        add_reference_adapter(model)
    if not has_adapters(model):
        return model
    refuse_head_adapter(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model is a PeftModel without a trainable parameter: load its adapter with is_trainable=True")
    if args.gradient_checkpointing:
        _prepare_checkpointing(model, args)
    if is_quantized(model):
        _narrow_trainable(model)
    return model


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` is a `PeftModel`."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes holds the model's weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _add_adapter(model: Any, peft_config: Any, args: GRPOConfig) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise ImportError("peft_config needs the package peft, which is not installed: pip install peft")
    import peft

    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            f"peft_config must be a peft.PeftConfig such as peft.LoraConfig, it is a {type(peft_config).__name__}"
        )
    if has_adapters(model):
        raise ValueError(
            "peft_config and a PeftModel cannot both be given: pass the PeftModel alone to train its adapter on, "
            "or its merge_and_unload() with a peft_config"
        )
    is_prefix = isinstance(peft_config, peft.PrefixTuningConfig)
    if is_prefix and Version(peft.__version__) <= Version("0.17.1") and hasattr(model, "hf_device_map"):
        raise ValueError(
            f"prefix tuning of a model with a device map needs peft>=0.18.0, peft {peft.__version__} is installed; "
            "or set model_init_kwargs={'device_map': None}"
        )
    # ZeRO-3 gathers adapter and base weights in one type; fp32 adapters are wanted on quantised weights only
    keep_dtype = _is_zero3(args) and not is_quantized(model)
    adapted: nn.Module = peft.get_peft_model(model, peft_config, autocast_adapter_dtype=not keep_dtype)
    return adapted


def refuse_head_adapter(model: nn.Module) -> None:
    """Refuse an adapter on the LM head (ValueError): log-probs read the head's own weight, so it would not train."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "peft_config covers the LM head (`lm_head`), whose adapter would not be trained; leave it out of "
            "target_modules, or train the head itself with modules_to_save"
        )


def _is_zero3(args: GRPOConfig) -> bool:
    plugin = getattr(args, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def _prepare_checkpointing(model: Any, args: GRPOConfig) -> None:
    if _is_zero3(args):
        kwargs = dict(args.gradient_checkpointing_kwargs or {})
        if kwargs.get("use_reentrant") is False:
            logger.warning(
                "gradient_checkpointing_kwargs['use_reentrant']=False is set to True: adapters under ZeRO-3 need it"
            )
        args.gradient_checkpointing_kwargs = kwargs | {"use_reentrant": True}
    # the inputs of a checkpointed layer must want gradients for its adapters to get theirs
    model.enable_input_require_grads()


def _narrow_trainable(model: nn.Module) -> None:
    """Adapters of quantised models train in bf16 (QLoRA, arXiv:2305.14314, section 3).

    A DoRA magnitude stays as it is: steps smaller than bf16 can hold would not move it.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def add_reference_adapter(model: Any) -> None:
    """Give a `PeftModel` a frozen copy of its active adapter, "ref", that `save_pretrained` leaves out.

    Which adapters are active and what trains stay as they are. Where peft cannot hold two adapters on
    `target_parameters` (before 0.20) nothing is added but a warning logged, and the reference is the base model.

    Raises:
        ValueError: If several adapters are active, or the active one is named "ref".
    """
    import peft

    if len(model.active_adapters) != 1 or model.active_adapters == [REFERENCE]:
        raise ValueError(
            f"beta != 0 with a PeftModel takes one active adapter, not named {REFERENCE!r} (the name of the reference);"
            f" active are {', '.join(model.active_adapters)}"
        )
    (active,) = model.active_adapters
    config = copy.deepcopy(model.peft_config[active])
    if getattr(config, "target_parameters", None) and Version(peft.__version__) < Version("0.20.0"):
        logger.warning(
            "peft %s cannot hold a copy of an adapter with target_parameters, so the reference is the base model "
            "without adapters: the same only where the adapter is still at its start. peft>=0.20.0 can",
            peft.__version__,
        )
        return
    # an initialisation from the base weights, such as PiSSA's, would change them again
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    with _unchanged(model):
        if REFERENCE in model.peft_config:
            logger.warning("the adapter %r is replaced by a copy of %r, the reference", REFERENCE, active)
            model.delete_adapter(REFERENCE)
        tensors, modules = {name for name, _ in _tensors(model)}, set(model.modules())
        model.add_adapter(REFERENCE, config)
        _copy_adapter(model, active, tensors)
        for module in set(model.modules()) - modules:
            module.training = model.training
    if not getattr(model.save_pretrained, "_omits_reference", False):
        model.save_pretrained = MethodType(_without_reference(type(model).save_pretrained), model)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


@torch.no_grad()
def _copy_adapter(model: nn.Module, source: str, before: set[str]) -> None:
    """Fill the tensors that are not in `before`, those of "ref", with those of the adapter `source`."""
    tensors = dict(_tensors(model))
    for name in tensors.keys() - before:
        owner, _, rest = f".{name}.".rpartition(f".{REFERENCE}.")
        original = tensors[f"{owner}.{source}.{rest}".strip(".")]
        tensors[name].data = original.detach().clone()
        tensors[name].requires_grad_(False)


def _without_reference(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(
        self: Any,
        save_directory: Any,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if selected_adapters is None:
            selected_adapters = [name for name in self.peft_config if name != REFERENCE]
        return original(self, save_directory, safe_serialization, selected_adapters, *args, **kwargs)

    save_pretrained._omits_reference = True  # type: ignore[attr-defined]
    return save_pretrained


@contextmanager
def reference_adapter(model: nn.Module) -> Iterator[None]:
    """The reference inside the block: the adapter "ref" where there is one, else the base model without adapters.

    After it the adapters that were active are so again, and what wanted gradients wants them; peft itself would make
    every parameter of an adapter trainable that it activates.

    Args:
        model: A `PeftModel`, or a wrapper around it.
    """
    adapted: Any = _peft_model(model)
    with _unchanged(adapted):
        if REFERENCE in adapted.peft_config:
            adapted.set_adapter(REFERENCE)
            yield
        else:
            with adapted.disable_adapter():
                yield


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Active adapters and the wish for gradients, as they were at entry."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    name, names = model.active_adapter, model.active_adapters
    try:
        yield
    finally:
        if model.active_adapters != names:
            model.set_adapter(name)
            # the model may have several active adapters, its wrapper knows of one
            if len(names) > 1:
                model.base_model.set_adapter(names)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


def _peft_model(model: nn.Module) -> nn.Module:
    """The `PeftModel` inside DDP, FSDP, DeepSpeed and torch.compile wrappers."""
    inner: Any = model
    while not has_adapters(inner):
        wrapped = [getattr(inner, name, None) for name in ("_orig_mod", "module")]
        inner = next((part for part in wrapped if isinstance(part, nn.Module)), None)
        if inner is None:
            raise ValueError(f"model must be or wrap a PeftModel, it is a {type(model).__name__}")
    return inner
