import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from grpo_fast import GRPOConfig, adapters
from grpo_fast.generation.vllm_weights import named_weights
from grpo_fast.policy import install_scoring
from tests.tiny_lm import CHARACTERS, make_model

LINEAR = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
KINDS = {
    "lora": LoraConfig(**LINEAR, lora_dropout=0.1),
    "dora": LoraConfig(**LINEAR, use_dora=True),
    "lora of the embedding": LoraConfig(target_modules=["q_proj", "embed_tokens"], r=4),
    "the head beside it": LoraConfig(**LINEAR, modules_to_save=["lm_head"]),
    "some tokens beside it": LoraConfig(**LINEAR, trainable_token_indices=[3, 4]),
    "parameters": LoraConfig(target_modules=[], target_parameters=["mlp.gate_proj.weight"], r=4),
    "ia3": peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"], r=4),
    "pissa": LoraConfig(**LINEAR, init_lora_weights="pissa"),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def make_args(tmp_path, **kwargs):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "beta": 0.1} | kwargs
    return GRPOConfig(str(tmp_path / "out"), **settings)


def adapted(config, name="default", trained=True):
    model = get_peft_model(make_model(tie_word_embeddings=False), config, adapter_name=name)
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def logits(model):
    ids = torch.arange(3, 3 + 12).view(2, 6) % (len(CHARACTERS) + 3)
    with torch.no_grad():
        return model(input_ids=ids).logits


def state_of(model):
    """All that `reference_adapter` must leave as it was."""
    return (
        model.active_adapter,
        model.active_adapters,
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        {name: getattr(module, "_active_adapter", None) for name, module in model.named_modules()},
    )


