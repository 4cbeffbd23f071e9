"""DeepSeek-V2, V3 and R1, Moonlight, Kimi-K2: latent attention, dense first layers, shared experts, prediction."""

from weights_conversion.architectures.experts import EXPERT_BIAS, EXPERTS, NORM, ROUTER, SHARED
from weights_conversion.architectures.family import Family, Signs
from weights_conversion.architectures.latent import ATTENTION
from weights_conversion.architectures.llama import EMBEDDING, LAST, MLP
from weights_conversion.architectures.prediction import COPIES, predicting

_LAYER = (*ATTENTION, *MLP, NORM, ROUTER, EXPERT_BIAS, *EXPERTS, *SHARED)

DEEPSEEK_V2 = Family(
    "deepseek-v2",
    (EMBEDDING, *_LAYER, *LAST),
    tied_head="lm_head.weight",
    model_types=("deepseek_v2",),
    hf_class="DeepseekV2ForCausalLM",
    repositories={"16": "deepseek-ai/DeepSeek-V2-Lite", "236": "deepseek-ai/DeepSeek-V2"},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e4},
    ropes=("default", "yarn"),
    signs=(Signs(experts=True, shared_experts=True, latent=True),),
)
DEEPSEEK_V3 = Family(
    "deepseek-v3",
    (EMBEDDING, *_LAYER, *predicting(_LAYER), *LAST),
    tied_head="lm_head.weight",
    mtp_copies=COPIES,
    model_types=("deepseek_v3", "kimi_k2"),
    hf_class="DeepseekV3ForCausalLM",
    repositories={
        "671": "deepseek-ai/DeepSeek-V3-Base",
        "16": "moonshotai/Moonlight-16B-A3B",
        "1000": "moonshotai/Kimi-K2-Base",
    },
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e4},
    ropes=("default", "yarn"),
    signs=(Signs(experts=True, shared_experts=True, latent=True, sigmoid=True),),
)
