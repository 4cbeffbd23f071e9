"""Families with experts by their config class alone, for tests of configs: rows do not matter there.

Configs are those of the hub (cut down), args those that Megatron-LM 0.16.1 and 0.19.2 wrote for them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from weights_conversion.architectures import FAMILIES
from weights_conversion.architectures.family import Signs
from weights_conversion.architectures.glm4_moe import GLM4_MOE
from weights_conversion.architectures.llama import dense
from weights_conversion.architectures.mixtral import MIXTRAL
from weights_conversion.architectures.qwen2_moe import QWEN2_MOE
from weights_conversion.architectures.qwen3_moe import QWEN3_MOE
from weights_conversion.config import ModelConfig
from weights_conversion.configs import core_args, core_foreign, hf_config, megatron_args
from weights_conversion.mapping.dialects import MEGATRON_CORE

CORE = MEGATRON_CORE
_LATENT = Signs(experts=True, latent=True, shared_experts=True)
_TO_COME = {
    "deepseek-v2": ("deepseek_v2", "DeepseekV2ForCausalLM", _LATENT),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3ForCausalLM", dataclasses.replace(_LATENT, sigmoid=True)),
}
_UNLISTED = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE)
NAMES = (*(family.family for family in _UNLISTED), *_TO_COME)


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have no file yet are known by their class."""
    for family in _UNLISTED:
        monkeypatch.setitem(FAMILIES, family.family, family)
    for name, (model_type, hf_class, signs) in _TO_COME.items():
        if name not in FAMILIES:
            family = dense(name, model_types=(model_type,), hf_class=hf_class, signs=(signs,))
            monkeypatch.setitem(FAMILIES, name, family)


_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 48,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 181,
}
_DEEPSEEK = _COMMON | {
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "intermediate_size": 92,
    "kv_lora_rank": 28,
    "moe_intermediate_size": 20,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "seq_aux": True,
    "topk_group": 1,
    "v_head_dim": 12,
}
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON
    | {
        "model_type": "mixtral",
        "intermediate_size": 56,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "qwen2-moe": _COMMON
    | {
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "intermediate_size": 80,
        "max_window_layers": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": False,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 44,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "qwen3-moe": _COMMON
    | {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_window_layers": 4,
        "mlp_only_layers": [],
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
    },
    "glm4-moe": _COMMON
    | {
        "model_type": "glm4_moe",
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "intermediate_size": 92,
        "moe_intermediate_size": 20,
        "n_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "deepseek-v2": _DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "norm_topk_prob": False,
        "q_lora_rank": None,
        "rope_scaling": _YARN,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
    "deepseek-v3": _DEEPSEEK
    | {
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "n_group": 3,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 40,
        "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
}


def read(family: str, **changes: Any) -> ModelConfig:
    """The ModelConfig of a family's config.json with other values; `...` takes a key out."""
    raw = {key: value for key, value in (CONFIGS[family] | changes).items() if value is not ...}
    return hf_config.read_config(family, raw, CORE, "config.json")


def from_args(family: str, args: dict[str, Any], rows: int = 181) -> ModelConfig:
    """The ModelConfig of Megatron-Core's args, as a checkpoint with no manifest has it. Raises ConversionError."""
    from weights_conversion.errors import ConversionError

    normalised = core_args.normalise(args, Path("ckpt"))
    if problems := core_foreign.foreign_to_family(normalised, family, Path("ckpt")):
        raise ConversionError(*problems)
    return megatron_args.resolve(family, normalised, None, {}, rows).config
