"""Gradients of one optimizer step for every loss type: of one process in two micro-batches, or of two processes.

Run as `python -m tests.gradients_of_processes OUT`, alone or under torchrun; rank 0 writes {case name: gradient}.
"""

import os
import sys

import torch
from datasets import Dataset

from grpo_fast import GRPOConfig, GRPOTrainer
from tests.tiny_lm import make_model, make_tokenizer
from tests.trl_grid import B, C, Case, make_inputs, prepare

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CASES = [
    *[Case(loss_type=loss_type, beta=0.1, has_tool_mask=True) for loss_type in LOSS_TYPES],
    *[Case(loss_type=loss_type, importance_sampling_level="sequence") for loss_type in LOSS_TYPES],
    *[Case(loss_type=loss_type, importance_mode="token_truncate", masks_truncated=True) for loss_type in LOSS_TYPES],
    Case(loss_type="dapo", importance_mode="sequence_mask"),
    Case(loss_type="grpo", entropy_coef=0.1),
    Case(loss_type="dapo", off_policy_mask_threshold=0.02),
]


def half(inputs, which, *, is_silent):
    """Three of the six rows; `is_silent` leaves the second half without a token in the loss."""
    rows = slice(3 * which, 3 * which + 3)
    part = {name: value[rows] if value.dim() else value for name, value in inputs.items()}
    if is_silent and which == 1:
        part["completion_mask"] = torch.zeros_like(part["completion_mask"])
    return part


def scores(trainer, inputs):
    """The policy's log-probs, which the cases' old policy is drawn around."""
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, C)[0]


def main(out):
    trainer = GRPOTrainer(
        model=make_model(seed=3),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            out + ".run",
            use_cpu=True,
            ddp_backend="gloo" if "RANK" in os.environ else None,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=6,
            num_generations=2,
            max_completion_length=7,
            # a process has several packs, the other one
            max_tokens_per_pack=9,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"] * 6}),
        processing_class=make_tokenizer(),
    )
    processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    model = trainer.accelerator.prepare_model(trainer.model)
    logps = scores(trainer, make_inputs(CASES[0], torch.zeros(B, C)))
    gradients = {}
    for i, case in enumerate(CASES):
        inputs = make_inputs(case, logps)
        prepare(trainer, case)
        # wide enough for every case to have a gradient
        trainer.epsilon_low, trainer.epsilon_high = 0.2, 1.25 if case.loss_type == "cispo" else 0.28
        micro_batches = 2 // processes
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = micro_batches
        for which in [rank] if processes == 2 else [0, 1]:
            part = half(inputs, which, is_silent=i % 4 == 3)
            with trainer._scoring_attention(trainer.model):
                trainer.accelerator.backward(trainer._compute_loss(model, part))
        gradients[case.name] = torch.cat([p.grad.flatten().clone() for p in trainer.model.parameters()])
    if rank == 0:
        torch.save(gradients, out)


if __name__ == "__main__":
    main(sys.argv[1])
