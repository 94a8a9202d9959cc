"""AdamW for a policy whose engine holds its weights in another dtype: one step writes both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from grpo_kernels import adamw_step
from grpo_kernels.adamw import check_shadow


class ShadowAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose step also sets each parameter's shadow to the parameter, rounded to its dtype.

    State and groups are those of `torch.optim.AdamW`: a checkpoint of one loads into the other. On a CPU parameters
    and moments are bitwise those of its fused implementation, on CUDA they differ from it by rounding. A parameter
    without a gradient is left as it is, and so is its shadow. Post hooks of a step find the shadows written.

    Attributes:
        shadows: The tensors that are written, by parameter. A copy of the optimizer has none.
    """

    shadows: Mapping[nn.Parameter, Tensor] = MappingProxyType({})

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        shadows: Mapping[nn.Parameter, Tensor],
        maximize: bool = False,
        fused: bool | None = True,
    ) -> None:
        """As `torch.optim.AdamW`.

        Args:
            params: As in torch.
            lr: As in torch.
            betas: As in torch.
            eps: As in torch.
            weight_decay: As in torch; a parameter loses `lr * weight_decay` of itself a step.
            shadows: Tensors like their parameter in shape and device, of any floating dtype. Those of parameters that
                the optimizer does not have are not written.
            maximize: As in torch.
            fused: What checkpoints say. True keeps `step` beside the parameter, in which case the step divides by a
                `GradScaler`'s scale itself; None and False keep it on the CPU, and the scaler divides before.

        Raises:
            ValueError: A number is out of range, or a shadow does not fit its parameter.
        """
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, fused=fused)
        self.shadows = dict(shadows)
        for param, shadow in self.shadows.items():
            check_shadow(param, shadow, "shadows of a parameter")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update what has a gradient, with its shadow; returns what `closure` does, which is called first.

        Raises:
            ValueError: A parameter has gaps, or its gradient another layout.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[nn.Parameter] = []
            columns: list[list[Tensor]] = [[], [], [], []]
            grads, exp_avgs, exp_avg_sqs, steps = columns
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            # tensors of one call share dtype and device
            for kind in dict.fromkeys((p.device, p.dtype) for p in params):
                rows = [i for i, p in enumerate(params) if (p.device, p.dtype) == kind]
                adamw_step(
                    [params[i] for i in rows],
                    *([column[i] for i in rows] for column in columns),
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    maximize=group["maximize"],
                    shadows=[self.shadows.get(params[i]) for i in rows],
                    # attributes that exist while a `torch.amp.GradScaler` steps
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but `fused` stays what it is here: a `GradScaler` goes by it.

        Raises:
            ValueError: The state is of AMSGrad, or of a differentiable step.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "differentiable"):
                if group.get(option):
                    raise ValueError(
                        f"the optimizer's state was saved with {option}=True, which a policy whose engine has "
                        "weights of another dtype cannot be trained with: pass an optimizer by `optimizers`"
                    )
        groups = [group | {"fused": self.defaults["fused"]} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
