"""The [rows, length, vocabulary] logits of a training step never exist."""

import torch
from datasets import Dataset

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.attention import native_attention
from tests.allocations import Allocations
from tests.tiny_lm import make_model, make_tokenizer

VOCABULARY = 50_000
ROWS, LENGTH = 64, 64
# `grpo_kernels.linear_logps`: its default bound on temporaries
WORKSPACE_BYTES = 640 * 2**20


def make_trainer(tmp_path):
    return GRPOTrainer(
        model=make_model(vocab_size=VOCABULARY, max_position_embeddings=2 * LENGTH, num_hidden_layers=1),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=ROWS, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=make_tokenizer(),
    )


def test_no_tensor_of_rows_by_vocabulary(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    inputs = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(ROWS, 4, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
        "advantages": torch.randn(ROWS),
        "num_items_in_batch": torch.tensor(ROWS * LENGTH),
    }
    num_logits = ROWS * LENGTH * VOCABULARY
    assert 4 * num_logits > WORKSPACE_BYTES

    with trainer._scoring_attention(trainer.model), Allocations() as seen:
        trainer._compute_loss(trainer.model, inputs).backward()
    assert seen.largest_numel.numel < num_logits / 2, seen.largest_numel
    assert seen.largest.bytes <= WORKSPACE_BYTES, seen.largest
    # a pack's head at a time: the workspace, and the few MiB of the one-layer model around it
    assert seen.peak_bytes < WORKSPACE_BYTES + 100 * 2**20
    assert trainer.model.lm_head.weight.grad.abs().sum() > 0

    # the same watch does see them where they exist
    with native_attention(trainer.model), torch.no_grad(), Allocations() as seen:
        trainer.model(input_ids=ids)
    assert seen.largest_numel.numel >= num_logits
