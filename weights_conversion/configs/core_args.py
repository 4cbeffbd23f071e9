"""Megatron-Core's args: written for Megatron-LM, and read, respelled as Megatron-LLM's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import Mla, ModelConfig, Parallelism
from weights_conversion.configs import (
    core_table,
    features,
    gated_delta,
    mamba,
    megatron_args,
    mla,
    moe,
    rope_core,
    windows,
)
from weights_conversion.errors import ConversionError

# Megatron-Core's name -> Megatron-LLM's, where they differ and the value is the same.
_RESPELLED = {"num_query_groups": "num_attention_heads_kv", "rotary_base": "rope_theta"}
# Args that Megatron-LM has since 0.19, where the factor reaches the model.
_SINCE_019 = ("yarn_original_max_position_embeddings", "logits_load_dir")
# The second is the name of a flag and of older releases: 0.19 restores it, and has no such arg.
_ZERO_CENTRED = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
_FACTORS = ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor")
_PLACES = {
    "rope_scaling_factor": _FACTORS,
    "rope_scaling": ("use_rope_scaling", "rope_scaling", "scale_factor", "position_embedding_type"),
    "sliding_window_size": ("window_size",),
    "window_layers": (windows.ARG,),
    "moe": ("num_experts", "num_moe_experts"),
    "mla": ("multi_latent_attention",),
    "mtp_num_layers": ("mtp_num_layers",),
    "mamba": ("hybrid_layer_pattern",),
    "gated_delta": ("experimental_attention_variant", "linear_attention_freq"),
}


def write_args(
    config: ModelConfig, parallel: Parallelism, *, dtype: torch.dtype, divisible_by: int, ckpt_format: str,
    vocabulary: int | None, layer_freq: int | list[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Args of plain types, for Megatron-LM's --use-checkpoint-args. `vocabulary` None: each run pads for its own TP.

    `layer_freq` is --moe-layer-freq, by default as core_layer_freq chooses it.
    """
    args: dict[str, Any] = {
        **_model_args(config),
        "make_vocab_size_divisible_by": divisible_by,
        "tokenizer_type": "Llama2Tokenizer",
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "expert_model_parallel_size": 1,
        **megatron_args.virtual_stages(config, parallel),
        **moe.write_core(config, layer_freq),
        **mla.write_core(config),
        **gated_delta.write_core(config),
        "mtp_num_layers": config.mtp_num_layers or None,
        **mamba.write_core(config),
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
    args |= FAMILIES[config.family].own_args
    if FAMILIES[config.family].windowed:
        args[windows.ARG] = windows.skip_freq(config)
    if vocabulary is not None:
        args["padded_vocab_size"] = vocabulary
    return args


def _model_args(config: ModelConfig) -> dict[str, Any]:
    """Those of a model's layers, but for experts and latent attention."""
    return {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **rope_core.write_core(config),
        "add_position_embedding": True,
        "rotary_base": _whole(config.rope_theta),
        "rotary_percent": config.rotary_percent,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": factor if (factor := _whole(config.rope_scaling_factor)) != 1 else None,
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "swiglu": True,
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "normalization": "RMSNorm",
        "norm_epsilon": config.layernorm_epsilon,
        "layernorm_epsilon": config.layernorm_epsilon,
        **dict.fromkeys(_ZERO_CENTRED, config.layernorm_zero_centered_gamma),
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "window_size": _window(config),
    }


def _whole(value: float) -> float:
    """An int where it can be one: Megatron-LM's flags are whole numbers."""
    return int(value) if value == int(value) else value


def _window(config: ModelConfig) -> tuple[int, int] | None:
    """Megatron-Core counts the tokens to the left; Hugging Face's window includes the token itself."""
    return None if config.sliding_window is None else (config.sliding_window - 1, 0)


def training_flags(config: ModelConfig, dtype: torch.dtype, router: str | None = "fp32") -> list[str]:
    """What --use-checkpoint-args does not restore, or not in every release (the rotary base).

    `router`: the type of its scores, as moe.router_dtype has it.
    """
    flags = [f"--norm-epsilon {config.layernorm_epsilon}"]
    if FAMILIES[config.family].rotary:
        flags.append(f"--rotary-base {_whole(config.rope_theta)}")
    flags += [*windows.core_flags(config), *FAMILIES[config.family].own_flags]
    if config.rope_scaling_factor != 1.0:
        flags.append(f"--rotary-seq-len-interpolation-factor {_whole(config.rope_scaling_factor)}")
    if config.rotary_percent != 1.0:
        flags.append(f"--rotary-percent {config.rotary_percent:g}")  # restored, not by every release
    flags += [*gated_delta.core_flags(config), *mla.core_flags(config), *rope_core.core_flags(config)]
    flags += moe.core_flags(config, router)
    if config.attention_output_gate:
        flags.append("--attention-output-gate")
    if config.layernorm_zero_centered_gamma:
        flags.append("--apply-layernorm-1p")
    if config.mtp_num_layers:
        flags.append(f"--mtp-num-layers {config.mtp_num_layers}")
    if config.hybrid_layer_pattern is not None:
        flags.append("(pretrain_hybrid.py)")
    if config.qk_layernorm:
        flags.append("--qk-layernorm")
    if dtype in (torch.bfloat16, torch.float16):
        flags.append("--bf16" if dtype is torch.bfloat16 else "--fp16")
    return flags


def training_warnings(config: ModelConfig) -> list[str]:
    """What no flag of training can be given."""
    factor = config.rope_scaling_factor
    if factor == 1.0:
        further = [*moe.core_warnings(config), *gated_delta.core_warnings(config)]
        return [*rope_core.core_warnings(config), *mla.core_warnings(config), *further]
    if factor != int(factor):
        return [
            "Megatron-LM reads --rotary-seq-len-interpolation-factor as a whole number, this model needs "
            f"{factor}: set seq_len_interpolation_factor in its code"
        ]
    return [
        "--rotary-seq-len-interpolation-factor reaches the model in Megatron-LM 0.19 and newer (a HybridModel: 0.18); "
        f"older releases read it and never use it: set seq_len_interpolation_factor {factor:g} in their code"
    ]


def unused_factor(args: Mapping[str, Any], iteration: int | str, folder: Path) -> list[str]:
    """A sentence on a linear scaling that args of a training run before 0.19 name, which never reached its model.

    A release folder is a conversion's, whose args say what the model has.
    """
    factor = args.get(_FACTORS[0])
    if factor in (None, 1) or iteration == "release" or any(name in args for name in _SINCE_019):
        return []
    return [
        f"the args of {folder} say {_FACTORS[0]} {factor}, which Megatron-LM before 0.19 reads and never uses (a "
        f"HybridModel: before 0.18); --rope_scaling_factor says what it was trained with: 1, or {factor} if its code "
        "was changed or is newer"
    ]


def normalise(args: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Plain args in Megatron-LLM's names. A model that is none of the families is refused by name."""
    args = gated_delta.of_text(args)
    problems = [
        f"{folder} holds a model with {what} ({name} is {args[name]!r}), which is none of the supported families"
        for name, what in core_table.foreign(args, features.everywhere()).items()
    ]
    factor, window = _factor(args, folder, problems), _left(args, folder, problems)
    experts, latents, states = moe.read_core(args), mla.read_core(args), mamba.read_core(args)
    delta = gated_delta.read_core(args)
    for part in (experts, latents, states, delta):
        if isinstance(part, list):
            problems += [f"the args of {folder} have {what}" for what in part]
    if problems:
        raise ConversionError(*dict.fromkeys(problems))
    result = dict(args)
    # By this flag Megatron-LLM's resharding tool is known, which loses values; NVIDIA's sets it too, and keeps them.
    result.pop("use_cpu_initialization", None)
    for theirs, ours in _RESPELLED.items():
        if args.get(theirs) is not None:
            result[ours] = args[theirs]
    if args.get("group_query_attention") is False or result.get("num_attention_heads_kv") is None:
        result["num_attention_heads_kv"] = args.get("num_attention_heads")
    if args.get("norm_epsilon") is not None:
        result["layernorm_epsilon"] = args["norm_epsilon"]
    if result.get("rope_theta") is not None:
        result["rope_theta"] = float(result["rope_theta"])
    result["rope_scaling_factor"] = factor  # linear; Megatron-Core's arg of this name is Llama 3's
    result["rope_scaling"] = rope_core.read_core(args, f"the args of {folder}")
    result["_is_factor_assumed"] = rope_core.assumed_factor(args)
    result["sliding_window_size"] = None if window is None else window + 1
    result["window_layers"] = windows.read_core(args, f"the args of {folder}")
    if any(name in args for name in _ZERO_CENTRED):
        result[_ZERO_CENTRED[0]] = any(args.get(name) for name in _ZERO_CENTRED)
    result |= {"moe": experts, "mla": latents, "mamba": states, "gated_delta": delta}
    result["mtp_num_layers"] = args.get("mtp_num_layers") or 0
    if isinstance(latents, Mla):  # a head is what turns; its norms of latents are not those of heads
        result |= {"kv_channels": latents.qk_pos_emb_head_dim, "qk_layernorm": False}
        result["num_attention_heads_kv"] = args.get("num_attention_heads")
    # Not every wrapper stores every arg: what has no place in them is not said to be absent.
    for name, places in _PLACES.items():
        if not any(place in args for place in places):
            result.pop(name)
    if args.get("untie_embeddings_and_output_weights") is not None:
        result["tie_embed_logits"] = not args["untie_embeddings_and_output_weights"]
    elif args.get("share_embeddings_and_output_weights") is not None:
        result["tie_embed_logits"] = bool(args["share_embeddings_and_output_weights"])
    if result.get("max_position_embeddings") is None:
        result["max_position_embeddings"] = args.get("seq_length")
    return result


def _factor(args: Mapping[str, Any], folder: Path, problems: list[str]) -> float:
    """Linear scaling of positions."""
    for name in _FACTORS:
        value = args.get(name)
        if value is not None:
            if type(value) in (int, float) and 0 < value < math.inf:
                return float(value)
            problems.append(f"the args of {folder} have {name} {value!r}, where a positive number was expected")
    return 1.0


def _left(args: Mapping[str, Any], folder: Path, problems: list[str]) -> int | None:
    """Tokens that attention sees to the left of its own, None: all."""
    window = args.get("window_size")
    if window is None:
        return None
    if isinstance(window, (list, tuple)) and len(window) == 2 and all(type(side) is int for side in window):
        left, right = window
        if right in (0, -1) and -1 <= left < 1 << 31:  # a causal mask cuts the right side off anyway
            return None if left == -1 else left
    problems.append(f"the args of {folder} have window_size {window!r}, where (tokens to the left, 0) was expected")
    return None
