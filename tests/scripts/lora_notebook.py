"""The shape of a notebook: LoRA on a chat model, a system message, the completions shown, the run taken up again."""

import re
import sys

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model_id, output_dir = sys.argv[1:]

SYSTEM_PROMPT = "add the numbers"

# -- data
questions = [(a, b) for a in range(1, 5) for b in range(1, 5)]
dataset = Dataset.from_list([{"question": f"{a} + {b} = ", "answer": str(a + b)} for a, b in questions])
dataset = dataset.map(
    lambda row: {"prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["question"]}]}
)
dataset = dataset.remove_columns(["question"])


# -- rewards
def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    assert prompts[0][0]["content"] == SYSTEM_PROMPT
    return [2.0 if response == a else 0.0 for response, a in zip(responses, answer, strict=True)]


def int_reward_func(completions, **kwargs) -> list[float]:
    return [0.5 if re.fullmatch(r"\d+", completion[0]["content"]) else 0.0 for completion in completions]


class LengthReward:
    __name__ = "length"

    def __call__(self, completion_ids, log_extra, **kwargs) -> list[float]:
        log_extra("tokens", [len(ids) for ids in completion_ids])
        return [-0.01 * len(ids) for ids in completion_ids]


# -- model
tokenizer = AutoTokenizer.from_pretrained(model_id)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
peft_config = LoraConfig(
    r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
)


def make_trainer(max_steps):
    training_args = GRPOConfig(
        output_dir=output_dir,
        run_name="lora",
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=8,
        beta=0.04,
        loss_type="grpo",
        max_steps=max_steps,
        save_steps=2,
        max_grad_norm=0.1,
        log_completions=True,
        num_completions_to_print=2,
        report_to="none",
        seed=3407,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_id),
        processing_class=tokenizer,
        reward_funcs=[correctness_reward_func, int_reward_func, LengthReward()],
        args=training_args,
        train_dataset=dataset,
        peft_config=peft_config,
    )


make_trainer(max_steps=2).train()
trainer = make_trainer(max_steps=4)
trainer.train(resume_from_checkpoint=True)

# -- use
trainer.save_state()
trainer.save_model(f"{output_dir}/final")
trainer.create_model_card(model_name="lora", dataset_name="sums")
base = AutoModelForCausalLM.from_pretrained(model_id)
loaded = PeftModel.from_pretrained(base, f"{output_dir}/final").merge_and_unload()
text = tokenizer.apply_chat_template(dataset[0]["prompt"], tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
