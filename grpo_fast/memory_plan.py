"""How large packs may be, and how many layers recompute, so that a training step fits the memory: numbers in and out.

Letters: L decoder layers, in the order they run.

A layer either *holds* what its backward pass needs, or *keeps* its input and runs again in the backward pass. The first
layers are those that recompute. The backward pass comes to them last, when the layers after them have freed what they
held, so a recomputed layer's activations find room there; were the last layers to recompute, their activations would
come on top of everything that is held. For the same reason the last layer recomputes only where the LM head's
workspace is what does not fit: its own activations would be back as soon as the head is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# of a forward and a backward pass without recomputation, the part that is forward
FORWARD_SHARE = 1 / 3
# of what is free: fragments of the allocator's, what the estimates leave out, what others take meanwhile
RESERVED_SHARE = 0.15
MIN_BUDGET = 128
# of what a layer holds, the most that gradients add in its backward pass, where what was held goes as they come
GRADIENT_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes that grow with the tokens of a pack."""

    fixed: float = 0.0
    per_token: float = 0.0

    @staticmethod
    def through(tokens: tuple[int, int], measured: tuple[int, int]) -> Size:
        """What was measured at two numbers of tokens, the smaller first."""
        slope = max(0.0, (measured[1] - measured[0]) / (tokens[1] - tokens[0]))
        return Size(fixed=max(0.0, measured[0] - slope * tokens[0]), per_token=slope)

    def at(self, tokens: int) -> float:
        """Bytes for a pack of so many tokens."""
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer leaves in memory between its forward and its backward pass.

    Attributes:
        held: If it does not recompute, its input included; the fixed part is weights that autocast has rounded.
        kept: If it does: its input.
        weight: Bytes of its largest trained weight, whose gradient exists for a moment beside the accumulated one.
    """

    held: Size
    kept: Size
    weight: int = 0


@dataclass(frozen=True, kw_only=True)
class ActivationCost:
    """What a pack's forward and backward pass needs beside weights, gradients and optimizer state.

    Attributes:
        layers: L.
        rest: What other modules hold.
        head: What the LM head needs while it runs.
    """

    layers: tuple[LayerCost, ...]
    rest: Size = Size()
    head: Size = Size()


@dataclass(frozen=True, kw_only=True)
class PackBudget:
    """How large packs are: the most tokens of one group or row, and of a pack of several groups."""

    max_tokens: int
    fill_tokens: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What was chosen.

    Attributes:
        max_tokens: Most tokens of a pack.
        checkpointed_layers: How many of the first layers recompute in such a pack.
        peak_bytes: What such a pack needs.
        fits: Whether that is as much as there is, or less.
    """

    max_tokens: int
    checkpointed_layers: int
    peak_bytes: int
    fits: bool


def peak_bytes(cost: ActivationCost, tokens: int, checkpointed: int) -> int:
    """The most bytes that a pack's forward and backward pass holds at once, gradients of weights left out.

    That is either under the LM head, after all layers, or in the backward pass of one of them: what the layers below
    and it left in memory, its activations again if it recomputes, and gradients of these. Autocast keeps the weights it
    has rounded until the forward pass is over, those of recomputing layers, too.

    Args:
        cost: Of the model.
        tokens: Of the pack.
        checkpointed: How many of the first layers recompute.
    """
    layers = cost.layers
    held = [layer.held.at(tokens) for layer in layers]
    left = [layer.kept.at(tokens) if i < checkpointed else held[i] for i, layer in enumerate(layers)]
    rest = cost.rest.at(tokens)
    below = list(accumulate(left, initial=rest))
    rounded = sum(layer.held.fixed for layer in layers[:checkpointed])
    peak = below[-1] + rounded + cost.head.at(tokens)
    for i, layer in enumerate(layers):
        again = held[i] if i < checkpointed else 0
        gradients = GRADIENT_SHARE * layer.held.per_token * tokens + layer.weight
        peak = max(peak, below[i + 1] + again + gradients)
    return round(peak)


def plan_for(
    cost: ActivationCost, tokens: int, usable_bytes: float, choices: Sequence[int] | None = None
) -> MemoryPlan:
    """How many layers recompute: as few as let a pack fit, or what needs least where nothing fits.

    Args:
        cost: Of the model.
        tokens: Of the largest pack.
        usable_bytes: What the pack may take.
        choices: Numbers of layers to choose from, ascending; None for all from 0 to L.
    """
    plans = []
    for k in range(len(cost.layers) + 1) if choices is None else choices:
        needed = peak_bytes(cost, tokens, k)
        made = MemoryPlan(max_tokens=tokens, checkpointed_layers=k, peak_bytes=needed, fits=needed <= usable_bytes)
        if made.fits:
            return made
        plans.append(made)
    return min(plans, key=lambda plan: plan.peak_bytes)


def plan(
    cost: ActivationCost,
    usable_bytes: float,
    *,
    cap: int,
    overhead_tokens: float,
    choices: Sequence[int] | None = None,
) -> MemoryPlan:
    """The budget of a pack, a power of two or `cap`, and the layers that recompute, which together cost least time.

    Larger packs spread what a pass costs whatever its length, but may make layers recompute that would not have to.
    With T tokens and k of L layers a token costs `1 + overhead_tokens / T + k / L / 3` of what it costs in the longest
    of packs.

    Args:
        cost: Of the model.
        usable_bytes: What a pack may take.
        cap: Largest budget.
        overhead_tokens: The tokens that cost as much as a pass of any length does beside its tokens.
        choices: As in `plan_for`.

    Returns:
        The plan. Where not even the smallest budget fits, that one, with the layers that need least.
    """
    plans = [plan_for(cost, tokens, usable_bytes, choices) for tokens in _budgets(cap)]

    def time(plan: MemoryPlan) -> float:
        share = plan.checkpointed_layers / max(1, len(cost.layers))
        return overhead_tokens / plan.max_tokens + FORWARD_SHARE * share

    return min((plan for plan in plans if plan.fits), key=time, default=plans[0])


def plan_budget(
    cost: ActivationCost,
    usable_bytes: float,
    *,
    cap: int,
    fill_cap: int,
    overhead_tokens: float,
    choices: Sequence[int] | None = None,
) -> PackBudget:
    """Packs are filled up to what costs least time, and hold a group as large as fits with whatever recomputation.

    A group that is split runs its prompt again in each part, which costs more than recomputation unless the prompt is
    short; and layers recompute in the packs that need it only.

    Args:
        cost: Of the model.
        usable_bytes: What a pack may take.
        cap: Largest pack of one group.
        fill_cap: Largest pack of several groups.
        overhead_tokens: As in `plan`.
        choices: As in `plan`.
    """
    fill = plan(cost, usable_bytes, cap=min(cap, fill_cap), overhead_tokens=overhead_tokens, choices=choices)
    largest = max((n for n in _budgets(cap) if plan_for(cost, n, usable_bytes, choices).fits), default=0)
    return PackBudget(max_tokens=max(largest, fill.max_tokens), fill_tokens=fill.max_tokens)


def _budgets(cap: int) -> list[int]:
    """Powers of two below `cap`, and it: a little more or less memory seldom makes another budget."""
    return [tokens for i in range(64) if MIN_BUDGET <= (tokens := 2**i) < cap] + [cap]
