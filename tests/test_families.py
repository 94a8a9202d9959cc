"""Log-probs, entropies and gradients of every causal LM of transformers, or its refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.policy import install_scoring
from grpo_fast.self_check import check_scoring
from tests.families import NOT_TEXT, PACKED, PADDED, REFUSED, by_family, exact_copy, make_family
from tests.test_policy import Scores, packed, row_by_row
from tests.tiny_lm import make_tokenizer

# norm of the difference over norm of the truth, for fp32 models against the same weights in float64
FP32_RELATIVE = 1e-5
# plain transformers in fp32 is 2e-5 off: the scores of normed queries and keys are not scaled down
RELATIVE = {"gemma4_text": 5e-5, "gemma4_unified_text": 5e-5}
# a key's bias has a gradient of zero: what rounding leaves of it is small beside the whole gradient, in fp32's eps
ROUNDING = 1e-7
# its own mask needs a type no wider than fp32, which is the truth then
NOT_IN_FLOAT64 = ["xglm"]


def present(families: Any) -> list[str]:
    return [family for family in families if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def assert_same(family: str, found: Scores, truth: Scores) -> None:
    relative = RELATIVE.get(family, FP32_RELATIVE)
    for kind, values, expected in zip(("logps", "entropies", "gradients"), found, truth, strict=True):
        assert values.keys() == expected.keys()
        whole = torch.cat([value.flatten() for value in expected.values()]).norm()
        for key in expected:
            error = (values[key].double() - expected[key]).norm()
            allowed = relative * expected[key].norm() + (ROUNDING * whole if kind == "gradients" else 0)
            assert error <= allowed, f"{kind} {key}: {error:.2e} off, {allowed:.2e} allowed"


def truth_of(family: str, model: Any) -> Scores:
    return row_by_row(model if family in NOT_IN_FLOAT64 else exact_copy(model))


@pytest.mark.parametrize("family", present(PACKED.split()))
def test_packed_rows_score_and_train_as_rows_alone_do(family: str) -> None:
    model = make_family(family)
    install_scoring(model)
    assert check_scoring(model) is None
    truth = truth_of(family, model)
    assert_same(family, packed(model, max_tokens=30, share_prompts=True), truth)
    assert_same(family, packed(model, max_tokens=None, share_prompts=False), truth)


@pytest.mark.parametrize("family", present(by_family(PADDED)))
def test_padded_rows_score_and_train_as_rows_alone_do(family: str) -> None:
    model = make_family(family)
    install_scoring(model)
    assert by_family(PADDED)[family] in str(check_scoring(model))
    truth = truth_of(family, model)
    assert_same(family, packed(model, max_tokens=30, pads=True), truth)
    assert_same(family, packed(model, max_tokens=None, pads=True), truth)


@pytest.mark.parametrize("family", present(by_family(REFUSED)))
def test_families_whose_log_probs_would_be_wrong_are_refused(family: str) -> None:
    model = make_family(family)
    install_scoring(model)
    with pytest.raises(ValueError, match="model must compute its logits as its LM head times the last hidden states"):
        check_scoring(model)


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.20"), reason="may have more families")
def test_every_causal_lm_is_here() -> None:
    here = [*PACKED.split(), *by_family(PADDED), *by_family(REFUSED), *NOT_TEXT.split()]
    assert len(here) == len(set(here))
    assert not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(here)


@pytest.mark.parametrize("wants_gradients", [False, True])
def test_a_model_without_masks_never_sees_the_trainer_s_left_padding(wants_gradients: bool, tmp_path: Path) -> None:
    model = make_family("rwkv")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_tokens_per_pack=12),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=make_tokenizer(),
    )
    prompts, completions = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]], [[20, 21], [22, 23, 24, 25, 26], [27], [28, 29]]
    ids = torch.zeros(4, 4 + 5, dtype=torch.int64)
    for row, prompt, completion in zip(ids, prompts, completions, strict=True):
        row[4 - len(prompt) : 4 + len(completion)] = torch.tensor(prompt + completion)
    with torch.set_grad_enabled(wants_gradients):
        logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, (ids != 0).long(), 5)
    assert logps.requires_grad is wants_gradients
    for row, prompt, completion in zip(logps.detach(), prompts, completions, strict=True):
        alone = trainer.model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        expected = alone[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=1e-5)
        assert not row[len(completion) :].any()
