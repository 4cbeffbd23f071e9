"""Code Llama: Llama 2's parameters; what differs (theta, context, vocabulary) is in its config."""

from weights_conversion.architectures.family import Signs
from weights_conversion.architectures.llama import dense

CODELLAMA = dense(
    "codellama",
    repositories={size: f"codellama/CodeLlama-{size}b-hf" for size in ("7", "13", "34", "70")},
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e6},
    ropes=("default", "linear", "yarn"),
    meta_context=16384,
    meta_states_theta=True,
    tokenizer_repository="codellama/CodeLlama-7b-hf",
    infills=True,
    target="megatron-llm",
    megatron_llm=True,
    # Code Llama 70B has the usual theta; only its rows tell it from Llama 2.
    signs=(Signs(theta=1e6, rows=32016), Signs(theta=1e4, rows=32016, rows_needed=True)),
)
