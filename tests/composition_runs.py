"""A case of the composition matrix through the trainer: nothing but its config, its constructor and `train()`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from grpo_fast import GRPOConfig, GRPOTrainer
from tests import tiny_models
from tests.composition_cases import MAX_COMPLETION, Case
from tests.padded_oracle import PaddedPolicy
from tests.tiny_lm import make_tokenizer

Weights = dict[str, Tensor]
Key = tuple[tuple[int, ...], tuple[int, ...]]

# norm of an optimizer step: far enough for ratios to be clipped in the next
STEP = 0.15
# of the bounds on the sampler's importance weights, within which some lie
CLIP_MIN, CLIP_MAX = 0.75, 1.35
LORA_TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@dataclass
class Step:
    """An optimizer step of one process: the weights before, the rows of each micro-batch, and what came of them."""

    weights: Weights
    micro_batches: list[list[Key]] = field(default_factory=list)
    gradients: Weights = field(default_factory=dict)
    loss: float | None = None


@dataclass
class Run:
    """What a process leaves: the weights it was constructed with, its steps, and the rows each step generated."""

    initial: Weights
    steps: list[Step] = field(default_factory=list)
    rollouts: list[tuple[int, list[Key]]] = field(default_factory=list)


def make_policy(case: Case) -> nn.Module:
    """The model a user passes."""
    model = getattr(tiny_models, case.family)(tied=case.tied)
    if case.tuning == "trained adapter":
        from peft import get_peft_model

        return get_peft_model(model, lora_config(case))
    head = model.get_output_embeddings()
    head.requires_grad_(case.trains_head)
    if not model.get_input_embeddings().weight.requires_grad and case.checkpointing == "reentrant":
        # reentrant checkpoints drop the gradients of a layer whose input has none
        model.enable_input_require_grads()
    return model


def lora_config(case: Case) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=2,
        target_modules=LORA_TARGETS,
        modules_to_save=["lm_head"] if case.trains_head else None,
        # both factors far from 0, so that both have gradients
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def make_trainer(case: Case, folder: Path, callback: TrainerCallback, rollout_func: Any) -> GRPOTrainer:
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": case.accumulation,
        "steps_per_generation": case.steps_per_generation,
        "per_device_train_batch_size": case.rows_per_micro_batch,
        "max_steps": case.num_steps,
        "max_tokens_per_pack": case.max_tokens_per_pack,
        "share_prompts": case.share_prompts,
        "gradient_checkpointing": case.checkpointing != "off",
        "gradient_checkpointing_kwargs": {"use_reentrant": case.checkpointing == "reentrant"},
        "epsilon": case.epsilons[0],
        "epsilon_high": case.epsilons[1],
        "beta": case.beta,
        "use_bias_correction_kl": case.kl == "bias-corrected",
        "mask_truncated_completions": case.masks_truncated,
        "router_aux_loss_coef": case.aux_loss_coef,
    }
    same_named = (
        *("loss_type", "importance_sampling_level", "num_generations", "num_iterations", "entropy_coef"),
        *("top_entropy_quantile", "delta", "off_policy_mask_threshold", "temperature"),
    )
    trainer = GRPOTrainer(
        model=make_policy(case),
        reward_funcs=scores,
        args=GRPOConfig(
            str(folder),
            **settings,
            **{name: getattr(case, name) for name in same_named},
            max_completion_length=MAX_COMPLETION,
            use_cpu=True,
            ddp_backend="gloo" if case.processes > 1 else None,
            ddp_timeout=60,
            # a reentrant checkpoint hides from DDP what its layer uses
            ddp_find_unused_parameters=False if case.checkpointing == "reentrant" else None,
            bf16=False,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            # gradients are compared as they are
            max_grad_norm=0.0,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(case.groups))]}),
        processing_class=make_tokenizer(),
        peft_config=lora_config(case) if case.tuning == "new adapter" else None,
        callbacks=[callback],
        rollout_func=rollout_func,
    )
    if case.importance_mode is not None:
        # the rollout function plays vLLM
        trainer.use_vllm = True
        trainer.vllm_importance_sampling_mode = case.importance_mode
        trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max = CLIP_MIN, CLIP_MAX
    return trainer


def scores(completions: list[str], score: list[float], **kwargs: Any) -> list[float]:
    """What the rollout function brings."""
    return score


class Recorder(TrainerCallback):
    """Plays the sampler, and keeps what each optimizer step was given and what it got."""

    trainer: GRPOTrainer

    def __init__(self, case: Case) -> None:
        self.case = case
        self.run: Run
        self.logps: dict[Key, list[float]] = {}

    def start(self, trainer: GRPOTrainer) -> None:
        """Move the policy away from its reference, which was made with the trainer, and see what it samples with."""
        self.trainer = trainer
        self.run = Run(initial=weights_of(trainer))
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    # a new adapter far from its reference would have a KL that hides all else
                    parameter.mul_(0.2 if "lora_B" in name and self.case.tuning == "new adapter" else 1.0)
                    parameter.add_(0.03 * torch.randn(parameter.shape, generator=g))
        if self.case.reports_logps:
            policy = PaddedPolicy(make_oracle_model(self.case), weights_of(trainer))
            self.logps = policy.logps_of(self.case.rows, temperature=self.case.temperature)

    def roll_out(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """The completions of the prompts that this process was given."""
        case = self.case
        process = trainer.accelerator.process_index
        # groups may straddle processes
        places = [(process * len(prompts) + i) % case.num_generations for i in range(len(prompts))]
        rows = [case.groups[int(prompt)][place] for prompt, place in zip(prompts, places, strict=True)]
        if case.has_silent_process and process == 1:
            rows = [row.silent for row in rows]
        self.run.rollouts.append((trainer.state.global_step, [row.key for row in rows]))
        output: dict[str, Any] = {
            "prompt_ids": [list(row.prompt) for row in rows],
            "completion_ids": [list(row.completion) for row in rows],
            "logprobs": [sampled_logps(self.logps[row.key], row.noise) for row in rows] if self.logps else None,
            "score": [row.score for row in rows],
        }
        if case.has_env_mask:
            output["env_mask"] = [list(row.env_mask) for row in rows]
        return output

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.run.steps.append(Step(weights=weights_of(self.trainer)))

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._keep_micro_batch()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._keep_micro_batch()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
        self.run.steps[-1].gradients = gradients
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        if norm > 0:
            for p in trained.values():
                if p.grad is not None:
                    p.grad.mul_(STEP / norm)

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.run.steps[-1].loss = logs["loss"]

    def _keep_micro_batch(self) -> None:
        """The rows of the micro-batch just trained on, of TRL's buffer."""
        trainer = self.trainer
        buffer = trainer._buffered_inputs
        assert buffer is not None
        inputs = buffer[(trainer._step - 1) % self.case.steps_per_generation]
        rows = zip(inputs["prompt_ids"].tolist(), inputs["completion_ids"].tolist(), strict=True)
        self.run.steps[-1].micro_batches.append([tuple(map(without_padding, row)) for row in rows])


def make_oracle_model(case: Case) -> nn.Module:
    """A model with the parameters of the trainer's, made anew."""
    model = make_policy(case)
    if case.tuning == "new adapter":
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(case))
    return model


def without_padding(ids: list[int]) -> tuple[int, ...]:
    return tuple(token for token in ids if token != 0)


def sampled_logps(logps: list[float], noise: tuple[float | None, ...]) -> list[float | None]:
    """What the sampler reports, in the precision it is kept in."""
    values = torch.tensor(logps, dtype=torch.float64)
    return [None if n is None else float((v + n).float()) for v, n in zip(values, noise, strict=True)]


def weights_of(trainer: GRPOTrainer) -> Weights:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run(case: Case, folder: Path) -> Run:
    """Train for the case's steps, in this process or in one of several that run this."""
    recorder = Recorder(case)
    trainer = make_trainer(case, folder, recorder, recorder.roll_out)
    recorder.start(trainer)
    trainer.train()
    return recorder.run
