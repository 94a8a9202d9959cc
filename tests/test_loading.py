import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from grpo_fast import GRPOConfig, loading
from grpo_fast.attention import can_pack, packed_attention
from grpo_fast.packing import pack_rows
from grpo_fast.padding import pad_rows
from grpo_fast.policy import install_scoring, score
from tests import tiny_vlm
from tests.tiny_lm import make_model, make_tokenizer, save
from tests.tiny_models import falcon, qwen2

# a bf16 head rounds a logit of size 4 by up to 2^-7; an fp32 one is exact to 1e-5
FP32_HEAD = 1e-4


def make_args(tmp_path, **kwargs):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"} | kwargs
    return GRPOConfig(str(tmp_path / "out"), **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "{{ messages }}")


@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        (None, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "auto"}, torch.float32),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16, "dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_model_has_the_dtype_asked_for(tmp_path, saved, kwargs, dtype):
    before = copy.copy(kwargs)
    model = loading.load_model(saved, make_args(tmp_path, model_init_kwargs=kwargs))
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == dtype
    assert kwargs == before, "the user's dict was changed"


def test_model_init_kwargs_reach_the_model(tmp_path, saved):
    kwargs = {"attn_implementation": "eager", "trust_remote_code": True, "rms_norm_eps": 0.5}
    model = loading.load_model(saved, make_args(tmp_path, model_init_kwargs=kwargs))
    assert model.config._attn_implementation == "eager"
    assert model.config.rms_norm_eps == 0.5


