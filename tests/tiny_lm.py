"""A tiny language model with a tokenizer of single characters, random or saved as a folder."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = string.ascii_lowercase + string.digits + " =+-.:\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def make_tokenizer(chat_template=None):
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=chat_template,
    )


def make_model(seed=0, **kwargs):
    """A 2-layer Llama whose weights are large enough for a policy that is not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(CHARACTERS) + 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        | kwargs
    )
    return LlamaForCausalLM(config)


def save(folder, chat_template=None, **kwargs):
    """Write model and tokenizer into `folder` and return it as a string."""
    make_model(**kwargs).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return str(folder)
