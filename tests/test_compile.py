"""`torch_compile=True`: the layers are compiled between packed attention and the LM head, which run as they are."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset
from torch._dynamo.utils import counters

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.attention import packed_attention
from grpo_fast.loading import cast_lm_head_to_fp32
from grpo_fast.packing import pack_rows
from grpo_fast.policy import install_scoring, score
from tests.tiny_lm import make_model, make_tokenizer

UNCOMPILED = "Skip calling `torch.compiler.disable()`d function"


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(folder, **kwargs):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 9,
        "max_tokens_per_pack": 60,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | kwargs
    trainer = GRPOTrainer(
        model=make_model(seed=1),
        reward_funcs=lambda completions, **kwargs: [len(set(text)) / 6 for text in completions],
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": f"{i}" * (i // 3 + 1) + "="} for i in range(12)]),
        processing_class=make_tokenizer(),
    )
    graphs = []
    take_step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = take_step(*args, **kwargs)
        graphs.append(counters["stats"]["unique_graphs"])
        return loss

    trainer.training_step = training_step
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]), graphs


def test_compiled_run_equals_the_plain_one(tmp_path):
    settings = {"beta": 0.1}
    weights, graphs = trained(tmp_path, **settings, torch_compile=True, torch_compile_backend="aot_eager")
    assert 0 < graphs[1] == graphs[-1], "batches of other shapes are compiled again"
    # two models of two layers: what runs before, between and after attention, for fixed and for varying lengths
    assert graphs[-1] <= 36
    assert all(reason.startswith(UNCOMPILED) for reason in counters["graph_break"])
    plain, _ = trained(tmp_path, **settings)
    # a compiled part adds gradients of its branches in an order of its own: a last bit of a weight near 1
    torch.testing.assert_close(weights, plain, rtol=0, atol=2e-7)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
def test_run_compiled_by_inductor_equals_the_plain_one(tmp_path):
    weights, _ = trained(tmp_path, torch_compile=True)
    plain, _ = trained(tmp_path)
    # inductor sums in another order
    torch.testing.assert_close(weights, plain, rtol=1e-5, atol=1e-6)


def test_compiled_model_scores_with_a_head_in_fp32():
    (pack,) = pack_rows([[5, 6, 7]] * 2, [[8, 9, 10], [11, 12]], max_tokens=64, share_prompts=True)
    model = make_model().bfloat16().train()
    install_scoring(model)
    cast_lm_head_to_fp32(model)
    gradients = []
    for scored in (model, torch.compile(copy.deepcopy(model), backend="aot_eager")):
        with packed_attention(scored):
            logps = score(scored, pack, temperature=1.0)[0]
            logps.sum().backward()
        gradients.append([logps.detach(), *(parameter.grad for parameter in scored.parameters())])
    assert counters["stats"]["unique_graphs"] > 0
    for plain, compiled in zip(*gradients, strict=True):
        assert torch.equal(plain, compiled)
