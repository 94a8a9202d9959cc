"""Reward models: loaded from wherever TRL loads them, scored as TRL scores them, whatever the batches."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import grpo_fast
from grpo_fast import GRPOConfig
from grpo_fast.rewards import make_rewards
from grpo_fast.rewards.models import longest_text, reward_texts, score_texts
from tests.tiny_lm import CHARACTERS, CHAT_TEMPLATE, make_tokenizer, save

# fp32; the padding of another batch changes the order of sums
RTOL, ATOL = 1e-5, 1e-6
PROMPTS = ["a=", "abc=", "abcdefgh=", "b="]
COMPLETIONS = ["1", "22", "333", "4444444"]
INPUTS = [{"prompt": prompt} for prompt in PROMPTS]
IDS = [[1]] * 4


def make_classifier(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(CHARACTERS) + 3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            attention_dropout=dropout,
            num_labels=1,
            pad_token_id=None,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def save_classifier(folder, seed=0, chat_template=None):
    """A reward model whose tokenizer, as many do, has no padding token."""
    make_classifier(seed).save_pretrained(folder)
    tokenizer = make_tokenizer(chat_template)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def config(tmp_path, **kwargs):
    return GRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", **kwargs)


def build(package, tmp_path, functions, model=None, *, processing_classes=None, conversational=False, **kwargs):
    prompt = [{"role": "user", "content": "a="}] if conversational else "a="
    settings = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True} | kwargs
    return package.GRPOTrainer(
        model=model or save(tmp_path / "policy"),
        reward_funcs=functions,
        reward_processing_classes=processing_classes,
        args=package.GRPOConfig(
            str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt}]),
        processing_class=make_tokenizer(CHAT_TEMPLATE),
    )


@pytest.mark.trl
@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
def test_scores_are_trls(tmp_path, conversational):
    import trl

    model = save(tmp_path / "policy")
    folder = save_classifier(tmp_path / "org" / "judge", chat_template=CHAT_TEMPLATE)
    prompts, completions = PROMPTS, COMPLETIONS
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
        completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    results, names, pads = [], [], []
    for package in (trl, grpo_fast):
        functions = [folder, by_length, make_classifier(seed=1)]
        classes = [None, None, make_tokenizer(CHAT_TEMPLATE)]
        trainer = build(package, tmp_path, functions, model, processing_classes=classes, conversational=conversational)
        results.append(trainer._calculate_rewards(INPUTS, prompts, completions, IDS))
        names.append(trainer.reward_func_names[:2])
        pads.append([trainer.reward_funcs[i].config.get_text_config().pad_token_id for i in (0, 2)])
    theirs, ours = results
    torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=ATOL)
    assert names[0] == names[1] == ["judge", "by_length"]
    # the end token where the tokenizer has no padding, else its own
    assert pads[0] == pads[1] == [1, 0]


def make_absolute():
    """A classifier with learned positions, which padding on the left would shift."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(CHARACTERS) + 3, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, initializer_range=0.3, num_labels=1))


@pytest.mark.parametrize("make", [make_classifier, make_absolute])
@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_batches_do_not_change_scores(make, rows_per_batch):
    model, tokenizer = make().eval(), make_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert longest_text(texts, tokenizer) == 12
    whole, parts = (
        score_texts(model, tokenizer, texts, rows_per_batch=rows, device=torch.device("cpu"))
        for rows in (len(texts), rows_per_batch)
    )
    torch.testing.assert_close(parts, whole, rtol=RTOL, atol=ATOL)
    with torch.no_grad():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
    torch.testing.assert_close(whole, torch.stack(alone), rtol=RTOL, atol=ATOL)
    assert len(set(whole.tolist())) == len(texts)


def test_chat_template_arguments_reach_the_texts():
    template = "{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}"
    chat = [[{"role": "user", "content": "a"}]]
    answer = [[{"role": "assistant", "content": "b"}]]
    settings = {"is_conversational": True, "chat_template_kwargs": {"mark": "-"}}
    assert reward_texts(chat, answer, make_tokenizer(template), **settings) == ["a-b-"]


def test_a_modules_training_mode_adds_no_noise(tmp_path):
    classifier = make_classifier(dropout=0.5).train()
    trainer = build(grpo_fast, tmp_path, classifier, processing_classes=make_tokenizer())
    scores = [trainer._calculate_rewards(INPUTS, PROMPTS, COMPLETIONS, IDS) for _ in range(2)]
    torch.testing.assert_close(*scores, rtol=0, atol=0)
    assert not trainer.reward_funcs[0].training


def test_a_module_of_ones_own_scores(tmp_path):
    class Counter(nn.Module):
        def forward(self, input_ids, attention_mask, **kwargs):
            return SimpleNamespace(logits=attention_mask.sum(1, keepdim=True).float())

    trainer = build(grpo_fast, tmp_path, [Counter()], processing_classes=[make_tokenizer()])
    assert trainer.reward_func_names == ["Counter"]
    rewards = trainer._calculate_rewards(INPUTS, PROMPTS, COMPLETIONS, IDS)
    assert rewards.flatten().tolist() == [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with pytest.raises(ValueError, match=r"reward_processing_classes\[0\] is needed: reward_funcs\[0\] \(Counter\)"):
        make_rewards([Counter()], None, config(tmp_path))


def test_a_failing_model_names_itself_and_the_step(tmp_path):
    class Broken(nn.Module):
        def forward(self, **kwargs):
            raise IndexError("out of range")

    trainer = build(grpo_fast, tmp_path, [Broken()], processing_classes=[make_tokenizer()])
    with pytest.raises(
        RuntimeError, match="'Broken' raised IndexError at step 0 on the batch as a whole: out of range"
    ):
        trainer._calculate_rewards(INPUTS, PROMPTS, COMPLETIONS, IDS)


def test_loading_follows_the_runs_settings_and_leaves_them_alone(tmp_path):
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    before = copy.deepcopy(args.model_init_kwargs)
    functions = [save_classifier(tmp_path / "judge")]
    rewards = make_rewards(functions, None, args)
    assert next(rewards.functions[0].parameters()).dtype == torch.bfloat16
    assert args.model_init_kwargs == before
    assert functions == [str(tmp_path / "judge")]
    assert rewards.processing_classes[0].pad_token == "<eos>"


def test_a_tokenizer_for_a_function_is_announced(tmp_path, caplog):
    make_rewards([by_length], [make_tokenizer()], config(tmp_path))
    assert "reward_processing_classes[0] is not used" in caplog.text


def test_a_run_with_a_model_and_a_function(tmp_path):
    folder = save_classifier(tmp_path / "judge")
    trainer = build(grpo_fast, tmp_path, [folder, by_length], reward_weights=[1.0, 0.5])
    trainer.train()
    line = trainer.state.log_history[0]
    expected = line["rewards/judge/mean"] + 0.5 * line["rewards/by_length/mean"]
    assert line["reward"] == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in trainer.reward_funcs[0].parameters())
