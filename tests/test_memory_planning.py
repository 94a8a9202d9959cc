"""The trainer fits packs and recomputation to the memory, and a run's numbers do not show how it did."""

import logging

import pytest
import torch

from grpo_fast import GRPOConfig
from grpo_fast.activations import decoder_layers, measure
from grpo_fast.free_memory import free_bytes
from grpo_fast.memory_plan import MIN_BUDGET, RESERVED_SHARE, PackBudget, peak_bytes
from grpo_fast.packing import default_max_tokens
from grpo_fast.trainer import memory_planning
from grpo_fast.trainer.memory_planning import FILL_TOKENS, PROBE_TOKENS, STATE_KEY
from tests.test_trainer import build, weights_of
from tests.tiny_lm import make_model

L = 4
CAP = default_max_tokens(torch.device("cpu"))
FILL = FILL_TOKENS["cpu"]
PLENTY = 2**40
SETTINGS = {"optim": "adamw_torch", "learning_rate": 1e-2}


@pytest.fixture
def free(monkeypatch):
    """Sets what `free_bytes` finds, now or for each call."""

    def find(found):
        monkeypatch.setattr(memory_planning, "free_bytes", found if callable(found) else lambda device: found)

    return find


def build_deep(tmp_path, **kwargs):
    return build(tmp_path, model=make_model(num_hidden_layers=L), **(SETTINGS | kwargs))


def needs(trainer, tokens, k):
    """Free bytes of which a first step's pack of so many tokens may take just as much as it needs."""
    cost = measure(trainer.model, trainer._run_probe, PROBE_TOKENS)
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    # gradients and AdamW's two moments
    return peak_bytes(cost, tokens, k) / (1 - RESERVED_SHARE) + 3 * trained + 1


def budget_of(trainer):
    return PackBudget(max_tokens=trainer._max_tokens_per_pack(), fill_tokens=trainer._fill_tokens_per_pack())


def recomputing(trainer):
    return [layer.gradient_checkpointing for layer in decoder_layers(trainer.model)]


def watched(trainer):
    """Runs the training; says how many layers recompute in each pack, or packs of one graph, and the packs' tokens."""
    counts, tokens = [], []
    plan = trainer._plan_checkpointing

    def watch(batches, **kwargs):
        batches = list(batches)
        plan(batches, **kwargs)
        counts.append(sum(recomputing(trainer)))
        tokens.append([batch.width for batch in batches])

    trainer._plan_checkpointing = watch
    trainer.train()
    return counts, tokens


def test_with_memory_to_spare_nothing_recomputes(tmp_path, free):
    trainer = build_deep(tmp_path)
    assert recomputing(trainer) == [False] * L
    free(PLENTY)
    counts, _ = watched(trainer)
    assert counts == [0, 0]
    assert budget_of(trainer) == PackBudget(max_tokens=CAP, fill_tokens=FILL)


@pytest.mark.parametrize("k", [1, L - 1, L])
def test_a_memory_limit_makes_layers_recompute_and_changes_no_bit(tmp_path, free, k):
    """The free memory lets the step's largest pack fit with k layers just so."""
    plain = build_deep(tmp_path, max_tokens_per_pack=64, max_steps=1)
    free(PLENTY)
    _, tokens = watched(plain)
    (largest,) = map(max, tokens)
    trainer = build_deep(tmp_path, max_tokens_per_pack=64, max_steps=1)
    free(needs(trainer, largest, k))
    counts, _ = watched(trainer)
    assert counts == [k]
    assert torch.equal(weights_of(trainer), weights_of(plain))


def test_memory_that_comes_and_goes_is_followed_step_by_step(tmp_path, free, caplog):
    trainer = build_deep(tmp_path, max_steps=3)
    # twice when training begins, then for three steps
    found = iter([PLENTY, PLENTY, PLENTY, 0, PLENTY])
    free(lambda device: next(found))
    with caplog.at_level(logging.WARNING, logger=memory_planning.__name__):
        counts, _ = watched(trainer)
    assert counts == [0, L, 0]
    assert next(found, None) is None


