"""Config classes of transformers for models with latent attention: keys, defaults, plain values.

Sources: as hf_moe_keys.py. Data only.
"""

from __future__ import annotations

from weights_conversion.configs.config_class import ConfigClass, ExpertKeys
from weights_conversion.configs.hf_moe_keys import ALL, COUNTED, FIELDS, IDLE, OFF, SIGMOID, SILU

_DEEPSEEK = {
    **ALL,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
}

DEEPSEEK_V2 = ConfigClass(
    FIELDS,
    {
        **_DEEPSEEK,
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # as many as heads
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "head_dim": None,  # qk_rope_head_dim
        "first_k_dense_replace": 0,
        "n_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_group": None,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_experts_per_tok": None,
        "moe_intermediate_size": 1407,
    },
    {
        "hidden_act": SILU,
        "attention_bias": OFF,
        "mlp_bias": OFF,
        "norm_topk_prob": OFF,  # not read by transformers, and by the source's own code
        "scoring_func": ("softmax", None),
        "topk_method": ("greedy", "group_limited_greedy"),
        "moe_layer_freq": (1, None),
    },
    aliases=(("n_routed_experts", "num_experts"),),
    idle=IDLE | {"qk_head_dim"},
    written={"scoring_func": "softmax", "moe_layer_freq": 1},
    experts=ExpertKeys(
        ("n_routed_experts",), layers="first", norm=False, scaled=True, groups="method", shared="n_shared_experts",
    ),
    latent=True,
)  # fmt: skip
DEEPSEEK_V3 = ConfigClass(
    FIELDS,
    {
        **_DEEPSEEK,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "rope_interleave": True,
    },
    {
        "hidden_act": SILU,
        "attention_bias": OFF,
        "rope_interleave": (True, None),
        "moe_layer_freq": (1, None),
        **SIGMOID,
    },
    aliases=COUNTED,
    idle=IDLE | {"qk_head_dim", "head_dim"},
    written={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    experts=ExpertKeys(
        ("n_routed_experts",), layers="first", score="sigmoid", scaled=True, groups="always", shared="n_shared_experts",
        bias=True,
    ),
    latent=True,
)  # fmt: skip
GLM4_MOE_LITE = ConfigClass(
    FIELDS,
    {
        **_DEEPSEEK,
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "moe_intermediate_size": 1536,
        "n_shared_experts": 1,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rope_interleave": True,
        "mlp_layer_types": None,  # the first is dense, the others are not
    },
    {"hidden_act": SILU, "attention_bias": OFF, "rope_interleave": (True, None), **SIGMOID},
    aliases=COUNTED,
    idle=IDLE | {"qk_head_dim", "head_dim", "first_k_dense_replace"},
    experts=ExpertKeys(
        ("n_routed_experts",), layers="types", score="sigmoid", scaled=True, groups="always", shared="n_shared_experts",
        bias=True,
    ),
    latent=True,
)  # fmt: skip
LATENT_CLASSES = {
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
}
