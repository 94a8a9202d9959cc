"""The optimizer step of a policy whose engine holds its weights in bf16: one pass against a step and copies after it.

All variants step in turn, so that load and clocks drift under all of them alike. Bytes of an element, fp32 with a bf16
shadow: 28 for AdamW, 30 with the shadow in the same pass, 34 with copies after it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from bench.provenance import provenance
from grpo_fast.optimizer import ShadowAdamW

# bytes of an element
BYTES = {"torch fused": 28, "torch fused + copies": 34, "ours": 30}
# layers, hidden width, width of keys and of the MLP, vocabulary; tied embeddings
MODELS = {"SmolLM2-135M": (30, 576, 192, 1536, 49152), "Qwen3-0.6B": (28, 1024, 1024, 3072, 151936)}


def shapes_of(model: str) -> list[tuple[int, ...]]:
    layers, width, keys, mlp, vocabulary = MODELS[model]
    layer = [(width, width)] * 2 + [(keys, width)] * 2 + [(mlp, width)] * 2 + [(width, mlp)] + [(width,)] * 2
    return [(vocabulary, width), *(shape for _ in range(layers) for shape in layer), (width,)]


def variants(shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, Callable[[], None]]:
    """The steps that are timed, over parameters of their own."""

    def parameters() -> list[nn.Parameter]:
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        return params

    def shadows_of(params: list[nn.Parameter]) -> list[Tensor]:
        return [torch.empty_like(param, dtype=torch.bfloat16, requires_grad=False) for param in params]

    params, ours = parameters(), parameters()
    shadows = shadows_of(params)
    theirs = torch.optim.AdamW(params, fused=True)
    shadowing = ShadowAdamW(ours, shadows=dict(zip(ours, shadows_of(ours), strict=True)))

    def copies_after() -> None:
        theirs.step()
        torch._foreach_copy_(shadows, [param.detach() for param in params])

    return {"torch fused": theirs.step, "torch fused + copies": copies_after, "ours": shadowing.step}


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """CPU seconds of the process on a CPU; else the device's."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, default="SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON of the raw numbers (bench/results/NAME.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = shapes_of(args.model)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    steps = variants(shapes, args.device)
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            taken[name].append(seconds(step, args.device))
    unit = "CPU ms" if args.device.type == "cpu" else "ms"
    print(f"{args.model}, {numel / 1e6:.1f} M parameters, {args.device}, {args.threads} thread(s)")
    print(f"| | least, {unit} | median, {unit} | GB/s at the least | to a step with copies after it |")
    print("|---|---|---|---|---|")
    peer = taken["torch fused + copies"]
    for name, values in taken.items():
        rate = BYTES[name] * numel / min(values) / 1e9
        ratios = f"{min(values) / min(peer):.2f} ({median(values) / median(peer):.2f})"
        print(f"| {name} | {1e3 * min(values):.1f} | {1e3 * median(values):.1f} | {rate:.0f} | {ratios} |")
    if args.out:
        settings = {"model": args.model, "numel": numel, "device": str(args.device), "threads": args.threads}
        args.out.write_text(json.dumps(provenance() | settings | {"seconds": taken}, indent=1) + "\n")


if __name__ == "__main__":
    main()
