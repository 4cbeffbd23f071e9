"""GLM-4.5, 4.6 and 4.7: biases of q, k and v, half of each head turns, dense first layers, shared experts."""

from weights_conversion.architectures.experts import EXPERT_BIAS, EXPERTS, NORM, ROUTER, SHARED
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.llama import ATTENTION, EMBEDDING, LAST, MLP
from weights_conversion.architectures.prediction import COPIES, predicting

_LAYER = (*ATTENTION, *MLP, NORM, ROUTER, EXPERT_BIAS, *EXPERTS, *SHARED)

GLM4_MOE = Family(
    "glm4-moe",
    (EMBEDDING, *_LAYER, *predicting(_LAYER), *LAST),
    tied_head="lm_head.weight",
    mtp_copies=COPIES,
    model_types=("glm4_moe",),
    hf_class="Glm4MoeForCausalLM",
    repositories={"106": "zai-org/GLM-4.5-Air", "355": "zai-org/GLM-4.5"},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e6},
    ropes=("default",),
    signs=tuple(
        Signs(experts=True, sigmoid=True, shared_experts=True, qkv_bias=bias, qk_norms=norms)
        for bias in (True, False)
        for norms in (True, False)  # the large one has them
    ),
)