def test_compiled_layers_recompute_as_planned_or_all(tmp_path, free):
    """Two sets of graphs at most."""
    trainer = build_deep(tmp_path, max_tokens_per_pack=64, max_steps=3)
    trainer.args.torch_compile = True
    first = needs(trainer, 64, 1)
    found = iter([first, first, first, 0, PLENTY])
    free(lambda device: next(found))
    counts, _ = watched(trainer)
    assert counts == [1, L, 1]


@pytest.fixture
def logged(caplog, monkeypatch):
    """Lines of the planner's log."""
    logger = logging.getLogger(memory_planning.__name__)
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("grpo_fast"), "propagate", True)
    caplog.set_level(logging.INFO, logger=memory_planning.__name__)
    return lambda: [record.getMessage() for record in caplog.records if record.name == memory_planning.__name__]


def test_what_was_chosen_is_said_once(tmp_path, free, logged):
    free(PLENTY)
    build_deep(tmp_path, max_steps=2).train()
    (line,) = logged()
    assert line.startswith(f"packs of up to {FILL} tokens, {CAP} for one group; full ones need 0.6")
    assert line.endswith(f"that are free for them, with 0 of {L} layers recomputed")


def test_too_little_memory_is_said_and_tried(tmp_path, free, logged):
    free(0)
    trainer = build_deep(tmp_path, max_steps=2)
    counts, _ = watched(trainer)
    # the head's workspace is what is largest here
    assert counts == [L, L]
    assert budget_of(trainer) == PackBudget(max_tokens=MIN_BUDGET, fill_tokens=MIN_BUDGET)
    first, *rest = logged()
    assert first.startswith("memory is short: packs of up to 128 tokens")
    assert all("tokens may not fit the memory: it needs 0.6" in line for line in rest)
    assert rest


