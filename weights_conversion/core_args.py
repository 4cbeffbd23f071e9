"""Megatron-Core's args: written for Megatron-LM, and read, respelled as Megatron-LLM's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import ConversionError, ModelConfig, Parallelism
from weights_conversion.megatron_args import virtual_stages

# Globals that a common.pt of Megatron-LM may name, beside those of any checkpoint; all become inert.
_COMMON = {
    "types": ("SimpleNamespace",),
    "pathlib": ("PosixPath",),
    "_io": ("BytesIO",),
    "numpy.dtypes": ("UInt32DType",),
    "megatron.core.transformer.enums": ("CudaGraphScope",),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    "megatron.core.optimizer": ("OptimizerConfig",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
}


class _Inert:
    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


COMMON_GLOBALS: Mapping[tuple[str, str], Any] = {
    (module, name): _Inert for module, names in _COMMON.items() for name in names
}

# Megatron-Core's name -> Megatron-LLM's, where they differ and the value is the same.
_RESPELLED = {"num_query_groups": "num_attention_heads_kv", "rotary_base": "rope_theta"}
# Features that the five families do not have: (name in args, value that means "without it", what it is).
_FOREIGN: tuple[tuple[str, Any, str], ...] = (
    ("num_experts", None, "mixture of experts"),
    ("num_moe_experts", None, "mixture of experts"),
    ("multi_latent_attention", False, "multi-latent attention"),
    ("add_qkv_bias", False, "biases of q, k and v"),
    ("add_bias_linear", False, "biases of linear layers"),
    ("qk_layernorm", False, "norms of q and k"),
    ("apply_layernorm_1p", False, "norm weights around zero"),
    ("rotary_interleaved", False, "interleaved rotary embedding"),
    ("use_rope_scaling", False, "Llama 3's rope scaling"),
    ("squared_relu", False, "squared ReLU"),
    ("swiglu", True, "an MLP without SwiGLU"),
    ("gated_linear_unit", True, "an MLP without SwiGLU"),
    ("normalization", "RMSNorm", "LayerNorm"),
    ("rotary_percent", 1.0, "rotary embedding on a part of each head"),
    ("position_embedding_type", "rope", "position embeddings other than rotary"),
    ("hybrid_override_pattern", None, "state-space layers"),
)


def write_args(
    config: ModelConfig, parallel: Parallelism, *, dtype: torch.dtype, divisible_by: int, ckpt_format: str,
    vocabulary: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Args of plain types, for Megatron-LM's --use-checkpoint-args. `vocabulary` None: each run pads for its own TP."""
    grouped = config.num_query_groups != config.num_attention_heads
    args: dict[str, Any] = {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups if grouped else config.num_attention_heads,
        "group_query_attention": grouped,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(config.rope_theta) if config.rope_theta == int(config.rope_theta) else config.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": _interpolation(config),
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "swiglu": True,
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "normalization": "RMSNorm",
        "norm_epsilon": config.layernorm_epsilon,
        "layernorm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "window_size": _window(config),
        "make_vocab_size_divisible_by": divisible_by,
        "tokenizer_type": "Llama2Tokenizer",
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "expert_model_parallel_size": 1,
        **virtual_stages(config, parallel),
        "num_experts": None,
        "ckpt_format": ckpt_format,
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "world_size": parallel.tensor * parallel.pipeline,
        "data_parallel_size": 1,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }
    if vocabulary is not None:
        args["padded_vocab_size"] = vocabulary
    return args


def _interpolation(config: ModelConfig) -> float | None:
    factor = config.rope_scaling_factor
    return None if factor == 1.0 else int(factor) if factor == int(factor) else factor


def _window(config: ModelConfig) -> tuple[int, int] | None:
    """Megatron-Core counts the tokens to the left; Hugging Face's window includes the token itself."""
    return None if config.sliding_window is None else (config.sliding_window - 1, 0)


def training_flags(config: ModelConfig, dtype: torch.dtype) -> list[str]:
    """What --use-checkpoint-args does not restore."""
    flags = [f"--norm-epsilon {config.layernorm_epsilon}"]
    if config.sliding_window is not None:
        flags.append(f"--window-size {config.sliding_window - 1},0")
    if config.rope_scaling_factor != 1.0:
        flags.append(f"--rotary-seq-len-interpolation-factor {_interpolation(config)}")
    if dtype in (torch.bfloat16, torch.float16):
        flags.append("--bf16" if dtype is torch.bfloat16 else "--fp16")
    return flags


def normalise(args: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Args in Megatron-LLM's names. A model that is none of the five families is refused by name."""
    problems = [
        f"{folder} holds a model with {what} ({name} is {args[name]!r}), which is none of the supported families"
        for name, plain, what in _FOREIGN
        if args.get(name) is not None and args[name] != plain and not (name == "num_experts" and args[name] in (0, 1))
    ]
    if problems:
        raise ConversionError(*dict.fromkeys(problems))
    result = dict(args)
    for theirs, ours in _RESPELLED.items():
        if args.get(theirs) is not None:
            result[ours] = args[theirs]
    if args.get("group_query_attention") is False or result.get("num_attention_heads_kv") is None:
        result["num_attention_heads_kv"] = args.get("num_attention_heads")
    if args.get("norm_epsilon") is not None:
        result["layernorm_epsilon"] = args["norm_epsilon"]
    if "rope_theta" in result:
        result["rope_theta"] = float(result["rope_theta"])
    result["rope_scaling_factor"] = float(
        args.get("rotary_seq_len_interpolation_factor") or args.get("seq_len_interpolation_factor") or 1.0
    )
    window = args.get("window_size")
    result["sliding_window_size"] = window[0] + 1 if window else None
    if "untie_embeddings_and_output_weights" in args:
        result["tie_embed_logits"] = not args["untie_embeddings_and_output_weights"]
    elif "share_embeddings_and_output_weights" in args:
        result["tie_embed_logits"] = bool(args["share_embeddings_and_output_weights"])
    if result.get("max_position_embeddings") is None:
        result["max_position_embeddings"] = args.get("seq_length")
    return result


def from_run_config(folder: Path) -> dict[str, Any]:
    """Megatron-Bridge stores no args; its run_config.yaml has the model under `model`."""
    path = folder / "run_config.yaml"
    if not path.is_file():
        raise ConversionError(
            f"{folder} holds no args and no run_config.yaml, so nothing says what model it is; copy run_config.yaml there"
        )
    import yaml  # huggingface_hub requires it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read ({error})") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ConversionError(f"{path} has no section `model`")
    return {str(key): value for key, value in model.items() if not isinstance(value, dict)}
