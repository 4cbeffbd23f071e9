"""Qwen3, dense: Llama's parameters with norms of q and k and a head size of its own. Some tie heads."""

from weights_conversion.architectures.family import Signs
from weights_conversion.architectures.llama import dense

QWEN3 = dense(
    "qwen3",
    model_types=("qwen3",),
    hf_class="Qwen3ForCausalLM",
    repositories={size: f"Qwen/Qwen3-{size}B" for size in ("8", "0.6", "1.7", "4", "14", "32")},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e6},
    features=frozenset({"qk_layernorm"}),
    signs=(Signs(qk_norms=True),),
)