def test_wrong_model_init_kwargs_are_named(tmp_path, saved):
    cases = [
        ({"dtype": "bf16"}, r"model_init_kwargs\['dtype'\] must be .*bfloat16.* it is 'bf16'"),
        ({"dtype": 16}, "it is 16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype='float32' and, .* torch_dtype='bfloat16'"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            loading.load_model(saved, make_args(tmp_path, model_init_kwargs=kwargs))
    with pytest.raises(ValueError, match="quantization_config is given twice"):
        loading.load_model(saved, make_args(tmp_path, model_init_kwargs={"quantization_config": {}}), {})


def test_device_map(tmp_path, caplog):
    def device_map(kwargs, **device):
        values = {"type": "cuda", "processes": 1, "distributed": "NO"} | device
        args = SimpleNamespace(
            device=SimpleNamespace(type=values["type"]),
            distributed_state=SimpleNamespace(
                num_processes=values["processes"], distributed_type=values["distributed"]
            ),
        )
        return loading._device_map(kwargs, args)

    assert device_map({}) == "auto"
    assert device_map({"device_map": {"": 0}}) == {"": 0}
    assert device_map({"device_map": None}) is None
    assert device_map({}, type="cpu") is None
    assert device_map({}, type="mps") is None
    assert device_map({"device_map": "cpu"}, type="cpu") == "cpu"
    assert device_map({}, processes=2) is None
    assert device_map({}, distributed="DEEPSPEED") is None
    with caplog.at_level(logging.WARNING):
        assert device_map({"device_map": "auto"}, processes=2) is None
    assert "model_init_kwargs['device_map']='auto' is ignored" in caplog.text


def test_settings_that_an_instance_ignores_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        loading.warn_of_ignored_settings(make_args(tmp_path))
        assert not caplog.records
        loading.warn_of_ignored_settings(make_args(tmp_path, model_init_kwargs={"dtype": "auto"}), {"bits": 4})
    assert [record.args[0] for record in caplog.records] == ["model_init_kwargs", "quantization_config"]


def test_config_names_the_class(tmp_path, saved):
    config = transformers.AutoConfig.from_pretrained(saved)
    config.architectures = ["MistralForCausalLM"]
    assert loading._architecture("m", config) is transformers.MistralForCausalLM
    for absent in (None, [], ["TheirOwnForCausalLM"]):
        config.architectures = absent
        assert loading._architecture("m", config) is transformers.AutoModelForCausalLM
    config.auto_map = {"AutoModelForCausalLM": "code.Theirs", "AutoModelForImageTextToText": "code.Theirs"}
    assert loading._architecture("m", config) is transformers.AutoModelForImageTextToText
    config.architectures = ["LlamaForSequenceClassification"]
    with pytest.raises(ValueError, match=r"generates text; its config names .*LlamaForSequenceClassification"):
        loading._architecture("m", config)


def test_vision_language_model_and_its_processor(tmp_path):
    folder = tiny_vlm.save(tmp_path / "llava", "llava")
    args = make_args(tmp_path)
    model = loading.load_model(folder, args)
    assert type(model) is transformers.LlavaForConditionalGeneration
    processor = loading.load_processing_class(folder, args)
    assert type(processor) is transformers.LlavaProcessor
    tokenizer = loading.prepare_tokenizer(processor)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")
    assert tokenizer is processor.tokenizer
    tokenizer.pad_token = "<unk>"
    loading.mirror_pad_token(model, tokenizer)
    assert model.config.get_text_config().pad_token_id == tokenizer.unk_token_id
    assert model.generation_config.pad_token_id == tokenizer.unk_token_id
    loading.find_unused_parameters(args)
    assert args.ddp_find_unused_parameters is True
    for kept in (
        {"ddp_find_unused_parameters": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ):
        args = make_args(tmp_path, **kept)
        loading.find_unused_parameters(args)
        assert not args.ddp_find_unused_parameters


def test_processing_class_of_a_text_model_is_a_tokenizer(tmp_path, saved):
    for model in (saved, loading.load_model(saved, make_args(tmp_path))):
        tokenizer = loading.load_processing_class(model, make_args(tmp_path))
        assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
        assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")
        assert tokenizer.chat_template == "{{ messages }}"


def test_revision_is_of_what_was_loaded_by_name(tmp_path, saved, monkeypatch):
    asked = []
    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", lambda name, **kwargs: asked.append(kwargs))
    args = make_args(tmp_path, model_init_kwargs={"revision": "r1", "dtype": "auto"}, trust_remote_code=True)
    loading.load_processing_class(saved, args)
    loading.load_processing_class(loading.load_model(saved, make_args(tmp_path)), args)
    sides = {"truncation_side": "left", "padding_side": "left", "trust_remote_code": True}
    assert asked == [sides | {"revision": "r1"}, sides]


def test_missing_folders_are_named_before_anything_is_loaded(tmp_path, saved):
    args = make_args(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nowhere': the folder does not exist"):
        loading.load_model(str(tmp_path / "nowhere"), args)
    with pytest.raises(ValueError, match=r"empty': the folder has no config.json"):
        loading.load_model(str(tmp_path / "empty"), args)
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter only .*AutoPeftModelForCausalLM"):
        loading.load_model(str(tmp_path / "adapter"), args)
    with pytest.raises(ValueError, match=r"processing_class must be given: .*empty"):
        loading.load_processing_class(str(tmp_path / "empty"), args)
    with pytest.raises(ValueError, match="processing_class must be given: the model was not loaded"):
        loading.load_processing_class(make_model(), args)


def test_processing_class_is_checked():
    for wrong in ("tokenizer", make_model(), None):
        with pytest.raises(TypeError, match=f"tokenizer or a processor, it is a {type(wrong).__name__}"):
            loading.prepare_tokenizer(wrong)
    tokenizer = make_tokenizer()
    assert loading.prepare_tokenizer(tokenizer).pad_token == "<pad>"
    tokenizer.pad_token = None
    assert loading.prepare_tokenizer(tokenizer).pad_token == "<eos>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="pad_token or an eos_token"):
        loading.prepare_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("declared", "expected"), [(None, [1]), (1, [1]), (5, [1, 5]), ([5, 1, 6], [5, 1, 6]), ([6, 5], [1, 6, 5])]
)
def test_every_declared_end_token_ends_a_completion(declared, expected):
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = declared
    assert loading.eos_token_ids(model, tokenizer) == expected
    assert model.generation_config.eos_token_id == declared
    tokenizer.eos_token = None
    assert loading.eos_token_ids(model, tokenizer) == [
        i for i in expected if i in ([declared] if isinstance(declared, int) else declared or [])
    ]


def test_data_parallel_is_refused(tmp_path):
    args = make_args(tmp_path)
    loading.refuse_data_parallel(args)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="sees 2 GPUs"):
        loading.refuse_data_parallel(args)


def test_disabled_dropout_makes_training_mode_deterministic():
    def losses(model):
        ids = torch.arange(3, 11)[None]
        return [model(input_ids=ids, labels=ids).loss.item() for _ in range(2)]

    models = {
        "attention's number": make_model(attention_dropout=0.5),
        "layers": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=1)
        ),
        "numbers in modules": transformers.OPTForCausalLM(
            transformers.OPTConfig(
                hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
                word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        ),
        "an adapter": get_peft_model(
            make_model(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.train()
        assert len(set(losses(model))) == 2, f"{name}: nothing to disable"
        loading.disable_dropout(model)
        assert len(set(losses(model))) == 1, name
    assert can_pack(models["attention's number"]) is None
    assert models["attention's number"].config.rms_norm_eps > 0, "only dropouts are zeroed"


def reference_logps(model, rows):
    """Scores from the model's own hidden states, in its dtype, and a head in fp32."""
    with torch.no_grad():
        hidden = model.get_decoder()(**rows.model_inputs)[0].flatten(0, 1)[rows.predict].float()
        with torch.autocast("cpu", enabled=False):
            logits = hidden @ model.get_output_embeddings().weight.float().T
    return logits.log_softmax(-1).gather(-1, rows.targets[:, None])[:, 0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_head_in_fp32(tied, autocast):
    model = qwen2(tied=tied).eval()
    model = model if autocast else model.bfloat16()
    (rows,) = pad_rows([[5, 6, 7]] * 2, [[8, 9, 10], [11, 12]], max_tokens=64)
    input_ids = rows.model_inputs["input_ids"][:1]
    embedding = model.get_input_embeddings().weight
    install_scoring(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model(input_ids=input_ids).logits
        loading.cast_lm_head_to_fp32(model)
        hidden = model.get_decoder()(input_ids=input_ids)[0]
        logits = model(input_ids=input_ids).logits
        expected = reference_logps(model, rows)
        for copied in (model, copy.deepcopy(model)):
            logps = score(copied, rows, temperature=1.0)[0]
            assert logps.dtype == torch.float32
            assert (logps - expected).abs().max() < FP32_HEAD
    assert before.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    head = model.get_output_embeddings()
    assert torch.equal(logits, hidden.float() @ head.weight.T)
    assert head.weight.dtype == torch.float32
    assert hidden.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert (model.get_input_embeddings().weight is head.weight) is tied
    assert model.get_input_embeddings().weight is embedding, "an optimizer may hold the parameter"
    assert embedding.dtype == (torch.float32 if tied or autocast else torch.bfloat16)


def test_head_in_fp32_trains_and_generates():
    model = make_model().bfloat16().train()
    install_scoring(model)
    loading.cast_lm_head_to_fp32(model)
    loading.cast_lm_head_to_fp32(model)
    (pack,) = pack_rows([[5, 6, 7]] * 2, [[8, 9, 10], [11, 12]], max_tokens=64, share_prompts=True)
    with packed_attention(model):
        logps = score(model, pack, temperature=1.0)[0]
        logps.sum().backward()
    head = model.get_output_embeddings().weight
    assert head.grad is not None
    assert head.grad.dtype == torch.float32
    assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, 6)


def test_head_in_fp32_beside_adapters():
    saved = get_peft_model(make_model().bfloat16(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    install_scoring(saved)
    loading.cast_lm_head_to_fp32(saved)
    head = saved.get_base_model().get_output_embeddings()
    assert head.original_module.weight.dtype == head.modules_to_save["default"].weight.dtype == torch.float32
    assert saved(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32
    covered = get_peft_model(make_model(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32=True needs an LM head without an adapter"):
        loading.cast_lm_head_to_fp32(covered)


@pytest.mark.trl
def test_loaded_models_equal_trls(tmp_path, saved):
    from trl.trainer.utils import create_model_from_path

    for kwargs in ({}, {"dtype": "bfloat16"}, {"attn_implementation": "eager"}):
        theirs = create_model_from_path(saved, **kwargs)
        ours = loading.load_model(saved, make_args(tmp_path, model_init_kwargs=kwargs))
        assert type(ours) is type(theirs)
        assert ours.config._attn_implementation == theirs.config._attn_implementation
        for (name, own), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert own.dtype == other.dtype, name
            assert torch.equal(own, other), name


@pytest.mark.trl
def test_dropout_layers_are_those_trl_zeroes(tmp_path):
    from trl.trainer.utils import disable_dropout_in_model

    for ours, theirs in ((falcon(), falcon()), (make_model(), make_model())):
        loading.disable_dropout(ours)
        disable_dropout_in_model(theirs)
        for (name, own), other in zip(ours.named_modules(), theirs.modules(), strict=True):
            if isinstance(other, torch.nn.Dropout):
                assert own.p == other.p == 0, name
