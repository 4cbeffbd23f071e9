"""Llama: RMSNorm, SwiGLU, rotary embedding, grouped queries. Its rows are those of every dense decoder like it.

The rows of qwen's biases and of the norms of q and k stand here too, beside those that all have: a config says which
it has.
"""

from __future__ import annotations

from typing import Any

from weights_conversion.architectures.family import Family, Signs
from weights_conversion.mapping.parameters import COLUMN, ROW, Role, glu, qkv, same

EMBEDDING = same(
    "embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden"), COLUMN, role=Role.EMBEDDING
)
ATTENTION = (
    same(
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        "model.layers.{layer}.input_layernorm.weight",
        ("hidden",),
    ),
    qkv(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        q="model.layers.{layer}.self_attn.q_proj.weight",
        k="model.layers.{layer}.self_attn.k_proj.weight",
        v="model.layers.{layer}.self_attn.v_proj.weight",
    ),
    qkv(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        "qkv_bias",
        q="model.layers.{layer}.self_attn.q_proj.bias",
        k="model.layers.{layer}.self_attn.k_proj.bias",
        v="model.layers.{layer}.self_attn.v_proj.bias",
        shape=("qkv",),
    ),
    same(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        "model.layers.{layer}.self_attn.q_norm.weight",
        ("head_dim",),
        None,
        "qk_norms",
    ),
    same(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        "model.layers.{layer}.self_attn.k_norm.weight",
        ("head_dim",),
        None,
        "qk_norms",
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "model.layers.{layer}.self_attn.o_proj.weight",
        ("hidden", "q"),
        ROW,
    ),
)
MLP = (
    same(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        "model.layers.{layer}.post_attention_layernorm.weight",
        ("hidden",),
        None,
        "dense",
    ),
    glu(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        "dense",
        gate="model.layers.{layer}.mlp.gate_proj.weight",
        up="model.layers.{layer}.mlp.up_proj.weight",
    ),
    same(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        ("hidden", "ffn"),
        ROW,
        "dense",
    ),
)
LAST = (
    same("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),
    same("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), COLUMN, "untied", role=Role.HEAD),
)
ROWS = (EMBEDDING, *ATTENTION, *MLP, *LAST)


def dense(name: str, **facts: Any) -> Family:
    """A family with Llama's rows."""
    return Family(name, ROWS, tied_head="lm_head.weight", **facts)


LLAMA = dense(
    "llama",
    repositories={size: f"huggyllama/llama-{size}b" for size in ("7", "13", "30", "65")},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e4},
    ropes=("default", "linear", "yarn"),
    meta_context=2048,
    meta_folders=("{}B",),
    meta_in_cache_dir=True,
    tokenizer_repository="huggyllama/llama-7b",
    target="megatron-llm",
    megatron_llm=True,
    signs=(Signs(theta=1e4, epsilon=1e-6),),
    otherwise="llama2",  # they differ in the epsilon and the default context alone: where neither is said, it is that
)
LLAMA2 = dense(
    "llama2",
    repositories={size: f"meta-llama/Llama-2-{size}b-hf" for size in ("7", "13", "70")},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e4},
    ropes=("default", "linear", "yarn"),
    meta_context=4096,
    meta_in_cache_dir=True,
    tokenizer_repository="meta-llama/Llama-2-7b-hf",
    target="megatron-llm",
    megatron_llm=True,
    signs=(Signs(theta=1e4, epsilon=1e-5),),
)
