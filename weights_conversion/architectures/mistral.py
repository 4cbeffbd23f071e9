"""Mistral 7B, Nemo 12B, Small 22B and 24B: Llama's parameters; window and size of a head are in its config."""

from weights_conversion.architectures.family import Signs
from weights_conversion.architectures.llama import dense

MISTRAL = dense(
    "mistral",
    model_types=("mistral",),
    hf_class="MistralForCausalLM",
    repositories={
        "7": "mistralai/Mistral-7B-v0.1",
        "12": "mistralai/Mistral-Nemo-Base-2407",
        "22": "mistralai/Mistral-Small-Instruct-2409",
        "24": "mistralai/Mistral-Small-24B-Base-2501",
    },
    defaults={"layernorm_epsilon": 1e-5, "rope_theta": 1e4, "sliding_window": 4096},
    ropes=("default", "linear", "yarn"),
    windowed=True,
    tokenizer_repository="mistralai/Mistral-7B-v0.1",
    target="megatron-llm",
    megatron_llm=True,
    # Since 0.2 Mistral has no window, and Code Llama's theta.
    signs=(
        Signs(window=True),
        Signs(theta=1e6, grouped=True, least_positions=32768, ratio=3.5),
        Signs(theta=1e6, grouped=True, rows=32768, rows_needed=True),
        Signs(theta=1e6, grouped=True, rows=131072, rows_needed=True),  # Nemo
        Signs(theta=1e8, grouped=True, rows=131072, rows_needed=True),  # Small 24B
    ),
)
