"""GLM-4.7-Flash: DeepSeek-V3's rows, latent attention and prediction layers too, by a config class of its own."""

from weights_conversion.architectures.deepseek import DEEPSEEK_V3
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.prediction import COPIES

GLM4_MOE_LITE = Family(
    "glm4-moe-lite",
    DEEPSEEK_V3.rows,
    tied_head="lm_head.weight",
    mtp_copies=COPIES,
    model_types=("glm4_moe_lite",),
    hf_class="Glm4MoeLiteForCausalLM",
    repositories={"30": "zai-org/GLM-4.7-Flash"},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e6},
    ropes=("default", "yarn"),
    signs=(Signs(experts=True, shared_experts=True, latent=True, sigmoid=True),),
    otherwise="deepseek-v3",  # nothing in a Megatron checkpoint tells them apart
)
