"""Llama 3, 3.1, 3.2 and 3.3: Llama's parameters, its own rope scaling; heads tied at 1B and 3B."""

from weights_conversion.architectures.family import Signs
from weights_conversion.architectures.llama import dense

LLAMA3 = dense(
    "llama3",
    repositories={
        "8": "meta-llama/Llama-3.1-8B",
        "1": "meta-llama/Llama-3.2-1B",
        "3": "meta-llama/Llama-3.2-3B",
        "70": "meta-llama/Llama-3.1-70B",
        "405": "meta-llama/Llama-3.1-405B",
    },
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 5e5},
    # 3.1 and later have rope scaling of their own; 3 has not.
    signs=(Signs(llama3_rope=True), Signs(theta=5e5), Signs(rows=128256, rows_needed=True)),
)
