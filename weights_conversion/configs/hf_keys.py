"""What transformers' config classes read from a config.json: keys, defaults, and what our families have. Data only.

A class is the one of `Family.hf_class`. Defaults are those of transformers 4.57 and 5, which a test compares with the
installed release: where a key is absent, transformers' default is what the model is.
"""

from __future__ import annotations

from weights_conversion.configs.config_class import ConfigClass
from weights_conversion.configs.hf_delta_keys import DELTA_CLASSES
from weights_conversion.configs.hf_gemma_keys import GEMMA_CLASSES
from weights_conversion.configs.hf_hybrid_keys import HYBRID_CLASSES
from weights_conversion.configs.hf_latent_keys import LATENT_CLASSES
from weights_conversion.configs.hf_moe_keys import MOE_CLASSES

_LLAMA_FIELDS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings",),
    "layernorm_epsilon": ("rms_norm_eps",),
}
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL = {key: value for key, value in _LLAMA.items() if key not in ("attention_bias", "mlp_bias")} | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = {key: value for key, value in _LLAMA.items() if key not in ("attention_bias", "mlp_bias", "head_dim")} | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,  # read where use_sliding_window is true
    "max_window_layers": 28,  # likewise
}
_SILU = ("silu", "swish")  # two names of one function

CONFIG_CLASSES: dict[str, ConfigClass] = {
    "LlamaForCausalLM": ConfigClass(
        _LLAMA_FIELDS,
        _LLAMA,
        {"hidden_act": _SILU, "attention_bias": (False, None), "mlp_bias": (False, None)},
        whole_heads=True,
    ),
    "MistralForCausalLM": ConfigClass(_LLAMA_FIELDS, _MISTRAL, {"hidden_act": _SILU}),
    "Qwen2ForCausalLM": ConfigClass(_LLAMA_FIELDS, _QWEN2, {"hidden_act": _SILU, "use_sliding_window": (False, None)}),
    "Qwen3ForCausalLM": ConfigClass(
        _LLAMA_FIELDS,
        _QWEN2 | {"head_dim": 128, "attention_bias": False},
        {"hidden_act": _SILU, "use_sliding_window": (False, None), "attention_bias": (False, None)},
    ),
    "FalconForCausalLM": ConfigClass(
        {
            "num_layers": ("num_hidden_layers", "n_layer"),
            "hidden_size": ("hidden_size", "n_embed"),
            "num_attention_heads": ("num_attention_heads", "n_head"),
            "vocab_size": ("vocab_size",),
            "layernorm_epsilon": ("layer_norm_epsilon",),
        },
        {
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_ln_in_parallel_attn": None,  # two in the new architecture, else one
            "layer_norm_epsilon": 1e-5,
            "num_kv_heads": None,  # as many as heads
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "ffn_hidden_size": None,  # four times hidden_size
            "activation": "gelu",
            "tie_word_embeddings": True,
        },
        {"activation": ("gelu",), "hidden_act": ("gelu", None), "alibi": (False, None), "bias": (False, None)},
    ),
    **MOE_CLASSES,
    **LATENT_CLASSES,
    **HYBRID_CLASSES,
    **DELTA_CLASSES,
    **GEMMA_CLASSES,
}
# What every config may state beside: token ids, how to load and to sample, training. None of it is of the forward pass.
_GENERIC = """architectures model_type dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id
    pad_token_id
    unk_token_id sep_token_id decoder_start_token_id initializer_range pretraining_tp attention_dropout hidden_dropout
    hidden_act return_dict output_attentions output_hidden_states torchscript use_bfloat16 pruned_heads prefix
    tie_encoder_decoder chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size id2label label2id problem_type finetuning_task task_specific_params max_length
    min_length do_sample early_stopping num_beams num_beam_groups num_return_sequences diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    forced_bos_token_id
    forced_eos_token_id return_dict_in_generate output_scores tf_legacy_loss max_sequence_length max_seq_len
    model_max_length attn_implementation quantization_config compression_config unsloth_version unsloth_fixed
    apply_residual_connection_post_layernorm"""
GENERIC = frozenset(_GENERIC.split())
