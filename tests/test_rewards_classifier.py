"""Reward models as functions: what part of a completion they read, and the same scores as models given themselves."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import grpo_fast
from grpo_fast.rewards.classifier import ModelReward
from grpo_fast.trainer.overlap import MODELS
from tests.tiny_lm import CHARACTERS, CHAT_TEMPLATE, make_tokenizer, save

# fp32; the padding of another batch changes the order of sums
ATOL = 1e-6
PROMPTS = ["a=", "abc=", "b="]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
# unknown characters of the tags are one token each
THOUGHTS = ["<think>so 1</think>\n 22 ", "<think>never", "no tags"]


def save_classifier(folder, chat_template=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"vocab_size": len(CHARACTERS) + 3, "initializer_range": 0.3, "num_labels": 1, "eos_token_id": 1}
    LlamaForSequenceClassification(LlamaConfig(**sizes, **settings)).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


class Reader(nn.Module):
    """A score that is the number of tokens."""

    def forward(self, input_ids, attention_mask, **kwargs):
        return SimpleNamespace(logits=attention_mask.sum(1, keepdim=True).float())


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_the_summary_or_all():
    logged = {}
    whole = ModelReward(Reader(), make_tokenizer())
    summary = ModelReward(Reader(), make_tokenizer(), part="summary", no_summary=-1.0)
    assert whole(PROMPTS, THOUGHTS) == [len(p) + len(t) for p, t in zip(PROMPTS, THOUGHTS, strict=True)]
    assert summary(PROMPTS, THOUGHTS, log_metric=logged.__setitem__) == [2 + 2, -1.0, 2 + 7]
    assert logged == {"rewards/Reader_summary/no_summary": pytest.approx(1 / 3)}
    assert summary(["a<think>"], ["never"]) == [-1.0]
    assert ModelReward(Reader(), make_tokenizer(), part="summary")(["a"], ["<think>b"]) == [None]


def test_of_messages_the_last_is_cut_and_parsed_reasoning_left_out():
    reward = ModelReward(Reader(), make_tokenizer(CHAT_TEMPLATE), part="summary")
    chats = messages(THOUGHTS)
    chats[1] = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "reasoning_content": "hm", "content": "it is 9"},
    ]
    texts = ["u:a=\na:22\n", "u:abc=\na:call\nt:9\na:it is 9\n", "u:b=\na:no tags\n"]
    assert reward(CHATS, chats) == [len(text) for text in texts]
    assert chats[0][0]["content"] == THOUGHTS[0]


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
def test_scores_are_those_of_a_model_given_itself(tmp_path, conversational):
    folder = save_classifier(tmp_path / "org" / "harmless", CHAT_TEMPLATE)
    reward = ModelReward(folder)
    trainer = grpo_fast.GRPOTrainer(
        model=save(tmp_path / "policy"),
        reward_funcs=[folder, reward],
        args=grpo_fast.GRPOConfig(
            str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=3,
            num_generations=3,
            max_completion_length=4,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": CHATS[0] if conversational else PROMPTS[0]}]),
        processing_class=make_tokenizer(CHAT_TEMPLATE),
    )
    assert trainer.reward_func_names == ["harmless", "harmless"]
    prompts, completions = (CHATS, messages(THOUGHTS)) if conversational else (PROMPTS, THOUGHTS)
    inputs = [{"prompt": prompt} for prompt in prompts]
    rewards = trainer._calculate_rewards(inputs, prompts, completions, [[1]] * 3)
    torch.testing.assert_close(rewards[:, 0], rewards[:, 1], rtol=0, atol=ATOL)
    assert len(set(rewards[:, 0].tolist())) == 3
    trainer.train()
    copy = pickle.loads(pickle.dumps(reward))
    assert copy(prompts, completions) == pytest.approx(rewards[:, 1].tolist(), abs=ATOL)


def test_it_waits_for_the_batch_like_a_model():
    assert isinstance(ModelReward(Reader(), make_tokenizer()), MODELS)


def test_names_and_wrong_arguments():
    assert ModelReward("org/helpful", part="summary").__name__ == "helpful_summary"
    assert ModelReward("org/helpful", name="help").__name__ == "help"
    with pytest.raises(ValueError, match="helpful: part must be 'all' or 'summary', it is 'thought'"):
        ModelReward("org/helpful", part="thought")
    with pytest.raises(ValueError, match="Reader: processing_class is needed"):
        ModelReward(Reader())
