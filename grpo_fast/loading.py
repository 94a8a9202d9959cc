"""Models, tokenizers and processors from what the user passed, with errors before anything large is read."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from grpo_fast.attention import causal_lm
from grpo_fast.config import GRPOConfig, as_dict

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32", "float64")
# the entries of model_init_kwargs that say where files come from, so that configs and tokenizers need them too
SOURCE_KEYS = ("revision", "token", "cache_dir", "local_files_only")
DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def load_config(model: str | nn.Module, args: GRPOConfig) -> Any:
    """The config of a model that may not be loaded yet; reads no weights.

    Raises:
        ValueError: If `model` is a path that does not exist, or a name that cannot be resolved.
    """
    if not isinstance(model, str):
        return model.config
    kwargs = as_dict(args.model_init_kwargs)
    if isinstance(kwargs.get("config"), transformers.PreTrainedConfig):
        return kwargs["config"]
    folder = Path(model)
    is_path = model.startswith((".", "~", os.sep)) or model.count("/") > 1
    if is_path and not (folder / kwargs.get("subfolder", "") / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        if (folder / "adapter_config.json").is_file():
            what = "holds an adapter only (load it with peft.AutoPeftModelForCausalLM and pass the model)"
        raise ValueError(f"model={model!r}: the folder {what}; pass a folder written by save_pretrained, or a hub id")
    subfolder = {"subfolder": kwargs["subfolder"]} if "subfolder" in kwargs else {}
    try:
        return AutoConfig.from_pretrained(model, **_source(args), **subfolder)
    except OSError as error:
        raise ValueError(f"model={model!r} is neither a folder nor a model the hub can give: {error}") from error


def load_model(model: str, args: GRPOConfig, quantization_config: Any = None) -> PreTrainedModel:
    """The model at `model`, of the class its config names, with `model_init_kwargs` (which is left as it is).

    It is fp32 unless `model_init_kwargs` says otherwise: mixed precision keeps fp32 master weights. One process on an
    accelerator places it with `device_map="auto"`.

    Args:
        model: A folder or hub id of a causal LM or a vision-language model.
        args: Read for `model_init_kwargs` and `trust_remote_code`.
        quantization_config: Goes to `from_pretrained`.

    Raises:
        ValueError: If the quantisation is given twice, the dtype is unknown, or the model does not generate text.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **as_dict(args.model_init_kwargs)}
    if quantization_config is not None:
        if kwargs.get("quantization_config") is not None:
            raise ValueError("quantization_config is given twice: as an argument and in model_init_kwargs; keep one")
        kwargs["quantization_config"] = quantization_config
    kwargs["dtype"] = _dtype(kwargs)
    kwargs["device_map"] = _device_map(kwargs, args)
    architecture = _architecture(model, load_config(model, args))
    loaded: PreTrainedModel = architecture.from_pretrained(model, **kwargs)
    return loaded


