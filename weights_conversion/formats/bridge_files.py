"""What Megatron-Bridge keeps beside the items of a checkpoint: run_config.yaml, train_state.pt, its trackers.

run_config.yaml states what a model needs to be built again; every field of Bridge's that is not there has its default
(megatron/bridge/models/gpt_provider.py, training/config.py, training/checkpointing.py of Megatron-Bridge 0.6).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.formats.run_config import RUN_CONFIG

FOLDER = "iter_0000000"
TRACKER_TEXT = b"0"
_TRAIN_STATE = "train_state.pt"
_LATEST = f"latest_{_TRAIN_STATE}"


def check(config: ModelConfig) -> None:
    """Refuses by name what this form is not written for."""
    parts: dict[str, object] = {"experts": config.moe, "multi-latent attention": config.mla}
    parts["multi-token prediction"] = config.mtp_num_layers
    scaling = config.rope_scaling
    found = [what for what, there in parts.items() if there]
    found += [f"rope scaling of kind {scaling.kind}"] if scaling and scaling.kind not in ("llama3",) else []
    if found:
        raise ConversionError(
            f"--target megatron-bridge is not written for models with {' and '.join(found)} yet; use --target "
            "megatron-core, which Megatron-Bridge loads with a provider of its own (AutoBridge)"
        )


def files(
    config: ModelConfig, vocabulary: int, dtype: torch.dtype, divisible_by: int
) -> dict[str, bytes]:  # fmt: skip
    """The small files, below the checkpoint's root. `vocabulary`: rows written."""
    state = _train_state()
    content = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "fully_parallel_save": True,
            "save_optim": False,
            "save_rng": False,
        },
        "model": _model(config, vocabulary, dtype, divisible_by),
        "peft": None,
        "tokenizer": None,
        "train": None,
    }
    text = "".join(f"{line}\n" for line in _yaml(content)).encode()
    return {f"{FOLDER}/{RUN_CONFIG}": text, f"{FOLDER}/{_TRAIN_STATE}": state, _LATEST: state}


def _model(config: ModelConfig, vocabulary: int, dtype: torch.dtype, divisible_by: int) -> dict[str, Any]:
    kind = {"_call_": False, "_target_": str(dtype)}
    scaling = config.rope_scaling
    factor = config.rope_scaling_factor
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "attention_dropout": 0.0,
        "autocast_dtype": kind,
        "bf16": dtype is torch.bfloat16,
        "ffn_hidden_size": config.ffn_hidden_size,
        "fp16": dtype is torch.float16,
        "gated_linear_unit": True,
        "hidden_dropout": 0.0,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.layernorm_epsilon,
        "make_vocab_size_divisible_by": divisible_by,
        "normalization": "RMSNorm",
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "num_query_groups": config.num_query_groups,
        "params_dtype": kind,
        "pipeline_model_parallel_size": 1,
        "position_embedding_type": "rope",
        "qk_layernorm": config.qk_layernorm,
        "rope_scaling": scaling is not None,
        "rope_scaling_factor": scaling.factor if scaling is not None else 1.0,
        "rotary_base": int(config.rope_theta) if config.rope_theta == int(config.rope_theta) else config.rope_theta,
        "rotary_percent": config.rotary_percent,
        "seq_len_interpolation_factor": None if factor == 1.0 else factor,
        "seq_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "should_pad_vocab": vocabulary != config.vocab_size,
        "tensor_model_parallel_size": 1,
        "vocab_size": config.vocab_size,
        "window_size": None if config.sliding_window is None else [config.sliding_window - 1, 0],
    }


def _train_state() -> bytes:
    """The state of a training that has not begun."""
    state: dict[str, torch.Tensor] = {
        name: torch.tensor(0)
        for name in ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    }
    state["floating_point_operations_so_far"] = torch.tensor(0.0)
    state |= {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _yaml(content: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Lines of YAML 1.1, which reads 1e-06 as text and 1.0e-06 as a number."""
    for key in sorted(content):
        value = content[key]
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _yaml(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{key}: [{', '.join(map(_scalar, value))}]"
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, float) else str(value)
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}.0{mark}{exponent}" if isinstance(value, float) and mark and "." not in mantissa else text