def test_full_packs_shrink_with_the_memory_before_layers_recompute(tmp_path, free):
    trainer = build_deep(tmp_path, max_steps=1)
    free(needs(trainer, FILL // 2, 0))
    counts, _ = watched(trainer)
    budget = budget_of(trainer)
    assert budget.fill_tokens == FILL // 2
    # a group may have what fits with all layers recomputed
    assert budget.fill_tokens < budget.max_tokens
    assert counts == [0]


def test_packs_are_filled_up_to_their_own_budget(tmp_path, free, monkeypatch):
    free(PLENTY)
    for fill, num_packs in ((1024, 1), (20, 2)):
        monkeypatch.setitem(FILL_TOKENS, "cpu", fill)
        # two groups of a prompt of 4 tokens and four completions of up to 6
        _, tokens = watched(build_deep(tmp_path, max_steps=1))
        assert len(tokens) == num_packs, tokens


def test_without_checkpointing_only_the_budget_falls(tmp_path, free):
    trainer = build_deep(tmp_path, max_steps=1, gradient_checkpointing=False)
    free(needs(trainer, FILL // 2, 0))
    trainer.train()
    assert budget_of(trainer) == PackBudget(max_tokens=FILL // 2, fill_tokens=FILL // 2)
    assert recomputing(trainer) == [False] * L
    trainer = build_deep(tmp_path, max_steps=1, gradient_checkpointing=False, max_tokens_per_pack=77)
    free(0)
    trainer.train()
    assert budget_of(trainer) == PackBudget(max_tokens=77, fill_tokens=77)
    assert recomputing(trainer) == [False] * L


def test_a_number_of_layers_is_kept_to(tmp_path, free):
    for found in (0, PLENTY):
        free(found)
        trainer = build_deep(tmp_path, checkpointed_layers=2)
        counts, _ = watched(trainer)
        assert counts == [2, 2]
        assert recomputing(trainer) == [True, True, False, False]


def test_reentrant_checkpointing_stays_reentrant(tmp_path, free):
    free(PLENTY)
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "max_steps": 1}
    trainer = build_deep(tmp_path, checkpointed_layers=2, **kwargs)
    trainer.train()
    assert all(
        f._gradient_checkpointing_func.keywords == {"use_reentrant": True} for f in decoder_layers(trainer.model)
    )
    assert torch.equal(
        weights_of(trainer), weights_of(trained_deep(tmp_path, gradient_checkpointing=False, max_steps=1))
    )


def trained_deep(tmp_path, **kwargs):
    trainer = build_deep(tmp_path, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("change", "reason", "flags"),
    [
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "says which", [True, False] * (L // 2)),
        ({"pads": True}, "rows run padded", [True] * L),
        ({"free": None}, "nothing says how much memory of cpu is free", [True] * L),
    ],
)
def test_what_cannot_be_planned_is_transformers(tmp_path, free, logged, change, reason, flags):
    free(change.pop("free", 0))
    pads = change.pop("pads", False)
    trainer = build_deep(tmp_path, max_steps=1, **change)
    trainer.pads_rows = pads
    trainer.train()
    assert recomputing(trainer) == flags
    assert budget_of(trainer) == PackBudget(max_tokens=CAP, fill_tokens=FILL)
    (line,) = logged()
    assert line.endswith(reason)


def test_rows_that_run_padded_recompute_all(tmp_path, free):
    """Masks with holes: the model's own attention was not measured."""
    free(PLENTY)
    trainer = build_deep(tmp_path, max_steps=1)
    trainer.train()
    assert recomputing(trainer) == [False] * L
    ids = torch.ones(2, 6, dtype=torch.int64)
    rows = trainer._padded_rows(ids, ids, {}, is_scored=ids[:, 3:].bool(), num_tokens=12)
    trainer._plan_checkpointing([rows])
    assert recomputing(trainer) == [True] * L
    with torch.no_grad():
        trainer._plan_checkpointing([])
    assert recomputing(trainer) == [True] * L


def test_overridden_losses_hold_all_packs_at_once(tmp_path, free):
    from grpo_fast import GRPOTrainer

    class Own(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs)

    trainer = build_deep(tmp_path, trainer_class=Own, max_steps=1, max_tokens_per_pack=16, share_prompts="never")
    free(needs(trainer, 16, 0))
    counts, tokens = watched(trainer)
    assert len(tokens[-1]) > 1
    assert counts[-1] > 0


def test_a_resumed_run_keeps_its_budget(tmp_path, free):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    straight = build_deep(tmp_path, **settings)
    free(needs(straight, FILL // 2, 0))
    straight.train()
    budget = budget_of(straight)
    assert budget.fill_tokens == FILL // 2
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for found in (PLENTY, free_bytes(torch.device("cpu"))):
        free(found)
        resumed = build_deep(tmp_path, **(settings | {"save_strategy": "no"}))
        resumed.train(resume_from_checkpoint=checkpoint)
        assert budget_of(resumed) == budget == PackBudget(**resumed.state.stateful_callbacks[STATE_KEY]["attributes"])
        assert torch.equal(weights_of(resumed), weights_of(straight))


def test_a_resumed_run_with_less_memory_says_that_its_sums_differ(tmp_path, free, logged):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    free(PLENTY)
    build_deep(tmp_path, **settings).train()
    resumed = build_deep(tmp_path, gradient_checkpointing=False, **(settings | {"save_strategy": "no"}))
    free(needs(resumed, 128, 0))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert budget_of(resumed) == PackBudget(max_tokens=128, fill_tokens=128)
    assert any(f"packs of up to {CAP} tokens, of which 128 fit" in line for line in logged())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpointed_layers": -1}, "checkpointed_layers must be at least 0; it is -1"),
        (
            {"checkpointed_layers": 1, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
            r"checkpointed_layers=1 and gradient_checkpointing_kwargs\['every_n_layers'\]=2 both say",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(str(tmp_path), use_cpu=True, **settings)


def test_more_layers_than_the_model_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"checkpointed_layers must be at most {L}"):
        build_deep(tmp_path, checkpointed_layers=L + 1)