def move(model):
    """What training does to the policy."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_of_a_trained_adapter_is_its_frozen_copy(tmp_path, kind, name):
    model = adapted(KINDS[kind], name)
    initial, before = logits(model), state_of(model)
    assert adapters.prepare_adapters(model, None, make_args(tmp_path, gradient_checkpointing=False)) is model
    assert torch.equal(logits(model), initial), "adding the reference changed the policy"
    after = state_of(model)
    assert after[:2] == before[:2]
    assert {name: after[2][name] for name in before[2]} == before[2]
    assert not any(after[2][name] for name in after[2].keys() - before[2].keys()), "the reference is trainable"

    move(model)
    moved, before = logits(model), state_of(model)
    assert not torch.allclose(moved, initial)
    with adapters.reference_adapter(model):
        assert torch.equal(logits(model), initial)
    assert state_of(model) == before
    assert torch.equal(logits(model), moved)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])
def test_reference_of_a_new_adapter_is_the_base_model(tmp_path, kind):
    base = make_model().eval()
    initial = logits(base)
    model = adapters.prepare_adapters(base, KINDS[kind], make_args(tmp_path, gradient_checkpointing=False)).eval()
    assert list(model.peft_config) == ["default"]
    # the user's own choice of what trains is kept
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    if kind != "prompt":
        frozen.requires_grad_(False)
    move(model)
    before = state_of(model)
    with adapters.reference_adapter(model):
        assert torch.equal(logits(model), initial)
    assert state_of(model) == before
    assert not torch.equal(logits(model), initial)


def test_reference_adapter_comes_back_after_an_error_and_through_wrappers(tmp_path):
    model = adapted(KINDS["lora"])
    adapters.add_reference_adapter(model)
    before = state_of(model)
    with (
        pytest.raises(ValueError, match="wrap a PeftModel, it is a Sequential"),
        adapters.reference_adapter(torch.nn.Sequential()),
    ):
        pass
    wrapped = torch.nn.DataParallel(model)
    with pytest.raises(KeyError, match="ref"), adapters.reference_adapter(wrapped):
        raise KeyError(model.active_adapter)
    assert state_of(model) == before


def test_several_active_adapters(tmp_path):
    model = adapted(KINDS["lora"])
    adapters.add_reference_adapter(model)
    model.add_adapter("other", KINDS["lora"])
    model.base_model.set_adapter(["default", "other"])
    before = state_of(model)
    with adapters.reference_adapter(model):
        assert model.active_adapters == ["ref"]
    assert state_of(model) == before
    with pytest.raises(ValueError, match=r"one active adapter.*active are default, other"):
        adapters.add_reference_adapter(model)


def test_reference_of_an_earlier_trainer_is_replaced(tmp_path, caplog):
    model = adapted(KINDS["lora"])
    adapters.add_reference_adapter(model)
    move(model)
    second = logits(model)
    with caplog.at_level(logging.WARNING):
        adapters.add_reference_adapter(model)
    assert "'ref' is replaced" in caplog.text
    move(model)
    with adapters.reference_adapter(model):
        assert torch.equal(logits(model), second)
    model.set_adapter("ref")
    with pytest.raises(ValueError, match="not named 'ref'"):
        adapters.add_reference_adapter(model)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_checkpoints_hold_the_policy_only(tmp_path, name):
    model = adapted(KINDS["the head beside it"], name)
    adapters.prepare_adapters(model, None, make_args(tmp_path))
    move(model)
    model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / ("" if name == "default" else name)
    assert not list((tmp_path / "saved").glob("**/ref"))
    base = make_model(tie_word_embeddings=False)
    loaded = PeftModel.from_pretrained(base, folder, adapter_name=name).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    model.save_pretrained(tmp_path / "all", selected_adapters=["ref"])
    assert (tmp_path / "all" / "ref" / "adapter_model.safetensors").is_file(), "asked for by name"


def test_engine_gets_the_policy_without_its_reference(tmp_path):
    model = adapted(KINDS["the head beside it"])
    adapters.prepare_adapters(model, None, make_args(tmp_path))
    move(model)
    merged = make_model(tie_word_embeddings=False).eval()
    merged.load_state_dict(dict(named_weights(model)))
    # merged weights round once more
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.fill_(float("nan"))
    assert all(tensor.isfinite().all() for _, tensor in named_weights(model))


def test_wrong_arguments_are_named(tmp_path, monkeypatch):
    args = make_args(tmp_path)
    with pytest.raises(TypeError, match=r"peft_config must be a peft.PeftConfig .*it is a dict"):
        adapters.prepare_adapters(make_model(), {"r": 4}, args)
    with pytest.raises(ValueError, match="peft_config and a PeftModel"):
        adapters.prepare_adapters(adapted(KINDS["lora"]), KINDS["lora"], args)
    with pytest.raises(ValueError, match="covers the LM head"):
        adapters.prepare_adapters(make_model(), LoraConfig(target_modules=["lm_head"]), args)
    with pytest.raises(ValueError, match="covers the LM head"):
        adapters.prepare_adapters(adapted(LoraConfig(target_modules=["lm_head"])), None, args)
    folder = tmp_path / "adapter"
    adapted(KINDS["lora"]).save_pretrained(folder)
    with pytest.raises(ValueError, match="is_trainable=True"):
        adapters.prepare_adapters(PeftModel.from_pretrained(make_model(), folder), None, args)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "peft", None)
        with pytest.raises(ImportError, match="pip install peft"):
            adapters.prepare_adapters(make_model(), KINDS["lora"], args)


def test_old_peft_versions(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    placed = make_model()
    placed.hf_device_map = {"": "cpu"}
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"needs peft>=0.18.0, peft 0.17.1 is installed"):
        adapters.prepare_adapters(placed, prefix, make_args(tmp_path))
    model = adapted(KINDS["parameters"])
    with caplog.at_level(logging.WARNING):
        adapters.add_reference_adapter(model)
    assert "reference is the base model" in caplog.text
    assert list(model.peft_config) == ["default"]


def test_inputs_want_gradients_under_checkpointing_only(tmp_path):
    for wanted in (True, False):
        model = adapters.prepare_adapters(
            make_model(), KINDS["lora"], make_args(tmp_path, gradient_checkpointing=wanted)
        )
        hidden = model.get_input_embeddings()(torch.tensor([[3]]))
        assert hidden.requires_grad is wanted


def test_zero3_keeps_the_adapters_dtype_and_checkpoints_reentrantly(tmp_path, caplog):
    for stage, dtype in ((3, torch.bfloat16), (2, torch.float32)):
        args = make_args(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": False})
        args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
        with caplog.at_level(logging.WARNING):
            model = adapters.prepare_adapters(make_model().bfloat16(), KINDS["lora"], args)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert args.gradient_checkpointing_kwargs == {"use_reentrant": stage == 3}
    assert caplog.text.count("'use_reentrant'") == 1


def test_adapters_of_quantized_models_train_in_bf16_but_for_magnitudes(tmp_path):
    model = make_model()
    model.is_loaded_in_4bit = True
    model = adapters.prepare_adapters(model, KINDS["dora"], make_args(tmp_path))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_magnitude_vector" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.dtype == (torch.float32 if "lora_magnitude_vector" in name else torch.bfloat16), name
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.float32}


def test_a_model_without_adapters_is_left_alone(tmp_path):
    model = make_model()
    names = set(model.state_dict())
    assert adapters.prepare_adapters(model, None, make_args(tmp_path)) is model
    assert set(model.state_dict()) == names


@pytest.mark.trl
def test_reference_adapter_equals_trls(tmp_path):
    from trl.trainer.utils import use_adapter

    model = adapted(KINDS["the head beside it"])
    adapters.add_reference_adapter(model)
    move(model)
    with use_adapter(model, "ref"):
        theirs = logits(model)
    install_scoring(model)
    with adapters.reference_adapter(model):
        assert torch.equal(logits(model), theirs)
