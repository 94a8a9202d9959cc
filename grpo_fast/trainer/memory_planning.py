"""How many tokens a pack has and how many layers recompute: chosen from the model and the memory that is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from grpo_fast import activations
from grpo_fast.attention import AttentionPlan, causal_lm, packed_attention, running_packs
from grpo_fast.batch import Pack, PaddedRows
from grpo_fast.free_memory import free_bytes
from grpo_fast.generation.vllm_weights import is_sharded
from grpo_fast.memory_plan import RESERVED_SHARE, ActivationCost, MemoryPlan, PackBudget, plan_budget, plan_for
from grpo_fast.packing import default_max_tokens, pack_rows
from grpo_fast.policy import backbone
from grpo_fast.trainer.base import BaseTrainer

logger = logging.get_logger(__name__)

GIB = 2**30
# tokens of the two packs that are measured, and of their rows
PROBE_TOKENS = (64, 192)
PROBE_ROW = 16
# tokens that cost as much as a pass of any length does beside its tokens. An accelerator moves some 16 bytes a weight
# to read and round it and to add up its gradient; a token takes 6 operations a weight, of which an H100 does 150 in the
# time of a byte: 16 x 150 / 6. On a CPU as measured
PASS_OVERHEAD = {"cpu": 64, "accelerator": 400}
# tokens above which a pass gains nothing: a CPU's activations then leave its caches
FILL_TOKENS = {"cpu": 1024, "accelerator": 16384}
# tensors of a weight's size that an optimizer keeps of it: AdamW's two moments
STATE_COPIES = 2
# where a checkpoint's trainer_state.json has the budget
STATE_KEY = "grpo_fast.pack_budget"


@dataclass(frozen=True, kw_only=True)
class _Adaptive:
    """What a pack's choice of layers rests on: the costs, and the plan for a full pack."""

    cost: ActivationCost
    first: MemoryPlan


