"""Two processes on this machine (gloo): equal weights after every step, whatever the packs of each."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from datasets import Dataset
from grpo_fast import GRPOConfig, GRPOTrainer
from tests.tiny_lm import make_model, make_tokenizer


class Uneven(GRPOTrainer):
    def _generate(self, prompts):
        prompt_ids, completion_ids, completions, logps = super()._generate(prompts)
        if self.accelerator.process_index == 1:
            # many packs, then one, then none
            keep = (9, 1, 0)[self.state.global_step]
            completion_ids = [ids[:keep] for ids in completion_ids]
        return prompt_ids, completion_ids, completions, logps


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
"""


def test_processes_stay_together(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
