"""Config classes of transformers for models with layers of gated delta: Qwen3-Next, Qwen3.5 and 3.6. Data only.

Sources: configuration_*.py of transformers 4.57 and 5.24, and the configs on the hub.
"""

from __future__ import annotations

from typing import Any

from weights_conversion.configs.config_class import ConfigClass, ExpertKeys
from weights_conversion.configs.hf_moe_keys import FIELDS, IDLE, OFF, SILU

_ALL: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 2048,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,  # by full_attention_interval
}
_EXPERTS = {
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_QWEN3_5 = _ALL | {"vocab_size": 248320}
# The part of an image or a video that a rotary pair turns with: of text all three are the same.
_MROPE = ("mrope_section", "mrope_interleaved")
_PLAIN = {"hidden_act": SILU, "attention_bias": OFF, "attn_output_gate": (True, None)}
_MTP = (("mtp_num_hidden_layers",),)
# Of the hub's configs: types that serving keeps states in, an option of prediction layers that is off.
_KEPT = IDLE | {"mamba_ssm_dtype", "full_attention_interval"}

QWEN3_NEXT = ConfigClass(
    FIELDS,
    {
        **_ALL,
        **_EXPERTS,
        "vocab_size": 151936,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
    },
    {"hidden_act": SILU, "use_sliding_window": OFF, "attention_bias": OFF},
    idle=_KEPT,
    experts=ExpertKeys(("num_experts",), layers="step", shared="shared_expert_intermediate_size", gate=True),
    rotary_percent=0.25,
    gated_delta=True,
    mtp_apart=True,
)
QWEN3_5 = ConfigClass(
    FIELDS,
    {**_QWEN3_5, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_key_value_heads": 4},
    {**_PLAIN, "mtp_use_dedicated_embeddings": OFF, "mlp_only_layers": (None, [])},
    aliases=_MTP,
    idle=_KEPT,
    rotary_percent=0.25,
    gated_delta=True,
    mtp_apart=True,
    rope_idle=_MROPE,
    written={"attn_output_gate": True, "mamba_ssm_dtype": "float32"},
)
QWEN3_5_MOE = ConfigClass(
    {**FIELDS, "ffn_hidden_size": ("moe_intermediate_size",)},  # no layer is dense
    {**_QWEN3_5, **_EXPERTS, "num_hidden_layers": 40, "num_experts_per_tok": 8, "num_experts": 256},
    {**_PLAIN, "mtp_use_dedicated_embeddings": OFF, "mlp_only_layers": (None, []), "decoder_sparse_step": (1, None)},
    aliases=_MTP,
    idle=_KEPT,
    experts=ExpertKeys(("num_experts",), norm=True, shared="shared_expert_intermediate_size", gate=True),
    rotary_percent=0.25,
    gated_delta=True,
    mtp_apart=True,
    rope_idle=_MROPE,
    written={"attn_output_gate": True, "mamba_ssm_dtype": "float32"},
)
DELTA_CLASSES = {
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
}
