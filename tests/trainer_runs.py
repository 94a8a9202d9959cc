"""Short runs of a subclass of either trainer, TRL's or ours, and what it means that two are the same."""

import functools
import math
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from datasets import Dataset

import grpo_fast
from tests.tiny_lm import make_model, make_tokenizer, save

# fp32 throughout; TRL counts positions over the left padding, we from 0, so rounding differs
RTOL, ATOL = 2e-4, 2e-5
# the same sums of one implementation in another order
RTOL_OURS, ATOL_OURS = 1e-4, 1e-6
# timings, and what only one of the two counts
IGNORED = ("step_time", "time/", "memory/", "total_flos", "train_", "epoch")
WORDS = ["ab", "abc", "dcba", "a", "bad cab", "fade", "cafe bead"]
# its completions end after 1 to 9 tokens
SEED = 2


def digits(completions, **kwargs):
    return [sum(c in "0123456789" for c in text) / 4 for text in completions]


def column(completions, target, **kwargs):
    return [None if t == 0 else float(len(text) % 3 == t % 3) for text, t in zip(completions, target, strict=True)]


def rows():
    rows = [{"prompt": word + "=", "target": i} for i, word in enumerate(WORDS * 3)]
    random.Random(0).shuffle(rows)
    return rows


def build(package, folder, make_class=None, *, model=None, rewards=(digits, column), dataset=None, **kwargs):
    """A trainer; `model` is a folder or makes one."""
    names = ("processing_class", "tools", "callbacks", "eval_dataset", "script", "rollout_func", "environment_factory")
    arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
    settings = {
        "output_dir": str(folder / package.__name__),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 9,
        "learning_rate": 2e-3,
        # a loss that is twice as large must show
        "max_grad_norm": 1e3,
        # Adam would turn the sign of a gradient that is zero but for rounding into a whole step
        "optim": "sgd",
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 11,
    } | kwargs
    if package is grpo_fast:
        # several packs a micro-batch, which the plain loss takes backward one by one
        settings.setdefault("max_tokens_per_pack", 32)
        # metrics of all rows, as TRL's
        settings.setdefault("skip_zero_gradient_rows", False)
    base = package.GRPOTrainer
    return (make_class(base) if make_class else base)(
        reward_funcs=list(rewards),
        args=package.GRPOConfig(**settings),
        train_dataset=dataset or Dataset.from_list(rows()),
        model=model if isinstance(model, str) else (model or functools.partial(make_model, seed=SEED))(),
        **{"processing_class": make_tokenizer()} | arguments,
    )


def trained(package, folder, make_class=None, *, patch=None, **kwargs):
    """A trainer after its run; construction seeds the process, so two runs must not be interleaved."""
    trainer = build(package, folder, make_class, **kwargs)
    if patch is not None:
        patch(trainer)
    trainer.train()
    return trainer


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def is_same(trainer, other):
    return torch.allclose(weights_of(trainer), weights_of(other), rtol=RTOL, atol=ATOL)


def assert_same_run(ours, theirs):
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for line, expected in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name, value in expected.items():
            if name.startswith(IGNORED) or "_runtime" in name or "_per_second" in name:
                continue
            where = f"{name} at step {expected['step']}"
            assert name in line, where
            if value is None or (isinstance(value, float) and math.isnan(value)):
                assert line[name] is None or math.isnan(line[name]), where
            else:
                assert line[name] == pytest.approx(value, rel=RTOL, abs=ATOL), where
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=RTOL, atol=ATOL)


def both(folder, make_class=None, **kwargs):
    """One subclass on both trainers, after asserting that their runs are the same."""
    import trl

    if kwargs.get("beta"):
        # TRL reads its reference model from disk
        kwargs["model"] = save(folder / "model", seed=SEED)
    theirs = trained(trl, folder, make_class, **kwargs)
    ours = trained(grpo_fast, folder, make_class, **kwargs)
    assert_same_run(ours, theirs)
    return ours, theirs


@functools.cache
def _plain(settings):
    with TemporaryDirectory() as folder:
        return trained(grpo_fast, Path(folder), **dict(settings))


def plain(**settings):
    """Our trainer itself after its run, one for all tests that ask with these settings."""
    return _plain(tuple(settings.items()))
