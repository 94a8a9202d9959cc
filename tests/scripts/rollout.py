"""The shape of a script with its own generation: `rollout_func` plays two turns, and scores them itself."""

import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

model_id, output_dir = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_id)


def complete(model, prompt_ids, num_tokens):
    width = max(map(len, prompt_ids))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in prompt_ids])
    output = model.generate(
        input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), max_new_tokens=num_tokens, do_sample=True
    )
    texts = output[:, width:].tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in texts]


@torch.no_grad()
def logprobs_of(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), completion].tolist()


def rollout_func(prompts, trainer):
    assert len(prompts) % trainer.num_generations == 0
    prompt_ids = trainer.processing_class(prompts)["input_ids"]
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        first = complete(model, prompt_ids, 3)
        again = tokenizer("=", add_special_tokens=False)["input_ids"]
        second = complete(model, [p + f + again for p, f in zip(prompt_ids, first, strict=True)], 4)
        completion_ids = [f + again + s for f, s in zip(first, second, strict=True)]
        logprobs = [logprobs_of(model, *pair) for pair in zip(prompt_ids, completion_ids, strict=True)]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": logprobs,
        "env_mask": [[1] * len(f) + [0] + [1] * len(s) for f, s in zip(first, second, strict=True)],
        "turns": [[len(f), len(s)] for f, s in zip(first, second, strict=True)],
    }


def even_turns(completions, turns, **kwargs):
    return [-abs(first - second) / 4 for first, second in turns]


trainer = GRPOTrainer(
    model=model_id,
    reward_funcs=even_turns,
    args=GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-4,
        num_iterations=2,
        max_steps=4,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=Dataset.from_list([{"prompt": f"{i} + {j}"} for i in range(3) for j in range(3)]),
    processing_class=tokenizer,
    rollout_func=rollout_func,
)
trainer.train()
trainer.save_state()
