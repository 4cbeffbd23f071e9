"""Mixtral 8x7B and 8x22B: Mistral's attention; every layer has experts, under names of its own."""

from dataclasses import replace

from weights_conversion.architectures.experts import NORM, experts, router
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.llama import ATTENTION, EMBEDDING, LAST

MIXTRAL = Family(
    "mixtral",
    (
        EMBEDDING,
        *ATTENTION,
        NORM,
        replace(
            router("model.layers.{layer}.block_sparse_moe.gate.weight"),
            beside_packed="model.layers.{layer}.mlp.gate.weight",  # transformers 5's own names
        ),
        *experts(
            gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
            down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        ),
        *LAST,
    ),
    tied_head="lm_head.weight",
    model_types=("mixtral",),
    hf_class="MixtralForCausalLM",
    repositories={size: f"mistralai/Mixtral-{size}B-v0.1" for size in ("8x7", "8x22")},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e6},
    ropes=("default",),
    windowed=True,
    signs=(Signs(experts=True), Signs(experts=True, window=True)),
)
