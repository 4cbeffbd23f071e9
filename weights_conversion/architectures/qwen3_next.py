"""Qwen3-Next: three layers of gated delta to one of gated attention, experts beside a shared one with a gate."""

from weights_conversion.architectures.experts import EXPERTS, NORM, ROUTER
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.gated_delta import BY_HEAD, FULL, linear, predicting
from weights_conversion.architectures.llama import EMBEDDING, LAST, MLP
from weights_conversion.architectures.qwen2_moe import SHARED, SHARED_GATE

_MLPS = (*MLP, NORM, ROUTER, *EXPERTS, *SHARED, SHARED_GATE)

QWEN3_NEXT = Family(
    "qwen3-next",
    (
        EMBEDDING,
        *linear("model", BY_HEAD, groups="delta_key_heads"),
        *FULL,
        *_MLPS,
        *predicting((*FULL, *_MLPS)),
        *LAST,
    ),
    tied_head="lm_head.weight",
    model_types=("qwen3_next",),
    hf_class="Qwen3NextForCausalLM",
    repositories={"80": "Qwen/Qwen3-Next-80B-A3B-Instruct"},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e7},
    features=frozenset({"qk_layernorm", "shared_gate", "attention_output_gate", "layernorm_zero_centered_gamma"}),
    ropes=("default", "yarn"),
    signs=(Signs(gated_delta=True, experts=True, qk_norms=True, shared_experts=True, shared_gate=True, rows=151936),),
)
