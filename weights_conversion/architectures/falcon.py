"""Falcon: attention and MLP in parallel, LayerNorm, multi-query (7B) or grouped (40B, 180B, 11B) attention."""

from __future__ import annotations

from weights_conversion.architectures.family import Family
from weights_conversion.config import ModelConfig
from weights_conversion.mapping.ops import PermuteRotary
from weights_conversion.mapping.parameters import COLUMN, ROW, ParamMapping

EMBEDDING = ParamMapping(
    "embedding.word_embeddings.weight", ("transformer.word_embeddings.weight",), ("vocab", "hidden"), COLUMN
)
SHARED_NORM = tuple(
    ParamMapping(
        f"encoder.layers.{{}}.input_layernorm.{kind}", (f"transformer.h.{{}}.input_layernorm.{kind}",), ("hidden",)
    )
    for kind in ("weight", "bias")
)
TWO_NORMS = tuple(
    ParamMapping(f"encoder.layers.{{}}.{megatron}.{kind}", (f"transformer.h.{{}}.{hf}.{kind}",), ("hidden",))
    for megatron, hf in (("input_layernorm", "ln_attn"), ("mlp_layernorm", "ln_mlp"))
    for kind in ("weight", "bias")
)
BLOCK = (
    ParamMapping(
        "encoder.layers.{}.self_attention.query_key_value.weight",
        ("transformer.h.{}.self_attention.query_key_value.weight",),
        ("qkv", "hidden"),
        COLUMN,
        PermuteRotary(),
    ),
    ParamMapping(
        "encoder.layers.{}.self_attention.dense.weight",
        ("transformer.h.{}.self_attention.dense.weight",),
        ("hidden", "q"),
        ROW,
    ),
    ParamMapping(
        "encoder.layers.{}.mlp.dense_h_to_4h.weight",
        ("transformer.h.{}.mlp.dense_h_to_4h.weight",),
        ("ffn", "hidden"),
        COLUMN,
    ),
    ParamMapping(
        "encoder.layers.{}.mlp.dense_4h_to_h.weight",
        ("transformer.h.{}.mlp.dense_4h_to_h.weight",),
        ("hidden", "ffn"),
        ROW,
    ),
)
FINAL_NORM = tuple(
    ParamMapping(f"encoder.final_layernorm.{kind}", (f"transformer.ln_f.{kind}",), ("hidden",))
    for kind in ("weight", "bias")
)
HEAD = ParamMapping("lm_head", ("lm_head.weight",), ("vocab", "hidden"), COLUMN)


def parameters(config: ModelConfig) -> tuple[ParamMapping, ...]:
    norms = TWO_NORMS if config.num_layernorms == 2 else SHARED_NORM
    head = () if config.tie_word_embeddings else (HEAD,)
    return (EMBEDDING, *norms, *BLOCK, *FINAL_NORM, *head)


FALCON = Family(
    "falcon",
    parameters,
    tied_head="lm_head.weight",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    hf_class="FalconForCausalLM",
    repositories={"7": "tiiuae/falcon-7b", "40": "tiiuae/falcon-40b", "180": "tiiuae/falcon-180B"},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e4},
    ropes=("default", "linear"),
    parallel_attention=True,
    target="megatron-llm",
    megatron_llm=True,
)
