"""Qwen3-MoE and Qwen3-Coder: Qwen3's attention, experts in every layer."""

from weights_conversion.architectures.experts import EXPERTS, NORM, ROUTER
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.llama import ATTENTION, EMBEDDING, LAST, MLP

QWEN3_MOE = Family(
    "qwen3-moe",
    (EMBEDDING, *ATTENTION, *MLP, NORM, ROUTER, *EXPERTS, *LAST),
    tied_head="lm_head.weight",
    model_types=("qwen3_moe",),
    hf_class="Qwen3MoeForCausalLM",
    repositories={
        "30": "Qwen/Qwen3-30B-A3B",
        "235": "Qwen/Qwen3-235B-A22B",
        "480": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    },
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e6},
    features=frozenset({"qk_layernorm"}),
    ropes=("default", "yarn"),
    windowed=True,
    signs=(Signs(experts=True, qk_norms=True), Signs(experts=True, qk_norms=True, window=True)),
)
