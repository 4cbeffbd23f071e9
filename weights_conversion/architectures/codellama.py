"""Code Llama: Llama 2's parameters; what differs (theta, context, vocabulary) is in its config."""

from weights_conversion.architectures.llama import dense

CODELLAMA = dense(
    "codellama",
    repositories={size: f"codellama/CodeLlama-{size}b-hf" for size in ("7", "13", "34", "70")},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e6},
    ropes=("default", "linear", "yarn"),
    meta_context=16384,
    target="megatron-llm",
    megatron_llm=True,
)