def warn_of_ignored_settings(args: GRPOConfig, quantization_config: Any = None) -> None:
    """Log what has no effect on a model that was passed as an instance."""
    given = {"model_init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}
    for name, value in given.items():
        if value is not None:
            logger.warning("%s is ignored: the model was passed as an instance", name)


def _dtype(kwargs: dict[str, Any]) -> Any:
    """What `from_pretrained` takes as dtype; removes the name this had before transformers 5."""
    legacy = kwargs.pop("torch_dtype", None)
    dtype = kwargs.get("dtype", "float32" if legacy is None else legacy)
    if legacy is not None and str(legacy).removeprefix("torch.") != str(dtype).removeprefix("torch."):
        raise ValueError(
            f"model_init_kwargs has dtype={dtype!r} and, under its former name, torch_dtype={legacy!r}; keep dtype"
        )
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(
            f"model_init_kwargs['dtype'] must be a torch.dtype, 'auto' or one of {', '.join(DTYPES)}; it is {dtype!r}"
        )
    return getattr(torch, dtype)


def _device_map(kwargs: dict[str, Any], args: GRPOConfig) -> Any:
    device_type = args.device.type
    state = args.distributed_state
    assert state is not None, "args.device sets it"
    if state.num_processes > 1 or state.distributed_type == DistributedType.DEEPSPEED:
        if kwargs.get("device_map") is not None:
            logger.warning(
                "model_init_kwargs['device_map']=%r is ignored: each of several processes places the whole model",
                kwargs["device_map"],
            )
        return None
    return kwargs.get("device_map", None if device_type in ("cpu", "mps") else "auto")


def _architecture(model: str, config: Any) -> Any:
    """The class to load: the one the config names, or an auto class for one that comes with the model."""
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    architecture = getattr(transformers, name, None) if name is not None else None
    if architecture is None:
        auto_map = getattr(config, "auto_map", None) or {}
        is_vision = AutoModelForImageTextToText.__name__ in auto_map
        return AutoModelForImageTextToText if is_vision else AutoModelForCausalLM
    if not issubclass(architecture, GenerationMixin):
        raise ValueError(
            f"model={model!r} must be a model that generates text; its config names the architecture {name}"
        )
    return architecture


def load_processing_class(model: str | nn.Module, args: GRPOConfig) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What belongs to a model: a tokenizer for text, a processor for a multimodal one; it pads and cuts on the left.

    Raises:
        ValueError: If the model was not loaded from anywhere, or there is nothing to load where it came from.
    """
    name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
    if not name:
        raise ValueError("processing_class must be given: the model was not loaded from a folder or the hub")
    # an instance was not loaded with model_init_kwargs
    source = _source(args) if isinstance(model, str) else {"trust_remote_code": args.trust_remote_code}
    try:
        return AutoProcessor.from_pretrained(name, truncation_side="left", padding_side="left", **source)
    except (OSError, ValueError) as error:
        raise ValueError(f"processing_class must be given: {name!r} has no tokenizer that loads: {error}") from error


def prepare_tokenizer(processing_class: object) -> PreTrainedTokenizerBase:
    """The tokenizer in a processing class, whose pad token becomes the end-of-sequence token where it has none.

    Raises:
        TypeError: If it is neither a tokenizer nor a processor.
        ValueError: If it has neither token.
    """
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer or a processor, it is a {type(processing_class).__name__}"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("processing_class must have a pad_token or an eos_token to pad with, it has neither")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def mirror_pad_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's pad token into the model's text config and its generation config."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def declared_eos_token_ids(config: Any) -> list[int]:
    """The tokens that a model's config or generation config says end a text."""
    declared = getattr(getattr(config, "get_text_config", lambda: config)(), "eos_token_id", None)
    return [declared] if isinstance(declared, int) else list(declared or ())


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the generation config's, after the tokenizer's if that is not among them."""
    ends = declared_eos_token_ids(model.generation_config)
    own = tokenizer.eos_token_id
    return ends if own is None or own in ends else [own, *ends]


def find_unused_parameters(args: GRPOConfig) -> None:
    """For a vision-language model: let DDP look for parameters without gradients, as texts leave the vision tower.

    A user's own choice stands, and reentrant checkpointing cannot do it.
    """
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True


def refuse_data_parallel(args: GRPOConfig) -> None:
    """Refuse several GPUs in one process (ValueError), unless the model is split over them.

    Call it after `Trainer.__init__`, which sets `args.n_gpu` to 1 for a split model.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, on which Trainer would use nn.DataParallel, which is not supported; "
            "start the script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them"
        )


def disable_dropout(model: nn.Module) -> None:
    """Turn every dropout of a model off: layers, an adapter's too, and the rates that modules and configs hold.

    Attention takes its rate from a number and not from a layer, which TRL leaves as it is. The zero is written into the
    model's config, so that a checkpoint says it too.
    """
    for module in model.modules():
        if isinstance(module, DROPOUT_LAYERS):
            module.p = 0.0
        configs = [value for value in vars(module).values() if isinstance(value, transformers.PreTrainedConfig)]
        for holder in (module, *configs):
            _zero_rates(holder)


def _zero_rates(holder: object) -> None:
    for name, value in list(vars(holder).items()):
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


def cast_lm_head_to_fp32(model: nn.Module) -> None:
    """Keep the LM head in fp32 and run it outside autocast, whether it scores or makes logits.

    An embedding tied to it becomes fp32 too, and still gives the dtype it gave before. Call this after
    `policy.install_scoring`, whose way of calling the head it wraps, and before `Trainer` makes its optimizer.

    Raises:
        ValueError: If an adapter trains the head, which then is not one matrix.
    """
    lm = causal_lm(model)
    head: Any = lm.get_output_embeddings()
    linears = [head]
    if hasattr(head, "modules_to_save"):
        linears = [head.original_module, *head.modules_to_save.values()]
    for linear in linears:
        if hasattr(linear, "base_layer"):
            raise ValueError(
                "cast_lm_head_to_fp32=True needs an LM head without an adapter: leave it out of the peft_config"
            )
        dtype = linear.weight.dtype
        linear.float()
        if not getattr(linear.forward, "_is_fp32", False):
            linear.forward = MethodType(_outside_autocast(linear.forward), linear)
        embedding = lm.get_input_embeddings()
        if embedding.weight is linear.weight and dtype != torch.float32:
            embedding.register_forward_hook(functools.partial(_cast_output, dtype))


def _outside_autocast(bound: Callable[..., Any]) -> Callable[..., Any]:
    # unbound, so that a deep copy of the module calls itself and not the original
    original = getattr(bound, "__func__", None) or (lambda self, *args, **kwargs: bound(*args, **kwargs))

    @functools.wraps(original)
    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(input.device.type, enabled=False):
            # FSDP may gather the weight in a narrower type than it keeps
            return original(self, input.to(self.weight.dtype), *args, **kwargs)

    forward._is_fp32 = True  # type: ignore[attr-defined]
    return forward


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def _source(args: GRPOConfig) -> dict[str, Any]:
    kwargs = {"trust_remote_code": args.trust_remote_code, **as_dict(args.model_init_kwargs)}
    return {key: kwargs[key] for key in ("trust_remote_code", *SOURCE_KEYS) if key in kwargs}
