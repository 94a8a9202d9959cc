"""The policy's log-probs of packed rows: the decoder runs on the pack, and the LM head scores where it made logits.

Letters: T packed tokens, N scored tokens, D hidden width, V vocabulary.

`install_scoring` gives two modules of a model another way to be called. The causal LM accepts a `ScoreRequest`, and
then returns log-probs in place of logits. Its LM head accepts one too, and then scores hidden states with its own
weight inside its own forward, so that whatever hooks gather or cast that weight have done so. Without a request both
behave as before. Nothing is replaced in classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_fast.attention import AttentionPlan, causal_lm, is_packed, running_packs
from grpo_fast.batch import Pack, PaddedRows
from grpo_fast.tied_embedding import head_weight, one_gradient
from grpo_kernels import linear_logps, linear_loss
from grpo_kernels.linear_loss import RowsLoss

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# what Gemma, RecurrentGemma and xLSTM call the soft cap on their logits
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

Forward = Callable[..., Any]
Scored = Pack | PaddedRows


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What to score on a pack.

    Attributes:
        predict: [N] int64, packed positions whose hidden states are scored.
        targets: [N] int64, the tokens they predict.
        temperature: What the logits are divided by.
        return_entropy: Whether entropies are wanted too.
        loss: What turns log-probs into a loss, computed with its gradients in the same pass; or None.
        has_entropy_slope: With `loss`: whether it slopes in the entropies.
        sequence_lengths: With `loss`: lengths of the runs of targets it wants to see whole, or None.
        width: Positions of a row that `predict` counts: the last ones, where an adapter puts its own before them.
        aux_weights: [B, T], how often each token counts in the load-balancing loss of a mixture of experts, which is
            then wanted too; or None.
    """

    predict: Tensor
    targets: Tensor
    temperature: float
    return_entropy: bool = False
    loss: RowsLoss | None = None
    has_entropy_slope: bool = False
    sequence_lengths: tuple[int, ...] | None = None
    width: int
    aux_weights: Tensor | None = None


def install_scoring(model: nn.Module) -> None:
    """Let `model` be called with `score=ScoreRequest(...)`. Installing twice does nothing more.

    Call it before the model is wrapped by accelerate, DDP or FSDP, and after PEFT.

    Args:
        model: A transformers causal LM, alone or inside PEFT.

    Raises:
        ValueError: If there is no causal LM in `model`, or its LM head is not a plain linear layer.
    """
    lm = causal_lm(model)
    for linear in _head_linears(lm):
        # torch.compile leaves the head alone: its tiles and their gradients are no graph
        _install(linear, lambda original: torch.compiler.disable(_scoring_head(original)))
    _install(lm, _scoring_lm)


