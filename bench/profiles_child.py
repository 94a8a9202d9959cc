"""One trainer's training phase on one length profile, in a process of its own; or the tokens that it runs, alone.

A rollout function hands both trainers the same prompts, completions and rewards, so that nothing is generated. The
policy has random weights: a model of `models.py`, or some of its layers with the same part of its vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.main_job_child import Probe, _peak_rss_mib
from bench.main_job_table import PHASES as JOB_PHASES
from bench.models import CONFIGS, SMOLLM2, make_model
from bench.profile_rows import (
    EOS,
    MICRO_BATCH,
    MICRO_BATCHES,
    PAD,
    PROFILES,
    Row,
    digest,
    draw_rows,
    longest,
    true_tokens,
)
from bench.profiles_table import Measured

# runs any number of tokens in no time: its attention returns the values, see `make_counted_model`
COUNTED = SMOLLM2 | {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
# `Probe`'s, with what follows the loss in a step told apart: "train" is the forward pass then
PHASES = (*JOB_PHASES, "backward", "optimizer")


def make_counted_model(*, attends: bool) -> Any:
    """A model whose tokens are only counted; without attention rows of any length cost next to nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

    def values(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        return value.transpose(1, 2), None

    AttentionInterface.register("values", values)
    AttentionMaskInterface.register("values", lambda *args, **kwargs: None)
    return LlamaForCausalLM._from_config(LlamaConfig(**COUNTED), attn_implementation="sdpa" if attends else "values")


def make_tokenizer(size: int) -> Any:
    """One word a token: the rows never pass through it, but a trainer wants one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=f"w{PAD}", eos_token=f"w{EOS}", unk_token="w2", padding_side="left"
    )


class Rollout:
    """A rollout function that hands out fixed rows; a prompt's text is its number."""

    def __init__(self, groups: list[list[Row]]) -> None:
        self._groups = groups

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        taken: Counter[int] = Counter()
        rows = []
        for prompt in prompts:
            rows.append(self._groups[int(prompt)][taken[int(prompt)]])
            taken[int(prompt)] += 1
        return {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": [row.completion for row in rows],
            # nothing was sampled
            "logprobs": None,
            "row_reward": [row.reward for row in rows],
        }


def row_reward(completions: list[str], row_reward: list[float], **kwargs: Any) -> list[float]:
    """The rows' own rewards."""
    return row_reward


@dataclass
class Step:
    """Tokens of each forward pass and seconds, by micro-batch, of one step; stops the run after some micro-batches.

    Attributes:
        last: After how many micro-batches of the measured step to stop.
        warmup: Steps before it.
    """

    last: int
    warmup: int = 0
    begun: int = 0
    probe: Probe = field(default_factory=lambda: Probe(PHASES))
    passes: list[list[int]] = field(default_factory=lambda: [[]])

    def watch(self, trainer: Any) -> None:
        """Count what the policy's input embedding gets, and time the phases."""
        from transformers import TrainerCallback

        step = self

        class Ends(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                # a trainer may run the model before the step, to see what it needs
                step.passes[:] = [[]]
                step.probe.steps.clear()
                step.begun += 1
                step.probe.begin()

            def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                step.probe.end_step()
                is_last = step.begun > step.warmup and len(step.passes) >= step.last
                control.should_training_stop = control.should_training_stop or is_last
                step.passes += [] if is_last else [[]]
                return control

            on_step_end = on_substep_end

            def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                step.probe.enter("optimizer")

            def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
                step.probe.leave()

        def count(module: Any, args: tuple[Any, ...]) -> None:
            self.passes[-1].append(args[0].numel())

        self.probe.watch(trainer)
        trainer.accelerator.backward = self.probe.timed(trainer.accelerator.backward, "backward")
        trainer._clip_grad_norm = self.probe.timed(trainer._clip_grad_norm, "optimizer")
        trainer.model.get_input_embeddings().register_forward_pre_hook(count)
        trainer.add_callback(Ends())

    def seconds(self, clock: str) -> list[float]:
        """Of the training phase, forward and backward, by "cpu" or "wall", by micro-batch."""
        forward, backward = (self.phases(clock)[name] for name in ("train", "backward"))
        return [sum(both) for both in zip(forward, backward, strict=True)]

    def phases(self, clock: str) -> dict[str, list[float]]:
        """Seconds of each phase by micro-batch."""
        return {name: [part[f"{clock}_s"][name] for part in self.probe.steps] for name in PHASES}


def make_trainer(
    label: str,
    model: Any,
    groups: list[list[Row]],
    *,
    folder: str,
    seed: int,
    micro_batch: int = MICRO_BATCH,
    **settings: Any,
) -> Any:
    """The trainer that `label` names, with all rows in each optimizer step; what is not set is each trainer's default.

    Args:
        label: "trl" or "grpo-fast".
        model: The policy.
        groups: The rows of each prompt.
        folder: Where it may write.
        seed: Of the trainer.
        micro_batch: Rows of a micro-batch.
        **settings: More fields of the configuration.
    """
    library = import_module("trl" if label == "trl" else "grpo_fast")

    import torch
    from datasets import Dataset

    config = library.GRPOConfig(
        output_dir=folder,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=sum(len(rows) for rows in groups) // micro_batch,
        num_generations=len(groups[0]),
        max_completion_length=max(len(row.completion) for rows in groups for row in rows),
        learning_rate=1e-6,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    return library.GRPOTrainer(
        model=model,
        reward_funcs=row_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(groups))]}),
        processing_class=make_tokenizer(model.config.vocab_size),
        rollout_func=Rollout(groups),
    )


