"""Llama: RMSNorm, SwiGLU, rotary embedding, grouped queries, no biases. Shared by llama2, codellama and mistral."""

from __future__ import annotations

from weights_conversion.config import ModelConfig
from weights_conversion.mapping.ops import FuseGLU, FuseQKV
from weights_conversion.mapping.parameters import COLUMN, GLU, ROW, Architecture, ParamMapping

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
    if config.tie_word_embeddings:
        return tuple(row for row in PARAMETERS if row.megatron != "lm_head")
    return PARAMETERS


def architecture(family: str) -> Architecture:
    return Architecture(family, parameters, tied_head="lm_head.weight")


LLAMA = architecture("llama")
LLAMA2 = architecture("llama2")
