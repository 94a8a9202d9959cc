"""What `overlap_rewards` saves: a reward function that takes as long as decoding, after it and beside it.

Rollouts (generation, scores, rewards) are timed without a reward, then with it, with and without overlap in turns. The
function takes the same time for every row: it sleeps, as one that waits for a sandbox or a judge does, or computes in
Python. With `--step-ms` every step of the engine waits that long besides, as it would for a device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.provenance import provenance
from grpo_fast import GRPOConfig, GRPOTrainer

VOCABULARY, NUM_ENDS = 512, 8
NUM_GENERATIONS, NUM_PROMPTS, MAX_TOKENS = 8, 16, 128


def spin(seconds: float) -> None:
    """Compute in Python for some seconds of this thread's own time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(100))


def make_trainer(folder: str, max_num_seqs: int, seconds_per_row: list[float], wait: Callable[[float], None]) -> Any:
    """A random model whose completions end anywhere: a token in 64 is an end."""
    vocabulary = {chr(0x4E00 + i): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=list(range(NUM_ENDS)),
        initializer_range=0.02,
    )

    def slow(completions: list[str], **kwargs: Any) -> list[float]:
        wait(seconds_per_row[0] * len(completions))
        return [float(len(text)) for text in completions]

    return GRPOTrainer(
        model=LlamaForCausalLM(config),
        reward_funcs=slow,
        args=GRPOConfig(
            folder,
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            vllm_engine_kwargs={"max_num_seqs": max_num_seqs},
            per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_TOKENS,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": chr(0x4F00 - i)} for i in range(NUM_PROMPTS)]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=chr(0x4E00), pad_token=chr(0x4E01), unk_token=chr(0x4E02)
        ),
    )


def slow_down(engine: Any, seconds: float) -> None:
    step = engine.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slow_step


def rollout_s(trainer: Any, rows: list[dict[str, Any]], *, overlap: bool) -> float:
    trainer.args.overlap_rewards = overlap
    torch.manual_seed(1)
    start = time.perf_counter()
    trainer._timed_rollout(rows)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reward", choices=("sleep", "spin"), default="sleep")
    parser.add_argument("--step-ms", type=float, default=0.0)
    args = parser.parse_args()
    total = NUM_PROMPTS * NUM_GENERATIONS
    record = provenance()
    print(f"Commit {record['commit']}, {record['cpu']}, load {record['load_average']}.")
    print("| completions at a time | no reward, s | after, s | beside, s | saved of the reward's time |")
    print("|---|---|---|---|---|")
    for max_num_seqs in (total, total // 2, total // 4):
        seconds_per_row = [0.0]
        with TemporaryDirectory() as folder:
            trainer = make_trainer(folder, max_num_seqs, seconds_per_row, spin if args.reward == "spin" else time.sleep)
            slow_down(trainer.engine.llm.llm_engine, args.step_ms / 1000)
            rows = [row for row in trainer.train_dataset for _ in range(NUM_GENERATIONS)]
            times = [rollout_s(trainer, rows, overlap=False) for _ in range(args.repeats + 1)][1:]
            plain = min(times)
            seconds_per_row[0] = plain / total
            after, beside = [], []
            for _ in range(args.repeats):
                after.append(rollout_s(trainer, rows, overlap=False))
                beside.append(rollout_s(trainer, rows, overlap=True))
            trainer.engine.close()
        # the least: other load only adds
        late, early = min(after), min(beside)
        print(f"| {max_num_seqs} of {total} | {plain:.2f} | {late:.2f} | {early:.2f} | {(late - early) / plain:.0%} |")


if __name__ == "__main__":
    main()
