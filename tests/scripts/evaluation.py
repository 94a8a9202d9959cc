"""The shape of a careful experiment: several evaluation sets, callbacks, a reward model, the best checkpoint kept."""

import sys

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

model_id, reward_id, output_dir = sys.argv[1:]


class Watch(TrainerCallback):
    """Notes what each event brings."""

    def __init__(self):
        self.evaluations = []

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        assert model is not None
        assert processing_class is not None
        if state.global_step == 3:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluations.append((state.global_step, *sorted(name for name in metrics if name.endswith("_reward"))))

    def on_log(self, args, state, control, logs, **kwargs):
        assert all(isinstance(name, str) for name in logs)


def rows(numbers):
    return Dataset.from_list([{"prompt": f"{n} + {n} = ", "answer": str(2 * n)} for n in numbers])


def exact(completions, answer, **kwargs):
    return [float(text.strip() == a) for text, a in zip(completions, answer, strict=True)]


tokenizer = AutoTokenizer.from_pretrained(model_id, padding_side="left")
watch = Watch()
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_id),
    reward_funcs=[reward_id, AutoModelForSequenceClassification.from_pretrained(reward_id, num_labels=1), exact],
    reward_processing_classes=[None, AutoTokenizer.from_pretrained(reward_id), None],
    args=GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_generations=4,
        num_generations_eval=2,
        max_completion_length=6,
        learning_rate=1e-3,
        reward_weights=[0.5, 0.25, 1.0],
        scale_rewards="batch",
        mask_truncated_completions=True,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        report_to="none",
    ),
    train_dataset=rows(range(8)),
    eval_dataset={"small": rows(range(4)), "large": rows(range(10, 14))},
    processing_class=tokenizer,
    callbacks=[watch, EarlyStoppingCallback(early_stopping_patience=9)],
)
trainer.train()
assert trainer.state.best_model_checkpoint is not None
assert [step for step, *_ in watch.evaluations] == [0, 0, 2, 2, 3, 3, 4, 4]
assert watch.evaluations[0] == (0, "eval_reward")
metrics = trainer.evaluate(trainer.eval_dataset["large"], metric_key_prefix="final")
assert "final_loss" in metrics
trainer.save_state()
