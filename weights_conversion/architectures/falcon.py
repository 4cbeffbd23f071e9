"""Falcon: attention and MLP in parallel, LayerNorm, multi-query (7B) or grouped (40B, 180B, 11B) attention."""

from __future__ import annotations

from weights_conversion.architectures.family import Family, Signs
from weights_conversion.mapping.ops import GroupedQKV
from weights_conversion.mapping.parameters import COLUMN, ROW, Role, same

EMBEDDING = same(
    "embedding.word_embeddings.weight",
    "transformer.word_embeddings.weight",
    ("vocab", "hidden"),
    COLUMN,
    role=Role.EMBEDDING,
)
NORMS = tuple(
    same(
        f"decoder.layers.{{layer}}.{megatron}.{kind}", f"transformer.h.{{layer}}.{hf}.{kind}", ("hidden",), None, needs
    )
    for megatron, hf, needs in (
        ("input_layernorm", "input_layernorm", "shared_norm"),
        ("input_layernorm", "ln_attn", "two_norms"),
        ("mlp_layernorm", "ln_mlp", "two_norms"),
    )
    for kind in ("weight", "bias")
)
BLOCK = (
    same(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        "transformer.h.{layer}.self_attention.query_key_value.weight",
        ("qkv", "hidden"),
        COLUMN,
        op=GroupedQKV(),
    ),
    same(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "transformer.h.{layer}.self_attention.dense.weight",
        ("hidden", "q"),
        ROW,
    ),
    same(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        "transformer.h.{layer}.mlp.dense_h_to_4h.weight",
        ("ffn", "hidden"),
        COLUMN,
    ),
    same(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "transformer.h.{layer}.mlp.dense_4h_to_h.weight",
        ("hidden", "ffn"),
        ROW,
    ),
)
LAST = (
    same("decoder.final_layernorm.weight", "transformer.ln_f.weight", ("hidden",)),
    same("decoder.final_layernorm.bias", "transformer.ln_f.bias", ("hidden",)),
    same("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), COLUMN, "untied", role=Role.HEAD),
)

FALCON = Family(
    "falcon",
    (EMBEDDING, *NORMS, *BLOCK, *LAST),
    tied_head="lm_head.weight",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    hf_class="FalconForCausalLM",
    repositories={"7": "tiiuae/falcon-7b", "40": "tiiuae/falcon-40b", "180": "tiiuae/falcon-180B"},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e4},
    ropes=("default", "linear"),
    norm="layer",
    gated=False,
    parallel_attention=True,
    ties_in_megatron_llm=True,
    tokenizer_type="FalconTokenizer",
    tokenizer_repository="tiiuae/falcon-40b",  # which Megatron-LLM itself always uses
    target="megatron-llm",
    megatron_llm=True,
    signs=(Signs(parallel_attention=True),),
)
