"""Config classes of transformers for models whose layers are one sub-block each: keys, defaults, plain values.

Sources: configuration_nemotron_h.py of transformers 5.12 and 5.24, and the configs on the hub, which have keys for code
of their own. Data only.
"""

from __future__ import annotations

import math
from typing import Any

from weights_conversion.configs.config_class import ConfigClass, ExpertKeys

_OFF = (False, None)
_INFINITE = {"__float__": "Infinity"}  # as transformers 5 writes it
# What the hub's configs say and no weight shows; the source's own code reads some of it.
_WRITTEN: dict[str, Any] = {
    "chunk_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "layer_norm_epsilon": 1e-5,  # the model's own, in both spellings
    "rms_norm_eps": 1e-5,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "num_logits_to_keep": 1,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "use_bias": False,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}
NEMOTRON_H = ConfigClass(
    {
        "num_layers": ("num_hidden_layers",),
        "hidden_size": ("hidden_size",),
        "ffn_hidden_size": ("intermediate_size",),
        "num_attention_heads": ("num_attention_heads",),
        "vocab_size": ("vocab_size",),
        "max_position_embeddings": ("max_position_embeddings",),
        "layernorm_epsilon": ("layer_norm_epsilon", "rms_norm_eps"),
    },
    {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "sliding_window": None,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "use_bias": False,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "n_groups": 8,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "time_step_limit": (0.0, math.inf),
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "moe_latent_size": None,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "num_nextn_predict_layers": 0,
    },
    {
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "attention_bias": _OFF,
        "mlp_bias": _OFF,
        "use_bias": _OFF,
        "mamba_proj_bias": _OFF,
        "use_conv_bias": (True,),
        "conv_kernel": (4,),
        "sliding_window": (None,),
        # by transformers' own rule time_step_min is the least, whatever stands here
        "time_step_limit": ([0.0, math.inf], (0.0, math.inf), [0.001, math.inf], [0.0, _INFINITE], None),
    },
    aliases=(
        ("n_routed_experts", "num_local_experts"),
        ("head_dim", "attention_head_dim"),
        ("hybrid_override_pattern", "layers_block_type", "layer_types"),
        # as they were called before, and Falcon-H1 still calls them
        ("n_groups", "mamba_n_groups"),
        ("conv_kernel", "mamba_d_conv"),
        ("use_conv_bias", "mamba_conv_bias"),
    ),
    idle=frozenset(
        {
            *_WRITTEN, "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "mtp_layers_block_type",
            "mtp_hybrid_override_pattern", "mamba_expand", "mamba_dt_min", "mamba_dt_max", "mamba_dt_init_floor",
            "mamba_chunk_size", "attn_implementation", "router_aux_loss_coef",
        }
    ),
    written=_WRITTEN,
    experts=ExpertKeys(
        ("n_routed_experts",), layers="pattern", score="sigmoid", scaled=True, groups="always",
        shared="moe_shared_expert_intermediate_size", bias=True, latent=True,
    ),
    pattern=("hybrid_override_pattern", "layers_block_type", "layer_types"),
)  # fmt: skip
HYBRID_CLASSES = {"NemotronHForCausalLM": NEMOTRON_H}
