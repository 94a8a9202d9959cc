"""Two processes on this machine (gloo): equal weights after every step, whatever the packs of each."""

import torch

from tests.processes import launch, launch_text

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from datasets import Dataset
from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.trainer import memory_planning
from tests.test_memory_planning import needs
from tests.tiny_lm import make_model, make_tokenizer


class Uneven(GRPOTrainer):
    def _generate(self, prompts):
        prompt_ids, completion_ids, *rest = super()._generate(prompts)
        if self.accelerator.process_index == 1:
            # many packs, then one, then none
            keep = (9, 1, 0)[self.state.global_step]
            completion_ids = [ids[:keep] for ids in completion_ids]
        return prompt_ids, completion_ids, *rest


trainer = Uneven(
    model=make_model(),
    reward_funcs=lambda completions, **kwargs: [len(set(text)) / 6 for text in completions],
    args=GRPOConfig(
        sys.argv[1], use_cpu=True, ddp_backend="gloo", bf16=False, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=6, max_tokens_per_pack=12, share_prompts="never", max_steps=3, learning_rate=0.05,
        optim="sgd", report_to="none", save_strategy="no", disable_tqdm=True, beta=0.1,
    ),
    train_dataset=Dataset.from_list([{"prompt": f"{i}+1="} for i in range(12)]),
    processing_class=make_tokenizer(),
)
before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
trainer.train()
weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
gathered = [torch.zeros_like(weights) for _ in range(2)]
dist.all_gather(gathered, weights)
assert torch.equal(*gathered), "the processes' weights differ"
assert not torch.equal(weights, before), "nothing was trained"

# a budget that follows from the memory is the smallest of all processes'
trainer.args.max_tokens_per_pack = None
free = needs(trainer, 128, 0) if trainer.accelerator.process_index else 2**40
memory_planning.free_bytes = lambda device: free
trainer._plan_memory()
assert trainer._fill_tokens_per_pack() == 128
"""


def test_processes_stay_together(tmp_path):
    launch_text(SCRIPT, tmp_path, tmp_path / "out")


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    """Every loss type, with different numbers of packs in the processes, and with a process that has no tokens."""
    for num_processes in (1, 2):
        launch("-m", "tests.gradients_of_processes", tmp_path / str(num_processes), num_processes=num_processes)
    one, two = (torch.load(tmp_path / name) for name in ("1", "2"))
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        # fp32: the same sums in another order
        assert (two[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert gradient.norm() > 1e-3, name
