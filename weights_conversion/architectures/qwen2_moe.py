"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, experts beside a shared one that has a gate of its own."""

from weights_conversion.architectures.experts import EXPERTS, NORM, ROUTER, shared
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.llama import ATTENTION, EMBEDDING, LAST, MLP
from weights_conversion.mapping.parameters import same

SHARED = shared(
    gate="model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
    up="model.layers.{layer}.mlp.shared_expert.up_proj.weight",
    down="model.layers.{layer}.mlp.shared_expert.down_proj.weight",
)
SHARED_GATE = same(
    "decoder.layers.{layer}.mlp.shared_experts.gate_weight",
    "model.layers.{layer}.mlp.shared_expert_gate.weight",
    ("one", "hidden"),
    None,
    "shared_gate",
)

QWEN2_MOE = Family(
    "qwen2-moe",
    (EMBEDDING, *ATTENTION, *MLP, NORM, ROUTER, *EXPERTS, *SHARED, SHARED_GATE, *LAST),
    tied_head="lm_head.weight",
    model_types=("qwen2_moe",),
    hf_class="Qwen2MoeForCausalLM",
    repositories={"57": "Qwen/Qwen2-57B-A14B", "14": "Qwen/Qwen1.5-MoE-A2.7B"},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e6},
    features=frozenset({"shared_gate"}),
    ropes=("default", "yarn"),
    signs=(Signs(experts=True, qkv_bias=True, shared_experts=True, shared_gate=True),),
)
