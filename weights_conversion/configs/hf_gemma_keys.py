"""The config class of transformers for Gemma 3's text models: keys, defaults, plain values. Data only.

Sources: configuration_gemma3.py of transformers 4.57 and 5.24, and the configs on the hub.
"""

from __future__ import annotations

from weights_conversion.configs.config_class import ConfigClass
from weights_conversion.configs.hf_moe_keys import FIELDS, OFF

_WRITTEN = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GEMMA3_TEXT = ConfigClass(
    FIELDS,
    {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    {
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": OFF,
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": OFF,  # which EmbeddingGemma has
    },
    idle=frozenset({"_sliding_window_pattern", "cache_implementation"}),  # the first is an echo that nothing reads
    written=_WRITTEN,
    mixed_windows=True,
    local_rope=True,
)
GEMMA_CLASSES = {"Gemma3ForCausalLM": GEMMA3_TEXT}
