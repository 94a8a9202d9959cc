"""A tiny Llama that can add when it thinks but mostly does not: the task, its rewards and the cold start that makes it.

The task is `a + b` and `a - b` for a, b in 0..99. A completion is `<think>TRACE</think><answer>N</answer>`, where TRACE
is either empty or the column method written out, the ones first, each tens column with its carry or borrow:

    43+17=   <think>3+7=10,4+1+1=6</think><answer>60</answer>
    43-17=   <think>13-7=6,4-1-1=2</think><answer>26</answer>
    17-43=   <think>-,13-7=6,4-1-1=2</think><answer>-26</answer>     (43 - 17 with its sign turned)

The cold start teaches the traces first and then a mix in which most completions do not think, so that GRPO has
something to find: thinking pays. `python -m grpo_fast.recipes.tiny OUT` makes the checkpoint that ships as
`tiny_model/`.

Letters: B rows of a supervised batch, L tokens of a row.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_fast.rewards.texts import completion_text

CHECKPOINT = Path(__file__).parent / "tiny_model"
NUM_HELDOUT = 256
NUM_TRAIN = 4096

# the tags are ordinary tokens, so that decoding with `skip_special_tokens` keeps them
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = "0123456789+-=,"
ANSWER = re.compile(r"<answer>(-?\d+)</answer>")
FORMAT = re.compile(r"<think>[^<>]*</think><answer>-?\d+</answer>")

TRACE_STEPS = 250
MIX_STEPS = 200
BATCH_ROWS = 128
THINK_SHARE = 0.4
PEAK_LEARNING_RATE = 3e-3


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`a + b` or `a - b`."""

    a: int
    b: int
    sign: str

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.sign}{self.b}="

    @property
    def answer(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """All 20,000 problems in one fixed random order: those to train on, and `NUM_HELDOUT` that nothing trains on."""
    problems = [Problem(a=a, b=b, sign=sign) for a in range(100) for b in range(100) for sign in "+-"]
    random.Random(0).shuffle(problems)
    return problems[NUM_HELDOUT:], problems[:NUM_HELDOUT]


def load_tiny_task() -> tuple[Dataset, Dataset]:
    """The GRPO task as (train, held-out) data sets with columns `prompt` (text) and `answer` (int)."""
    train, heldout = split_problems()
    return _to_dataset(train[:NUM_TRAIN]), _to_dataset(heldout)


def write_trace(problem: Problem) -> str:
    """The column method for `problem`: ones, then tens with carry or borrow; `-,` in front if it is negative."""
    if problem.sign == "+":
        ones = problem.a % 10 + problem.b % 10
        carry = ones // 10
        tens = problem.a // 10 + problem.b // 10 + carry
        return f"{problem.a % 10}+{problem.b % 10}={ones},{problem.a // 10}+{problem.b // 10}+{carry}={tens}"
    large, small = max(problem.a, problem.b), min(problem.a, problem.b)
    borrow = int(large % 10 < small % 10)
    top = large % 10 + 10 * borrow
    tens = large // 10 - small // 10 - borrow
    columns = f"{top}-{small % 10}={top - small % 10},{large // 10}-{small // 10}-{borrow}={tens}"
    return f"-,{columns}" if problem.a < problem.b else columns


def write_completion(problem: Problem, *, think: bool) -> str:
    """The supervised completion for `problem`, with the trace or with an empty one."""
    return f"<think>{write_trace(problem) if think else ''}</think><answer>{problem.answer}</answer>"


def accuracy_reward(completions: Sequence[Any], answer: Sequence[int], **columns: object) -> list[float]:
    """1.0 where the first `<answer>` holds the right integer, else 0.0."""
    return [
        float((match := ANSWER.search(completion_text(completion))) is not None and int(match[1]) == truth)
        for completion, truth in zip(completions, answer, strict=True)
    ]


def format_reward(completions: Sequence[Any], **columns: object) -> list[float]:
    """1.0 where the completion is one `<think>` block, empty or not, and one `<answer>` with an integer, else 0.0."""
    return [float(FORMAT.fullmatch(completion_text(completion)) is not None) for completion in completions]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters and whole tags: id 0 pads, id 1 ends the sequence."""
    vocabulary = ["<pad>", "<eos>", "<unk>", *TAGS, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(TAGS) + "|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_tiny_model(output_dir: str | Path, seed: int = 0) -> None:
    """Train the 0.8 M model from nothing (140 CPU seconds) and save it in bf16 with its tokenizer.

    Args:
        output_dir: The folder to write; created if it is missing.
        seed: Seeds the weights, the problems of each batch and which of them think.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    problems, _ = split_problems()
    chooser = random.Random(seed)
    _supervise(model, tokenizer, problems, chooser, steps=TRACE_STEPS, think_share=1.0)
    _supervise(model, tokenizer, problems, chooser, steps=MIX_STEPS, think_share=THINK_SHARE)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def _supervise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    chooser: random.Random,
    *,
    steps: int,
    think_share: float,
) -> None:
    """AdamW on the completions' tokens, with a linear warm-up over a tenth of the steps and a linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    for _ in range(steps):
        rows = [(problem, chooser.random() < think_share) for problem in chooser.choices(problems, k=BATCH_ROWS)]
        input_ids_BL, labels_BL = _collate(tokenizer, rows)
        loss = model(input_ids=input_ids_BL, labels=labels_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _collate(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[Problem, bool]]) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, L] int64, padded on the right; the labels of prompts and padding are -100."""
    prompts = [tokenizer.encode(problem.prompt) for problem, _ in rows]
    completions = [
        [*tokenizer.encode(write_completion(problem, think=think)), tokenizer.eos_token_id] for problem, think in rows
    ]
    length = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    input_ids_BL = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels_BL = torch.full((len(rows), length), -100)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        input_ids_BL[row, :end] = torch.tensor(prompt + completion)
        labels_BL[row, len(prompt) : end] = torch.tensor(completion)
    return input_ids_BL, labels_BL


def _to_dataset(problems: list[Problem]) -> Dataset:
    return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m grpo_fast.recipes.tiny OUT")
    make_tiny_model(sys.argv[1])
