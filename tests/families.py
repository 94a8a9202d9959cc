"""Every causal LM of transformers as small as it gets, and how its rows run."""

from __future__ import annotations

import copy
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny_models import build

# given to every config that has a field of the name; windows, blocks and chunks are shorter than the tests' rows
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    # attention over a part of the row
    "sliding_window": 5,
    "attention_chunk_size": 4,
    "index_topk": 3,
    # enough heads for no two keys to be equally good to a query: which of them is taken depends on the row's width
    "index_n_heads": 8,
    "index_head_dim": 16,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # recurrent states
    "state_size": 4,
    "chunk_size": 4,
    "mamba_n_heads": 8,
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
    "mamba_d_head": "auto",
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # decoders of encoder-decoders
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
}

_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4}
_ALTERNATING = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
_CAPPED = _MIXED | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# what a config needs beside SIZES, or has to show: scales, caps, windows, mixed layers
OWN: dict[str, dict[str, Any]] = {
    "afmoe": _MIXED,
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": _MIXED | {"logit_scale": 0.25},
    "cohere2_moe": _MIXED,
    "cohere_compass_text": _MIXED
    | {"rope_parameters": dict.fromkeys(_MIXED["layer_types"], _ROPE | {"mrope_section": [1, 1, 2]})},
    "cpmant": {"dim_ff": 48, "dim_head": 8, "init_std": 0.2},
    "ctrl": {"dff": 48},
    "cwm": _MIXED,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": _MIXED | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "exaone4": _MIXED,
    "exaone_moe": _MIXED | {"mlp_layer_types": ["dense", "sparse"]},
    "falcon": {"alibi": True},
    "gemma2": _CAPPED,
    "gemma3_text": _MIXED,
    "gemma3n_text": _MIXED
    | {
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    },
    "gemma4_text": _MIXED | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    "gemma4_unified_text": _MIXED,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "granite_swa": {"initializer_range": 0.1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "hy_v4": _LATENT | {"hc_mult": 2, "initializer_range": 0.1},
    "hyperclovax": {"logits_scaling": 0.3},
    "inkling_text": {
        "local_layer_ids": [0],
        "sliding_window_size": 5,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 4,
        "rel_extent": 16,
        "n_shared_experts": 1,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "kimi_linear": _LATENT | {"linear_head_dim": 8, "linear_num_heads": 4, "initializer_range": 0.1},
    "laguna": _MIXED,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        "floor_scale": 4,
        "intermediate_size_mlp": 48,
    },
    "longcat_flash": _LATENT
    | {
        "num_layers": 1,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": _MIXED,
    "minicpm3": _LATENT | {"dim_model_base": 16},
    "minimax": _LINEAR | {"block_size": 4},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
    },
    "ministral": _MIXED,
    "ministral3": {
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4},
    },
    "modernbert-decoder": _MIXED | {"local_attention": 10},
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron_h": {
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo3": _MIXED,
    "olmo_hybrid": _LINEAR | {"linear_num_key_heads": 4},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2": _MIXED | {"use_sliding_window": True},
    "qwen3": _MIXED | {"use_sliding_window": True},
    "qwen3_5_moe_text": _LINEAR | {"initializer_range": 0.1},
    "qwen3_5_text": _LINEAR | {"initializer_range": 0.1},
    "qwen3_next": _LINEAR | {"initializer_range": 0.1},
    "qwen4_exp_text": _LINEAR
    | {
        "initializer_range": 0.1,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 97,
        "make_ngram_vocab_size_divisible_by": 1,
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"attention_window_size": 5, "lru_width": 32, "logits_soft_cap": 3.0},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 97,
        "shape_vocab_size": 97,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "smollm3": _MIXED | {"use_sliding_window": True},
    "vaultgemma": _CAPPED,
    "xlm": {"causal": True, "embed_init_std": 0.2, "init_std": 0.2},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "output_logit_soft_cap": 3.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": _ALTERNATING | {"initializer_range": 0.1},
    "zamba2": _ALTERNATING | {"n_mamba_heads": 8, "initializer_range": 0.1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

# rows run packed, and share prompts
PACKED = """
    afmoe apertus arcee aria_text axk1 bert-generation bitnet cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm
    dbrx deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2
    gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode
    gpt_neox granite granitemoe granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2
    jetmoe laguna llama longcat_flash mellum minicpm3 minimax_m2 ministral ministral3 mistral mixtral nanochat olmo
    olmo2 olmo3 olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2
    vaultgemma youtu
"""

# rows run padded, sorted by length: a part of the reason, and the families it holds for
PADDED = {
    "carries a recurrent state": """
        bamba deepseek_v4 falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 nemotron_h olmo_hybrid
        qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya
    """,
    "layers of type conv": "lfm2 lfm2_moe",
    "layers of type hybrid, hybrid_sliding": "inkling_text",
    "layers of type linear_attention": "minimax",
    "layers of type chunked_attention": "llama4_text",
    "layers of type indexed_attention": "axk2 deepseek_v32 glm_moe_dsa hy_v4",
    "layers of type minimax_m3_sparse": "minimax_m3_vl_text",
    "has attention sinks": "gpt_oss granite_swa granitemoe_swa mimo_v2_flash",
    "does not take its attention from transformers' AttentionInterface": """
        bart bigbird_pegasus biogpt blenderbot blenderbot-small bloom codegen falcon gpt_neo gpt_neox_japanese gptj
        marian mbart mpt mvp openai-gpt pegasus plbart stablelm trocr whisper xglm xlm
    """,
    "does not hand keywords down to its layers": "moshi nemotron",
    "attention_mask must be None in DogeAttention": "doge",
    "PhimoeAttention must be given the window of its mask": "phimoe",
}

# no log-probs at all: what stands between the decoder and the logits, or between tokens
REFUSED = {
    "layers between the decoder and its output embedding": """
        bert big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder rembert roberta
        roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod
    """,
    "tokens see later ones": "cpmant xlnet",
    "logits of a second stream of tokens": "prophetnet",
    "attention by random hashes of a padded row": "reformer",
}

# images, audio or bytes: `tests.tiny_vlm` has those that the trainer takes
NOT_TEXT = """
    blt emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 llama4
    mllama musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp
"""


def by_family(table: dict[str, str]) -> dict[str, str]:
    """Each family's reason."""
    return {family: reason for reason, families in table.items() for family in families.split()}


def make_family(model_type: str) -> PreTrainedModel:
    """A model of two layers or a few more, without dropout."""
    kind = CONFIG_MAPPING[model_type]
    fields = {*kind.__dataclass_fields__, *kind.attribute_map}
    sizes = {kind.attribute_map.get(name, name): value for name, value in SIZES.items() if name in fields}
    dropouts = {name: 0.0 for name in kind.__dataclass_fields__ if "drop" in name and name != "classifier_dropout"}
    config = kind(**sizes | dropouts | OWN.get(model_type, {}))
    if "attn_logit_softcapping" in OWN.get(model_type, {}):
        # torch's own attention would leave out the cap on scores
        config._attn_implementation = "eager"
    return build(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]), config)


def exact_copy(model: PreTrainedModel) -> Any:
    """The model in float64, its experts one by one: grouped matrix products have no float64."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    return exact
