"""Qwen3.5 and 3.6, dense and with experts: the text part of a repository with vision, as Megatron-Core holds it.

Hugging Face has it below model.language_model, beside model.visual; a text model alone has it below model.
"""

from weights_conversion.architectures.experts import EXPERTS, NORM, ROUTER
from weights_conversion.architectures.family import Family, Outer, Signs
from weights_conversion.architectures.gated_delta import FLAT, FULL, below, linear, predicting
from weights_conversion.architectures.llama import EMBEDDING, LAST, MLP
from weights_conversion.architectures.qwen2_moe import SHARED, SHARED_GATE

_ATTENTION = (*linear("model", FLAT, float32=True), *FULL)
_MOE = (NORM, ROUTER, *EXPERTS, *SHARED, SHARED_GATE)
_FEATURES = frozenset({"qk_layernorm", "attention_output_gate", "layernorm_zero_centered_gamma"})

QWEN3_5 = Family(
    "qwen3.5",
    (*below("model.language_model", (EMBEDDING, *_ATTENTION, *MLP)), *predicting((*FULL, *MLP)),
     *below("model.language_model", LAST)),
    tied_head="lm_head.weight",
    model_types=("qwen3_5_text", "qwen3_5"),
    hf_class="Qwen3_5ForCausalLM",
    outer=Outer("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    repositories={size: f"Qwen/Qwen3.5-{size}B" for size in ("9", "0.8", "2", "4", "27")},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e7},
    features=_FEATURES,
    ropes=("default", "yarn"),
    signs=(Signs(gated_delta=True, qk_norms=True),),
)  # fmt: skip
QWEN3_5_MOE = Family(
    "qwen3.5-moe",
    (*below("model.language_model", (EMBEDDING, *_ATTENTION, *_MOE)), *predicting((*FULL, *_MOE)),
     *below("model.language_model", LAST)),
    tied_head="lm_head.weight",
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    hf_class="Qwen3_5MoeForCausalLM",
    outer=Outer("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
    repositories={"35": "Qwen/Qwen3.5-35B-A3B", "122": "Qwen/Qwen3.5-122B-A10B", "397": "Qwen/Qwen3.5-397B-A17B"},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e7},
    features=_FEATURES | {"shared_gate"},
    packs=True,
    ropes=("default", "yarn"),
    signs=(Signs(gated_delta=True, experts=True, qk_norms=True, shared_experts=True, shared_gate=True, rows=248320),),
)  # fmt: skip
