"""Llama: RMSNorm, SwiGLU, rotary embedding, grouped queries. Its rows are those of every dense decoder like it.

The rows of qwen's biases and of the norms of q and k stand here too, beside those that all have: a family says which
it has.
"""

from __future__ import annotations

from typing import Any

from weights_conversion.architectures.family import Family
from weights_conversion.config import ModelConfig
from weights_conversion.mapping.ops import FuseGLU, FuseQKV
from weights_conversion.mapping.parameters import COLUMN, GLU, ROW, ParamMapping

PARAMETERS = (
    ParamMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"), COLUMN),
    ParamMapping("encoder.layers.{}.input_layernorm.weight", ("model.layers.{}.input_layernorm.weight",), ("hidden",)),
    ParamMapping(
        "encoder.layers.{}.self_attention.query_key_value.weight",
        (
            "model.layers.{}.self_attn.q_proj.weight",
            "model.layers.{}.self_attn.k_proj.weight",
            "model.layers.{}.self_attn.v_proj.weight",
        ),
        ("qkv", "hidden"),
        COLUMN,
        FuseQKV(),
    ),
    ParamMapping(
        "encoder.layers.{}.self_attention.query_key_value.bias",
        (
            "model.layers.{}.self_attn.q_proj.bias",
            "model.layers.{}.self_attn.k_proj.bias",
            "model.layers.{}.self_attn.v_proj.bias",
        ),
        ("qkv",),
        COLUMN,
        FuseQKV(),
        needs="add_qkv_bias",
    ),
    ParamMapping(
        "encoder.layers.{}.self_attention.q_layernorm.weight",
        ("model.layers.{}.self_attn.q_norm.weight",),
        ("head_dim",),
        needs="qk_layernorm",
    ),
    ParamMapping(
        "encoder.layers.{}.self_attention.k_layernorm.weight",
        ("model.layers.{}.self_attn.k_norm.weight",),
        ("head_dim",),
        needs="qk_layernorm",
    ),
    ParamMapping(
        "encoder.layers.{}.self_attention.dense.weight",
        ("model.layers.{}.self_attn.o_proj.weight",),
        ("hidden", "q"),
        ROW,
    ),
    ParamMapping(
        "encoder.layers.{}.post_attention_layernorm.weight",
        ("model.layers.{}.post_attention_layernorm.weight",),
        ("hidden",),
    ),
    ParamMapping(
        "encoder.layers.{}.mlp.dense_h_to_4h.weight",
        ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
        ("glu", "hidden"),
        GLU,
        FuseGLU(),
    ),
    ParamMapping(
        "encoder.layers.{}.mlp.dense_4h_to_h.weight", ("model.layers.{}.mlp.down_proj.weight",), ("hidden", "ffn"), ROW
    ),
    ParamMapping("encoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    ParamMapping("lm_head", ("lm_head.weight",), ("vocab", "hidden"), COLUMN),
)


def parameters(config: ModelConfig) -> tuple[ParamMapping, ...]:
    return tuple(
        row
        for row in PARAMETERS
        if (row.needs is None or getattr(config, row.needs))
        and not (config.tie_word_embeddings and row.megatron == "lm_head")
    )


def dense(name: str, **facts: Any) -> Family:
    """A family with Llama's rows."""
    return Family(name, parameters, tied_head="lm_head.weight", **facts)


LLAMA = dense(
    "llama",
    repositories={size: f"huggyllama/llama-{size}b" for size in ("7", "13", "30", "65")},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e4},
    ropes=("default", "linear"),
    meta_context=2048,
    target="megatron-llm",
    megatron_llm=True,
)
LLAMA2 = dense(
    "llama2",
    repositories={size: f"meta-llama/Llama-2-{size}b-hf" for size in ("7", "13", "70")},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e4},
    ropes=("default", "linear"),
    meta_context=4096,
    target="megatron-llm",
    megatron_llm=True,
)