def measure(
    label: str,
    profile: str,
    *,
    scale: float,
    layers: int | None,
    micro_batches: int,
    settings: dict[str, Any],
    seed: int,
    model: str = "SmolLM2-135M",
    warmup_steps: int = 0,
) -> Measured:
    """Run one optimizer step, or the first micro-batches of it.

    Args:
        label: "trl" or "grpo-fast".
        profile: Of `PROFILES`.
        scale: What the lengths are multiplied by.
        layers: Of the policy; None counts tokens only.
        micro_batches: After how many of the step's micro-batches to stop.
        settings: More fields of the configuration.
        seed: Of the rows.
        model: A key of `models.CONFIGS`.
        warmup_steps: Whole steps before the measured one.

    Returns:
        Tokens and seconds of each micro-batch.
    """
    import torch

    is_counted = layers is None
    policy = make_counted_model(attends=label != "trl") if is_counted else make_model(model, layers=layers)
    groups = draw_rows(PROFILES[profile], scale=scale, vocabulary=policy.config.vocab_size, seed=seed)
    step = Step(last=micro_batches, warmup=warmup_steps)
    fields = settings | {"bf16": not is_counted, "max_steps": warmup_steps + 1}
    with TemporaryDirectory() as folder:
        trainer = make_trainer(label, policy, groups, folder=folder, seed=seed, **fields)
        step.watch(trainer)
        loaded_rss_mib = _peak_rss_mib()
        trainer.train()
    on_cuda = torch.cuda.is_available()
    return Measured(
        label=label,
        profile=profile,
        scale=scale,
        layers=layers,
        vocabulary=policy.config.vocab_size,
        rows=digest(groups),
        true_tokens=true_tokens(groups),
        longest=longest(groups),
        passes=step.passes,
        cpu_s=step.seconds("cpu"),
        wall_s=step.seconds("wall"),
        peak_rss_mib=_peak_rss_mib(),
        loaded_rss_mib=loaded_rss_mib,
        peak_cuda_mib=torch.cuda.max_memory_allocated() / 2**20 if on_cuda else None,
        threads=torch.get_num_threads(),
        model="counted" if is_counted else model,
        phases=step.phases("wall" if on_cuda else "cpu"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=("trl", "grpo-fast"))
    parser.add_argument("profiles", nargs="+", choices=PROFILES)
    parser.add_argument("--layers", type=int, help="of the policy; tokens are only counted without it")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--model", choices=CONFIGS, default="SmolLM2-135M")
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--micro-batches", type=int, default=MICRO_BATCHES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="more fields of the configuration, as JSON")
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args())
    out, label, profiles = (options.pop(name) for name in ("out", "label", "profiles"))
    started = time.perf_counter()
    measured = [asdict(measure(label, profile, **options)) for profile in profiles]
    print(f"{label} {' '.join(profiles)}: {time.perf_counter() - started:.0f} s")
    out.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
