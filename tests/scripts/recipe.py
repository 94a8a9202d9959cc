"""The shape of a recipe repository: arguments from a YAML file, a registry of rewards, a run that can be taken up."""

import asyncio
import functools
import os
import re
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config


@dataclass
class RecipeArguments(ScriptArguments):
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy"], metadata={"help": "Names of the registry."})
    repetition_max_penalty: float = field(default=-1.0, metadata={"help": "At 100% repetition."})


@dataclass
class RecipeConfig(GRPOConfig):
    system_prompt: str | None = field(default=None, metadata={"help": "Opens every conversation."})


def contents(completions):
    return [completion[0]["content"] for completion in completions]


def accuracy_reward(completions, solution, **kwargs):
    return [None if s is None else float(s in text) for text, s in zip(contents(completions), solution, strict=True)]


def format_reward(completions, **kwargs):
    return [1.0 if re.search(r"\d+", text) else 0.0 for text in contents(completions)]


def repetition_penalty(completions, max_penalty, **kwargs):
    return [max_penalty * (1 - len(set(text)) / max(len(text), 1)) for text in contents(completions)]


async def judge_reward(prompts, completions, trainer_state, log_metric, **kwargs):
    async def judge(prompt, text):
        await asyncio.sleep(0)
        return abs(len(text) - len(prompt[-1]["content"])) / 10

    scores = await asyncio.gather(*map(judge, prompts, contents(completions)))
    log_metric("judge/step", trainer_state.global_step)
    return scores


def rewards_of(args):
    penalty = functools.partial(repetition_penalty, max_penalty=args.repetition_max_penalty)
    functools.update_wrapper(penalty, repetition_penalty)
    registry = {
        "accuracy": accuracy_reward,
        "format": format_reward,
        "repetition": penalty,
        "judge": judge_reward,
    }
    return [registry[name] for name in args.reward_funcs]


def main(script_args, training_args, model_args):
    set_seed(training_args.seed)
    last_checkpoint = None
    if os.path.isdir(training_args.output_dir):
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
    dataset = load_dataset("json", data_files=script_args.dataset_name)

    def make_conversation(example):
        prompt = []
        if training_args.system_prompt is not None:
            prompt.append({"role": "system", "content": training_args.system_prompt})
        prompt.append({"role": "user", "content": example["problem"]})
        return {"prompt": prompt}

    dataset = dataset.map(make_conversation)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_cache": not training_args.gradient_checkpointing,
    }
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards_of(script_args),
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=None if training_args.eval_strategy == "no" else dataset[script_args.dataset_test_split],
        peft_config=get_peft_config(model_args),
    )
    result = trainer.train(resume_from_checkpoint=last_checkpoint)
    metrics = {**result.metrics, "train_samples": len(dataset[script_args.dataset_train_split])}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.save_model(training_args.output_dir)
    if trainer.accelerator.is_main_process:
        trainer.create_model_card(dataset_name=script_args.dataset_name, tags=["recipe"])
        trainer.model.config.use_cache = True
        trainer.model.config.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((RecipeArguments, RecipeConfig, ModelConfig)).parse_args_and_config())