class MemoryTrainer(BaseTrainer):
    """The part of `GRPOTrainer` that fits packs and recomputation to the memory."""

    unpackable: str | None
    pads_rows: bool

    # once training has begun
    _pack_budget: PackBudget | None = None
    # None: layers stay as they are
    _adaptive: _Adaptive | None = None
    _is_shortage_said = False

    def _max_tokens_per_pack(self) -> int:
        """The most tokens of a pack of one group: what the user says, else what training began with."""
        return self.args.max_tokens_per_pack or (self._pack_budget or self._default_budget).max_tokens

    def _fill_tokens_per_pack(self) -> int:
        """The most tokens of a pack of several groups."""
        return self.args.max_tokens_per_pack or (self._pack_budget or self._default_budget).fill_tokens

    @property
    def _default_budget(self) -> PackBudget:
        """Where there is memory to spare, or nothing says how much there is."""
        cap = default_max_tokens(self.accelerator.device)
        return PackBudget(max_tokens=cap, fill_tokens=min(cap, FILL_TOKENS[self._device_kind]))

    @property
    def _device_kind(self) -> str:
        return "cpu" if self.accelerator.device.type == "cpu" else "accelerator"

    def _plan_memory(self) -> None:
        """Choose the budget for the run and let layers adapt to each pack; all processes call it as training begins.

        The budget decides in which order sums are taken, so a resumed run has that of its checkpoint, and all processes
        have the smallest. Which layers recompute changes no bit, so each process decides that for each pack.
        """
        args = self.args
        self._adaptive = None
        if args.gradient_checkpointing and args.checkpointed_layers is not None:
            activations.checkpoint_layers(self.model, args.checkpointed_layers)
        adapts = args.gradient_checkpointing and args.checkpointed_layers is None
        if args.max_tokens_per_pack is not None and not adapts:
            return
        obstacle = self._planning_obstacle()
        if obstacle is not None:
            self._settle_budget(self._default_budget)
            logger.info(f"{self._budget_facts()}; gradient checkpointing is transformers': {obstacle}")
            return
        cost = activations.measure(self.model, self._run_probe, PROBE_TOKENS)
        usable, choices = self._usable_bytes(), self._choices(cost)
        self._settle_budget(self._best_budget(cost, usable, choices))
        first = plan_for(cost, self._fill_tokens_per_pack(), usable, choices)
        if adapts:
            self._adaptive = _Adaptive(cost=cost, first=first)
            activations.checkpoint_layers(self.model, first.checkpointed_layers)
        facts = (
            f"{self._budget_facts()}; full ones need {first.peak_bytes / GIB:.2f} GiB of the {usable / GIB:.2f} GiB "
            f"that are free for them, with {first.checkpointed_layers} of {len(cost.layers)} layers recomputed"
        )
        if first.fits:
            logger.info(facts)
        else:
            logger.warning(f"memory is short: {facts}")

    def _budget_facts(self) -> str:
        fill, most = self._fill_tokens_per_pack(), self._max_tokens_per_pack()
        return f"packs of up to {fill} tokens" + (f", {most} for one group" if most > fill else "")

    @property
    def _shares_weights(self) -> bool:
        """Whether a forward pass needs all processes, since they share the model's weights out."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(self.model)

    def _planning_obstacle(self) -> str | None:
        """Why this run's memory cannot be planned, or None."""
        name = type(causal_lm(self.model)).__name__
        if self._shares_weights:
            return "the policy is sharded over processes"
        if self.pads_rows:
            return "rows run padded"
        if self.unpackable is not None:
            return f"{name} cannot be packed"
        if "every_n_layers" in (self.args.gradient_checkpointing_kwargs or {}):
            return "gradient_checkpointing_kwargs['every_n_layers'] says which"
        if not activations.decoder_layers(self.model):
            return f"{name} has no layers that transformers can recompute one by one"
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            return f"{name} is spread over several devices"
        if free_bytes(self.accelerator.device) is None:
            return f"nothing says how much memory of {self.accelerator.device.type} is free"
        return None

    def _settle_budget(self, wanted: PackBudget) -> None:
        """The smallest that a process wants, where the user says none; kept with the run's checkpoints."""
        if self.args.max_tokens_per_pack is None:
            own = torch.tensor([[wanted.max_tokens, wanted.fill_tokens]], device=self.accelerator.device)
            most, fill = self.accelerator.gather(own).amin(0).tolist()
            self._pack_budget = PackBudget(max_tokens=most, fill_tokens=fill)
            self.state.stateful_callbacks[STATE_KEY] = {"args": {}, "attributes": asdict(self._pack_budget)}

    def _best_budget(self, cost: ActivationCost, usable: float, choices: Sequence[int]) -> PackBudget:
        """The checkpoint's if there is one and it fits, else what costs least time."""
        caps = self._default_budget
        best = plan_budget(
            cost,
            usable,
            cap=caps.max_tokens,
            fill_cap=caps.fill_tokens,
            overhead_tokens=PASS_OVERHEAD[self._device_kind],
            choices=choices,
        )
        saved = self.state.stateful_callbacks.get(STATE_KEY)
        if saved is None:
            return best
        budget = PackBudget(**saved["attributes"])
        if budget.max_tokens > best.max_tokens and not plan_for(cost, budget.max_tokens, usable, choices).fits:
            logger.warning(
                f"the checkpoint was written with packs of up to {budget.max_tokens} tokens, of which "
                f"{best.max_tokens} fit the memory there is: the resumed run's sums are taken in another order"
            )
            return best
        return budget

    def _choices(self, cost: ActivationCost) -> Sequence[int]:
        """Numbers of layers that may recompute."""
        if not self.args.gradient_checkpointing:
            return [0]
        if self.args.checkpointed_layers is not None:
            return [self.args.checkpointed_layers]
        return range(len(cost.layers) + 1)

    def _plan_checkpointing(self, batches: Iterable[Pack | PaddedRows], *, together: bool = False) -> None:
        """Let as many layers recompute as the largest of these batches needs, before the first of them runs.

        Args:
            batches: The next to run.
            together: Whether one graph holds all of them.
        """
        if self._adaptive is None or not torch.is_grad_enabled():
            return
        cost, first = self._adaptive.cost, self._adaptive.first
        batches, num_layers = list(batches), len(cost.layers)
        if any(isinstance(batch, PaddedRows) for batch in batches):
            # their attention was not measured
            activations.checkpoint_layers(self.model, num_layers)
            return
        widths = [batch.width for batch in batches]
        usable = self._usable_bytes()
        step = plan_for(cost, sum(widths) if together else max(widths, default=0), usable)
        if self.args.torch_compile and step.checkpointed_layers != first.checkpointed_layers:
            # each further choice would be compiled anew
            is_less = step.checkpointed_layers < first.checkpointed_layers
            step = plan_for(cost, step.max_tokens, usable, [first.checkpointed_layers if is_less else num_layers])
        if not step.fits and not self._is_shortage_said:
            self._is_shortage_said = True
            logger.warning(
                f"a pack of {step.max_tokens} tokens may not fit the memory: it needs {step.peak_bytes / GIB:.2f} GiB "
                f"of the {usable / GIB:.2f} GiB that are free for it with {step.checkpointed_layers} of {num_layers} "
                "layers recomputed; lower max_completion_length, or free memory"
            )
        activations.checkpoint_layers(self.model, step.checkpointed_layers)

    def _usable_bytes(self) -> float:
        """What a pack may take now: what is free, less what the step will allocate and keep, less a reserve."""
        device = self.accelerator.device
        free = free_bytes(device) or 0
        if device.type == "cpu":
            # the others may run on this machine, and see the same memory
            free //= self.accelerator.num_processes
        return (1 - RESERVED_SHARE) * max(0, free - self._coming_bytes())

    def _coming_bytes(self) -> int:
        """Gradients and optimizer state that do not exist yet."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        copies = 0
        if self.optimizer is not None and not self.optimizer.state:
            groups = self.optimizer.param_groups
            is_sgd = isinstance(getattr(self.optimizer, "optimizer", self.optimizer), torch.optim.SGD)
            copies = int(any(group["momentum"] for group in groups)) if is_sgd else STATE_COPIES
        return sum(_bytes(parameter) * (copies + (parameter.grad is None)) for parameter in trained)

    def _run_probe(self, tokens: int) -> Tensor:
        """The decoder's hidden states of a pack of so many random tokens."""
        lm: Any = causal_lm(self.model)
        vocabulary = lm.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        # the last token of a row is not run
        rows = torch.randint(vocabulary, (tokens // PROBE_ROW, PROBE_ROW + 1), generator=generator).tolist()
        (pack,) = pack_rows([row[:1] for row in rows], [row[1:] for row in rows], max_tokens=None, share_prompts=False)
        pack = pack.to(self.accelerator.device)
        with packed_attention(self.model), self.accelerator.autocast(), running_packs():
            outputs: Any = backbone(lm)(
                input_ids=pack.input_ids,
                position_ids=pack.position_ids,
                use_cache=False,
                layout=AttentionPlan(pack.layout, pack.input_ids.device),
            )
        hidden: Tensor = outputs[0]
        return hidden


class MemoryPlanning(TrainerCallback):
    """Calls `_plan_memory` once the optimizer and what a checkpoint holds of it are there, in all processes."""

    def __init__(self, trainer: MemoryTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._plan_memory()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
