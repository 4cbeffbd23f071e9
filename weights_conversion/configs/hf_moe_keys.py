"""Config classes of transformers for models with experts: keys, defaults, plain values.

Sources: configuration_*.py of transformers 4.57 and 5.24, and the configs on the hub, which have keys for code of their
own. Data only.
"""

from __future__ import annotations

from typing import Any

from weights_conversion.configs.config_class import ConfigClass, ExpertKeys

FIELDS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings",),
    "layernorm_epsilon": ("rms_norm_eps",),
}
SILU = ("silu", "swish")  # two names of one function
OFF = (False, None)
ALL: dict[str, Any] = {
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "output_router_logits": False,
}
IDLE = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "max_window_layers", "router_aux_loss_coef"})
_QWEN = {
    **ALL,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,  # read where use_sliding_window is true
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "mlp_only_layers": None,
}

MIXTRAL = ConfigClass(
    FIELDS,
    {
        **ALL,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,  # hidden_size / heads
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,  # in training alone
    },
    {"hidden_act": SILU},
    aliases=(("num_local_experts", "num_experts"),),
    experts=ExpertKeys(("num_local_experts",), ffn="intermediate_size", norm=True),
)
QWEN2_MOE = ConfigClass(
    FIELDS,
    {
        **_QWEN,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    {"hidden_act": SILU, "use_sliding_window": OFF},
    flags={"add_qkv_bias": "qkv_bias"},
    idle=IDLE,
    experts=ExpertKeys(("num_experts",), layers="step", shared="shared_expert_intermediate_size", gate=True),
)
QWEN3_MOE = ConfigClass(
    FIELDS,
    {
        **_QWEN,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    # Qwen3-Coder's files say that q and k have norms, as they have in every model of this class
    {"hidden_act": SILU, "attention_bias": OFF, "use_qk_norm": (True, None)},
    # 5.24 writes the second alone, which 4.57 does not know
    aliases=(("num_experts", "num_local_experts"),),
    idle=IDLE,
    experts=ExpertKeys(("num_experts", "num_local_experts"), layers="step"),
    window_switch="use_sliding_window",
)
SIGMOID = {"scoring_func": ("sigmoid", None), "topk_method": ("noaux_tc", None)}
COUNTED = (("n_routed_experts", "num_local_experts"), ("num_nextn_predict_layers", "num_mtp_layers"))
GLM4_MOE = ConfigClass(
    FIELDS,
    {
        **ALL,
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,  # of q, k and v alone
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
    },
    {"hidden_act": SILU, **SIGMOID},
    flags={"add_qkv_bias": "attention_bias", "qk_layernorm": "use_qk_norm"},
    aliases=COUNTED,
    idle=IDLE,
    experts=ExpertKeys(
        ("n_routed_experts",), layers="first", score="sigmoid", scaled=True, groups="always", shared="n_shared_experts",
        bias=True,
    ),
    rotary_percent=0.5,
)  # fmt: skip
GPT_OSS = ConfigClass(
    FIELDS,
    {
        **ALL,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "layer_types": None,  # every other layer, from the first on, has the window
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,  # 5.12 and older have constants for this and the next
        "swiglu_limit": 7.0,
    },
    {"hidden_act": SILU, "attention_bias": (True,), "swiglu_alpha": (1.702, None)},
    aliases=(("num_local_experts", "num_experts"), ("num_experts_per_tok", "experts_per_token")),
    idle=IDLE | {"initial_context_length"},
    written={"attention_bias": True, "initial_context_length": 4096},
    experts=ExpertKeys(("num_local_experts",), ffn="intermediate_size", norm=True, biased=True, clamp="swiglu_limit"),
    mixed_windows=True,
    rope={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)  # fmt: skip
MOE_CLASSES = {
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "GptOssForCausalLM": GPT_OSS,
}
