"""Qwen2, Qwen2.5, their Coder and Math models: Llama's parameters with biases of q, k and v; heads tied up to 3B."""

from weights_conversion.architectures.family import Signs
from weights_conversion.architectures.llama import dense

QWEN2 = dense(
    "qwen2",
    model_types=("qwen2",),
    hf_class="Qwen2ForCausalLM",
    repositories={size: f"Qwen/Qwen2.5-{size}B" for size in ("7", "0.5", "1.5", "3", "14", "32", "72")},
    defaults={"layernorm_epsilon": 1e-6, "rope_theta": 1e6},
    features=frozenset({"add_qkv_bias"}),
    signs=(Signs(qkv_bias=True),),
)
