"""One trainer's training phase on one length profile, in a process of its own; or the tokens that it runs, alone.

A rollout function hands both trainers the same prompts, completions and rewards, so that nothing is generated. The
policy is a slice of SmolLM2-135M with random weights: some of its 30 layers and the same part of its vocabulary, so
that layers and head keep their shares of the work.
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

from main_job_child import Probe, _peak_rss_mib
from profile_rows import (
    EOS,
    GENERATIONS,
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
from profiles_table import Measured

LAYERS, VOCABULARY = 30, 49152
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
# runs any number of tokens in no time: its attention returns the values, see `make_counted_model`
COUNTED = SMOLLM2 | {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}


def make_model(layers: int) -> Any:
    """A slice of SmolLM2-135M: `layers` of its 30 layers and the same part of its vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2, num_hidden_layers=layers, vocab_size=VOCABULARY * layers // LAYERS))


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
    """Tokens of each forward pass and seconds, by micro-batch; stops the run after some micro-batches."""

    last: int
    probe: Probe = field(default_factory=Probe)
    passes: list[list[int]] = field(default_factory=lambda: [[]])

    def watch(self, trainer: Any) -> None:
        """Count what the policy's input embedding gets, and time the phases."""
        from transformers import TrainerCallback

        step = self

        class Ends(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                # a trainer may run the model before the step, to see what it needs
                step.passes[:] = [[]]
                step.probe.begin()

            def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
                step.probe.end_step()
                control.should_training_stop = len(step.passes) >= step.last
                step.passes += [] if control.should_training_stop else [[]]
                return control

            on_step_end = on_substep_end

        def count(module: Any, args: tuple[Any, ...]) -> None:
            self.passes[-1].append(args[0].numel())

        self.probe.watch(trainer)
        trainer.model.get_input_embeddings().register_forward_pre_hook(count)
        trainer.add_callback(Ends())

    def seconds(self, clock: str) -> list[float]:
        """Of the training phase by "cpu" or "wall", by micro-batch."""
        return [part[f"{clock}_s"]["train"] for part in self.probe.steps]


def make_trainer(label: str, model: Any, groups: list[list[Row]], *, folder: str, seed: int, **settings: Any) -> Any:
    """The trainer that `label` names; what is not set here is each trainer's default."""
    library = import_module("trl" if label == "trl" else "grpo_fast")

    import torch
    from datasets import Dataset

    config = library.GRPOConfig(
        output_dir=folder,
        max_steps=1,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=MICRO_BATCHES,
        num_generations=GENERATIONS,
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
) -> Measured:
    """Run the training phase of one optimizer step, or the first micro-batches of it.

    Args:
        label: "trl" or "grpo-fast".
        profile: Of `PROFILES`.
        scale: What the lengths are multiplied by.
        layers: Of the policy; None counts tokens only.
        micro_batches: After how many of the step's micro-batches to stop.
        settings: More fields of the configuration.
        seed: Of the rows.

    Returns:
        Tokens and seconds of each micro-batch.
    """
    import torch

    is_counted = layers is None
    model = make_counted_model(attends=label != "trl") if is_counted else make_model(layers)
    groups = draw_rows(PROFILES[profile], scale=scale, vocabulary=model.config.vocab_size, seed=seed)
    step = Step(last=micro_batches)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(label, model, groups, folder=folder, seed=seed, bf16=not is_counted, **settings)
        step.watch(trainer)
        loaded_rss_mib = _peak_rss_mib()
        trainer.train()
    return Measured(
        label=label,
        profile=profile,
        scale=scale,
        layers=layers,
        vocabulary=model.config.vocab_size,
        rows=digest(groups),
        true_tokens=true_tokens(groups),
        longest=longest(groups),
        passes=step.passes,
        cpu_s=step.seconds("cpu"),
        wall_s=step.seconds("wall"),
        peak_rss_mib=_peak_rss_mib(),
        loaded_rss_mib=loaded_rss_mib,
        peak_cuda_mib=torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        threads=torch.get_num_threads(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=("trl", "grpo-fast"))
    parser.add_argument("profiles", nargs="+", choices=PROFILES)
    parser.add_argument("--layers", type=int, help="of the policy; tokens are only counted without it")
    parser.add_argument("--scale", type=float, default=1.0)
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