def score(
    model: nn.Module, scored: Scored, *, temperature: float, return_entropy: bool = False, return_aux_loss: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs, and on request more, of some rows' tokens under `model`.

    A pack is scored inside `packed_attention`, padded rows with the model's own attention inside and outside of it.

    Args:
        model: The model `install_scoring` was called on, or a wrapper around it.
        scored: A `Pack` or `PaddedRows`, on the model's device.
        temperature: What the logits are divided by.
        return_entropy: Whether to compute entropies.
        return_aux_loss: Whether to compute the load-balancing loss of a mixture of experts, over all unpadded tokens of
            the rows. It is that of the rows alone only if they are all run in full.

    Returns:
        logps [N] fp32, entropy [N] fp32 or None, auxiliary loss 0-dim or None. All differentiable; the logits are not
        computed as a whole.

    Raises:
        ValueError: If `scored` is a pack and the model is outside `packed_attention`.
    """
    request = _request(scored, temperature, return_entropy=return_entropy, return_aux_loss=return_aux_loss)
    return _call(model, scored, request)


def score_loss(
    model: nn.Module,
    scored: Scored,
    loss: RowsLoss,
    *,
    temperature: float,
    has_entropy_slope: bool = False,
    needs_whole_rows: bool = False,
    return_aux_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A loss of some rows' log-probs under `model`, whose head computes it with its gradients in one pass.

    Args:
        model: As in `score`.
        scored: As in `score`.
        loss: From some tokens' log-probs and entropies to their terms; `grpo_kernels.linear_loss` says when.
        temperature: What the logits are divided by.
        has_entropy_slope: Whether `loss` slopes in the entropies.
        needs_whole_rows: Whether `loss` wants to see all tokens of a row at a time.
        return_aux_loss: As in `score`.

    Returns:
        The loss, 0-dim and differentiable, once; log-probs and entropies [N] fp32, without gradients; and the auxiliary
        loss, 0-dim and differentiable, or None.

    Raises:
        ValueError: As `score`.
    """
    lengths = scored.row_lengths if needs_whole_rows else None
    request = _request(
        scored,
        temperature,
        loss=loss,
        has_entropy_slope=has_entropy_slope,
        sequence_lengths=lengths,
        return_aux_loss=return_aux_loss,
    )
    return _call(model, scored, request)


def _request(scored: Scored, temperature: float, *, return_aux_loss: bool, **wanted: Any) -> ScoreRequest:
    aux_weights = None
    if return_aux_loss:
        aux_weights = scored.token_rows if isinstance(scored, Pack) else scored.model_inputs["attention_mask"]
    return ScoreRequest(
        predict=scored.predict,
        targets=scored.targets,
        temperature=temperature,
        width=scored.width,
        aux_weights=aux_weights,
        **wanted,
    )


def _call(model: nn.Module, scored: Scored, request: ScoreRequest) -> Any:
    if isinstance(scored, PaddedRows):
        return model(**scored.model_inputs, use_cache=False, score=request)
    if not is_packed(model):
        raise ValueError("scored must be PaddedRows outside packed_attention, got a Pack")
    plan = AttentionPlan(scored.layout, scored.input_ids.device)
    # without a mask transformers looks at the positions for packed rows, and waits for the device
    mask = torch.ones_like(scored.input_ids)
    inputs = {"input_ids": scored.input_ids, "position_ids": scored.position_ids, "attention_mask": mask}
    with running_packs():
        return model(**inputs, use_cache=False, layout=plan, score=request)


def _head_linears(lm: nn.Module) -> list[nn.Linear]:
    """The linear layers the LM head may score with: itself, or the copies PEFT's `modules_to_save` keeps of it."""
    head = lm.get_output_embeddings()  # type: ignore[operator]
    candidates = [head]
    if hasattr(head, "modules_to_save"):
        candidates = [head.original_module, *head.modules_to_save.values()]
    for linear in candidates:
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise ValueError(
                f"model's LM head must be a torch.nn.Linear in a floating-point type, got {type(linear).__name__} "
                f"in {type(lm).__name__} (to train the head beside an adapter use PEFT's modules_to_save)"
            )
    return candidates


def _install(module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
    if getattr(module.forward, "_scores", False):
        return
    # unbound, so that a deep copy of the module calls itself and not the original
    original = getattr(module.forward, "__func__", None)
    if original is None:
        bound = module.forward
        original = functools.wraps(bound)(lambda self, *args, **kwargs: bound(*args, **kwargs))
    forward = functools.wraps(original)(wrap(original))
    forward._scores = True  # type: ignore[attr-defined]
    module.forward = MethodType(forward, module)


def _scoring_lm(original: Forward) -> Forward:
    def forward(self: Any, *args: Any, score: ScoreRequest | None = None, **kwargs: Any) -> Any:
        if score is None:
            return original(self, *args, **kwargs)
        # PEFT names every argument it knows, unset ones as None
        given = {name: value for name, value in kwargs.items() if value is not None}
        if score.aux_weights is not None:
            given["output_router_logits"] = True
        with nullcontext() if torch.compiler.is_compiling() else one_gradient():
            outputs = backbone(self)(*args, **given)
            hidden = outputs[0][:, -score.width :].flatten(0, 1)
            softcap, logit_scale = _logit_transform(self.config.get_text_config())
            results = self.get_output_embeddings()(
                hidden.index_select(0, score.predict.to(hidden.device)),
                score=score,
                softcap=softcap,
                logit_scale=logit_scale,
            )
        return *results, None if score.aux_weights is None else _aux_loss(self, outputs, score.aux_weights)

    return forward


def backbone(lm: Any) -> nn.Module:
    """What turns token ids, and images, into hidden states."""
    if lm.config.get_text_config() is not lm.config:
        return lm.base_model
    # models name it as they like; a "decoder" may be the LM head
    for module in (lm.get_decoder(), lm.base_model, getattr(lm, "model", None)):
        if isinstance(module, nn.Module) and module is not lm and module is not lm.get_output_embeddings():
            return module
    raise ValueError(f"model must keep its decoder under its base_model_prefix, {type(lm).__name__} does not")


def aux_loss_coef(model: nn.Module, given: float | None) -> float:
    """The weight of the auxiliary loss: what the user says, else what the model's config says, 0 for dense models.

    Raises:
        ValueError: If the user gives one to a model that is no mixture of experts.
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    is_mixture = hasattr(config, "output_router_logits")
    if given and not is_mixture:
        raise ValueError(
            f"router_aux_loss_coef={given} needs a mixture of experts that returns its router logits, the model is "
            f"{type(lm).__name__}"
        )
    coef = getattr(config, "router_aux_loss_coef", 0.0) if given is None else given
    return float(coef) if is_mixture else 0.0


def _aux_loss(lm: Any, outputs: Any, weights: Tensor) -> Tensor:
    """The load-balancing loss of a forward pass whose tokens count `weights` times (arXiv:2101.03961, eqs. 4 to 6)."""
    # every family of transformers takes Mixtral's
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = lm.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(outputs.router_logits, num_experts, config.num_experts_per_tok, weights)


def _scoring_head(original: Forward) -> Forward:
    def forward(
        self: Any,
        input: Tensor,
        *args: Any,
        score: ScoreRequest | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if score is None:
            return original(self, input, *args, **kwargs)
        targets = score.targets.to(input.device)
        if input.shape[-1] != self.weight.shape[-1]:
            raise ValueError(
                "model must compute its logits as its LM head times the last hidden states: the head takes "
                f"{self.weight.shape[-1]} columns, these have {input.shape[-1]}"
            )
        if score.loss is not None:
            trained = linear_loss(
                input,
                head_weight(self.weight),
                targets,
                score.loss,
                bias=self.bias,
                temperature=score.temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                has_entropy_slope=score.has_entropy_slope,
                sequence_lengths=score.sequence_lengths,
            )
            # a plain tuple: the hooks of FSDP look for tensors in nothing else
            return trained.loss, trained.logps, trained.entropy
        scored = linear_logps(
            input,
            head_weight(self.weight),
            targets,
            bias=self.bias,
            temperature=score.temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            return_entropy=score.return_entropy,
        )
        return scored if score.return_entropy else (scored, None)

    return forward


def _logit_transform(config: PreTrainedConfig) -> tuple[float | None, float]:
    """The soft cap, or None, and the factor a config puts on its logits."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # HyperCLOVA X multiplies by the field that Granite and MiniCPM divide by
    scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0
    scale /= getattr(config, "logits_mup_width_multiplier", None) or 1.0
    softcaps = (getattr(config, name, None) for name in SOFTCAP_FIELDS)
    return next((softcap for softcap in softcaps if softcap is not None), None), scale
