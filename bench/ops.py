"""The ops that are benched: their cases, their floors, their providers, their truth, and the tests that must pass.

Shapes: N tokens, D hidden width, V vocabulary; T packed tokens, H query heads, K key-value heads, P visible pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import attention_providers, head_providers, policy_loss_providers
from bench.hardware import Peak
from bench.provider import Provider, why_not
from bench.shapes import ATTENTION, AttentionHeads, parse_shape

# rows of a head, and tokens of an attention layer, that are compared with float64
CHECK_ROWS, CHECK_TOKENS = 128, 1024
MIB = 2**20

# Largest errors by dtype: of log-probs absolute, of the rest relative to their norm. Bounds for peers say that they do
# the same work: bf16 logits are 0.06 apart near 10, so a log-prob can be off by some tenths.
PEER_BOUNDS = {"fp32": (1e-3, 5e-3), "bf16": (0.5, 0.1), "autocast": (0.5, 0.1)}
# kernels/README.md, "Numerics", times some ten for inputs that are not those there
OUR_BOUNDS = {"fp32": (1e-4, 1e-4), "bf16": (2e-3, 1e-2), "autocast": (2e-3, 1e-2)}
# flash kernels round the weights to bf16 between their products
ATTENTION_BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (3e-2, 3e-2)}


@dataclass(frozen=True)
class Case:
    """One comparison: everything that runs in it gets the same inputs.

    Attributes:
        op: A key of `OPS`.
        shape: As the op reads it: "Qwen3-8B/8192", and "tokens/65536" for the policy loss.
        dtype: Of the operands: "fp32", "bf16", or "autocast" (bf16 products of fp32 tensors).
        data: What kind of inputs, one of the op's.
    """

    op: str
    shape: str
    dtype: str
    data: str

    def __str__(self) -> str:
        return f"{self.shape}-{self.dtype}-{self.data}"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a case needs at least.

    Attributes:
        flops: Floating-point operations of its matrix products, a multiply-add being two.
        convention: How they are counted.
        num_bytes: Every input read once, every result written once.
        result_bytes: Outputs and gradients, which no implementation can do without holding.
        products: The key of `Peak.flops_per_s` that bounds the products.
    """

    flops: float
    convention: str
    num_bytes: float
    result_bytes: float
    products: str

    def floor_seconds(self, peak: Peak) -> float:
        """The roofline: the products at the peak rate, or the bytes at the memory's, whichever takes longer."""
        return max(self.flops / peak.flops_per_s[self.products], self.num_bytes / peak.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op of the bench.

    Attributes:
        name: On the command line, and the bench's file is `bench_NAME.py` with underscores, without "-frozen".
        providers: Who does it, by label.
        make: Inputs of a case on a device.
        checker: From a case and a device, a function from a provider to its errors against float64, on few tokens.
        clear: Takes the gradients of the last step away, for steps that accumulate them; else None.
        work: The floor of a case.
        dtypes: That the inputs can have.
        data: Kinds of inputs.
        cpu_shapes: What runs on a CPU unless asked otherwise.
        cuda_shapes: Likewise on CUDA.
        tests: Must pass before a figure is quoted.
        our_bounds: As `PEER_BOUNDS`, for ours.
        is_frozen: Whether the head's weight has no gradient.
    """

    name: str
    providers: Mapping[str, Provider]
    make: Callable[[Case, torch.device], Any]
    checker: Callable[[Case, torch.device], Callable[[Provider], dict[str, float]]]
    work: Callable[[Case], Work]
    clear: Callable[[Any, Provider], None] | None = None
    dtypes: tuple[str, ...] = ("fp32", "bf16", "autocast")
    data: tuple[str, ...]
    cpu_shapes: tuple[tuple[str, str, str], ...]
    cuda_shapes: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]
    our_bounds: Mapping[str, tuple[float, float]] = field(default_factory=lambda: OUR_BOUNDS)
    is_frozen: bool = False

    def case(self, shape: str, dtype: str | None = None, data: str | None = None) -> Case:
        """A case by the names of its parts; without them the op's first.

        Raises:
            ValueError: If the op has no such shape, dtype or data.
        """
        dtype, data = dtype or self.dtypes[0], data or self.data[0]
        if dtype not in self.dtypes:
            raise ValueError(f"dtype must be one of {', '.join(self.dtypes)} for {self.name}, got {dtype!r}")
        if data not in self.data:
            raise ValueError(f"data must be one of {', '.join(self.data)} for {self.name}, got {data!r}")
        case = Case(self.name, shape, dtype, data)
        self.work(case)
        return case

    def cases(self, *, on_cuda: bool) -> list[Case]:
        """What runs unless asked otherwise."""
        return [Case(self.name, *parts) for parts in (self.cuda_shapes if on_cuda else self.cpu_shapes)]

    def why_not(self, label: str, *, on_cuda: bool, asked: Collection[str] | None = None) -> str | None:
        """Why a provider does not run, or None if it does; `asked` are the labels that were asked for, if any."""
        return why_not(self.providers[label], has_cuda=on_cuda, is_frozen=self.is_frozen, asked=asked)

    def check(self, case: Case, provider: Provider, found: dict[str, float]) -> None:
        """Compare errors with their bounds.

        Raises:
            AssertionError: If one exceeds its bound.
        """
        logps, relative = (self.our_bounds if provider.is_ours else PEER_BOUNDS)[case.dtype]
        for name, error in found.items():
            bound = logps if name.startswith("logps") else relative
            # a NaN is no error below a bound
            if not error <= bound:
                raise AssertionError(f"{provider.label} is wrong on {case}: {name} off by {error:.2g} > {bound:.2g}")


# the head: scoring, training, training with a frozen weight


def _bytes_of(dtype: str) -> int:
    return 2 if dtype == "bf16" else 4


def _products_of(dtype: str) -> str:
    return "fp32" if dtype == "fp32" else "bf16"


def scoring_work(case: Case) -> Work:
    """Logits are one product, 2NDV; they need not be stored. Log-probs and entropies come out in fp32."""
    head, N = parse_shape(case.shape)
    D, V, size = head.hidden, head.vocab, _bytes_of(case.dtype)
    return Work(
        flops=2 * N * D * V,
        convention="2NDV: the logits",
        num_bytes=size * (N * D + V * D) + 8 * N + 8 * N,
        result_bytes=8 * N,
        products=_products_of(case.dtype),
    )


def training_work(case: Case, *, is_frozen: bool = False) -> Work:
    """The logits and the gradient of each operand are a product of 2NDV each; a frozen weight has no gradient.

    To recompute the logits in the backward pass, as most implementations do, is a choice and not in the floor.
    """
    head, N = parse_shape(case.shape)
    D, V, size = head.hidden, head.vocab, _bytes_of(case.dtype)
    gradients = size * (N * D + (0 if is_frozen else V * D))
    return Work(
        flops=(4 if is_frozen else 6) * N * D * V,
        convention="4NDV: logits, hidden gradient" if is_frozen else "6NDV: logits, hidden and weight gradient",
        num_bytes=size * (N * D + V * D) + 8 * N + gradients,
        result_bytes=gradients,
        products=_products_of(case.dtype),
    )


def _make_head(case: Case, device: torch.device, *, is_frozen: bool = False) -> head_providers.Problem:
    head, N = parse_shape(case.shape)
    if head.softcap is not None:
        raise ValueError(f"shape must be of a head without a soft cap, got {case.shape!r}")
    return head_providers.make_problem(
        N, head.hidden, head.vocab, dtype=case.dtype, data=case.data, device=device.type, is_frozen=is_frozen
    )


def _head_checker(
    case: Case, device: torch.device, *, is_frozen: bool = False
) -> Callable[[Provider], dict[str, float]]:
    head, N = parse_shape(case.shape)
    small = Case(case.op, f"{head.name}/{min(CHECK_ROWS, N)}", case.dtype, case.data)
    problem = _make_head(small, device, is_frozen=is_frozen)
    truth = head_providers.Exact.of(problem)

    def errors(provider: Provider) -> dict[str, float]:
        head_providers.clear(problem, provider)
        return head_providers.errors(problem, provider.step(problem), truth)

    return errors


# the policy loss


def _tokens(shape: str) -> int:
    word, _, number = shape.partition("/")
    if word != "tokens" or not number.isdecimal() or int(number) < 1:
        raise ValueError(f"shape must be tokens/N, got {shape!r}")
    return int(number)


def policy_loss_work(case: Case) -> Work:
    """Bound by bytes: five [N] fp32 tensors in, the gradient out; some twenty operations a token do not show."""
    N = _tokens(case.shape)
    return Work(flops=0, convention="0: no products", num_bytes=24 * N, result_bytes=4 * N, products="fp32")


def _make_tokens(case: Case, device: torch.device) -> policy_loss_providers.Problem:
    return policy_loss_providers.make_problem(_tokens(case.shape), device=device)


def _tokens_checker(case: Case, device: torch.device) -> Callable[[Provider], dict[str, float]]:
    problem = _make_tokens(case, device)
    return lambda provider: policy_loss_providers.errors(problem, provider.step(problem))


# attention


def _attention(shape: str) -> tuple[AttentionHeads, int]:
    head, T = parse_shape(shape)
    return ATTENTION[head.name], T


def attention_work(case: Case) -> Work:
    """Six products over the P visible pairs, 2PHD each: scores, output, and the gradients of weights, V, Q and K.

    Recomputing the scores in the backward pass would make it 14PHD; it is not in the floor. Forward reads Q, K, V and
    writes O; backward reads those and dO, and writes dQ, dK, dV: 6 of [T, H, D] and 6 of [T, K, D].
    """
    heads, T = _attention(case.shape)
    pairs = attention_providers.visible_pairs(attention_providers.make_layout(T, case.data))
    size = _bytes_of(case.dtype)
    queries, keys = T * heads.num_heads * heads.width, T * heads.num_kv_heads * heads.width
    return Work(
        flops=12 * pairs * heads.num_heads * heads.width,
        convention="12PHD: six products over the visible pairs",
        num_bytes=6 * size * (queries + keys),
        result_bytes=2 * size * (queries + keys),
        products=_products_of(case.dtype),
    )


def _make_attention(case: Case, device: torch.device) -> attention_providers.Problem:
    heads, T = _attention(case.shape)
    return attention_providers.make_problem(heads, T, dtype=case.dtype, data=case.data, device=device)


def _attention_checker(case: Case, device: torch.device) -> Callable[[Provider], dict[str, float]]:
    heads, T = _attention(case.shape)
    problem = _make_attention(Case(case.op, f"{heads.name}/{min(CHECK_TOKENS, T)}", case.dtype, case.data), device)
    truth = attention_providers.exact(problem)
    return lambda provider: attention_providers.errors(problem, provider.step(problem), truth)


def operand_bytes(problem: Any) -> int:
    """Of all tensors that are fields of a problem."""
    return sum(value.nbytes for value in vars(problem).values() if isinstance(value, Tensor))


# Qwen3-8B first: it alone is measured where time is short
HEAD_CUDA = tuple(
    (shape, "bf16", data)
    for shape, data in (
        ("Qwen3-8B/8192", "peaked"),
        ("Qwen3-8B/8192", "random"),
        ("Qwen3-1.7B/16384", "peaked"),
        ("Qwen2.5-1.5B/32768", "peaked"),
        ("Qwen2.5-0.5B/65536", "peaked"),
        ("Llama-3.1-8B/8192", "peaked"),
        ("Gemma-3-1B/8192", "peaked"),
        ("Qwen3-8B/2048", "peaked"),
    )
)
HEAD_TESTS = ("tests/kernels/test_fused_head.py", "tests/kernels/test_sizes.py")

OPS = {
    op.name: op
    for op in (
        Op(
            name="scoring",
            providers=head_providers.SCORING,
            make=_make_head,
            checker=_head_checker,
            work=scoring_work,
            data=head_providers.DATA,
            cpu_shapes=(("SmolLM2-135M/512", "bf16", "peaked"), ("SmolLM2-135M/512", "fp32", "peaked")),
            cuda_shapes=HEAD_CUDA,
            tests=("tests/kernels/test_linear_logps.py", *HEAD_TESTS),
        ),
        Op(
            name="training",
            providers=head_providers.TRAINING,
            make=_make_head,
            checker=_head_checker,
            work=training_work,
            clear=head_providers.clear,
            data=head_providers.DATA,
            cpu_shapes=(
                ("SmolLM2-135M/512", "bf16", "peaked"),
                ("SmolLM2-135M/512", "fp32", "peaked"),
            ),
            cuda_shapes=HEAD_CUDA,
            tests=("tests/kernels/test_linear_policy_loss.py", *HEAD_TESTS),
        ),
        Op(
            name="training-frozen",
            providers=head_providers.TRAINING,
            make=partial(_make_head, is_frozen=True),
            checker=partial(_head_checker, is_frozen=True),
            work=partial(training_work, is_frozen=True),
            clear=head_providers.clear,
            data=head_providers.DATA,
            cpu_shapes=(("SmolLM2-135M/256", "bf16", "peaked"),),
            cuda_shapes=HEAD_CUDA[:1],
            tests=("tests/kernels/test_linear_policy_loss.py", *HEAD_TESTS),
            is_frozen=True,
        ),
        Op(
            name="policy-loss",
            providers=policy_loss_providers.PROVIDERS,
            make=_make_tokens,
            checker=_tokens_checker,
            work=policy_loss_work,
            dtypes=("fp32",),
            data=("spread",),
            cpu_shapes=(("tokens/16384", "fp32", "spread"), ("tokens/262144", "fp32", "spread")),
            cuda_shapes=tuple((f"tokens/{N}", "fp32", "spread") for N in (16384, 65536, 1048576)),
            tests=("tests/kernels/test_policy_loss.py", "tests/kernels/test_policy_loss_kernel.py"),
        ),
        Op(
            name="attention",
            providers=attention_providers.PROVIDERS,
            make=_make_attention,
            checker=_attention_checker,
            work=attention_work,
            dtypes=("fp32", "bf16"),
            data=attention_providers.DATA,
            cpu_shapes=(("SmolLM2-135M/2048", "fp32", "rows"), ("SmolLM2-135M/2048", "fp32", "shared")),
            cuda_shapes=tuple(
                (shape, "bf16", data)
                for shape in ("Qwen3-8B/16384", "Qwen3-1.7B/32768", "Qwen2.5-0.5B/16384")
                for data in attention_providers.DATA
            ),
            tests=("tests/test_attention.py", "tests/test_shared_keys.py"),
            our_bounds=ATTENTION_BOUNDS,
        ),
    )
}
