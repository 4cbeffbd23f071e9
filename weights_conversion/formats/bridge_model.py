"""The section `model` of Megatron-Bridge's run_config.yaml: the fields of its provider that a model sets.

A provider is Megatron-Core's TransformerConfig and what a GPTModel is built with beside it
(megatron/bridge/models/gpt_provider.py, mla_provider.py of Megatron-Bridge 0.6). A field that is not here has its
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.formats import bridge_gemma

# Features of layers (ModelConfig.layer_features) that the fields below say.
_SAID = {
    *("untied", "shared_norm", "qkv_bias", "qk_norms", "attention", "mla", "q_lora", "q_whole", "dense", "moe"),
    *("full_attention", "expert_bias", "shared_experts", "shared_gate", "biased", "clamped", "mixed_windows"),
}
# Args of Megatron-LM that are fields by the same name, where they are set.
_SAME = ("softmax_type", "glu_linear_offset", "activation_func_clamp_value", "window_attn_skip_freq")
_QUICK_GELU = "megatron.core.fusions.fused_bias_geglu.quick_gelu"
# Args of Megatron-LM that are fields of an MLATransformerConfig, if they are there.
_LATENT = (
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("kv_channels", "rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
)


def check(config: ModelConfig) -> None:
    """Refuses by name what no field here says."""
    features = frozenset().union(*(config.layer_features(layer) for layer in range(config.num_layers)))
    found = [feature.replace("_", " ") for feature in sorted(features - _SAID)]
    scaling = config.rope_scaling
    if config.local_rope_theta is not None:
        bridge_gemma.check(config)
    found += [f"rope scaling of kind {scaling.kind}"] if scaling and scaling.kind not in ("llama3", "yarn") else []
    if found:
        raise ConversionError(
            f"--target megatron-bridge is not written for models with {', '.join(found)}; use --target megatron-core, "
            "which Megatron-Bridge loads with a provider of its own (AutoBridge)"
        )


def section(
    config: ModelConfig, args: Mapping[str, Any], vocabulary: int, dtype: torch.dtype, divisible_by: int
) -> dict[str, Any]:
    """`args` are Megatron-LM's of the same model, `vocabulary` counts the rows that are written."""
    kind = {"_call_": False, "_target_": str(dtype)}
    theta, factor = config.rope_theta, config.rope_scaling_factor
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {
            "_call_": False,
            "_target_": _QUICK_GELU if args.get("quick_geglu") else "torch.nn.functional.silu",
        },
        "add_bias_linear": bool(args.get("add_bias_linear")),
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
        "mtp_num_layers": config.mtp_num_layers or None,
        "normalization": "RMSNorm",
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "num_query_groups": config.num_query_groups,
        "params_dtype": kind,
        "pipeline_model_parallel_size": 1,
        "position_embedding_type": "rope",
        "qk_layernorm": config.qk_layernorm,
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "rotary_percent": config.rotary_percent,
        "seq_len_interpolation_factor": None if factor == 1.0 else factor,
        "seq_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "should_pad_vocab": vocabulary != config.vocab_size,
        "tensor_model_parallel_size": 1,
        "vocab_size": config.vocab_size,
        "window_size": None if config.sliding_window is None else [config.sliding_window - 1, 0],
        **{name: args[name] for name in _SAME if args.get(name) is not None},
        **_scaling(config, args),
        **_experts(config, args),
        **_latent(config, args),
        **(bridge_gemma.section(config) if config.local_rope_theta is not None else {}),
    }


def _scaling(config: ModelConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None or config.mla is not None:
        return {"rope_scaling": False}
    if scaling.kind == "llama3":
        return {"rope_scaling": True, "rope_scaling_factor": scaling.factor}
    return {  # each is stated: the provider's defaults are None, which the rotary embedding cannot take
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_mscale": float(args["mscale"]),
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": scaling.truncate,
    }


def _experts(config: ModelConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's args of experts are named as the fields, but for their number."""
    if config.moe is None:
        return {}
    fields = {name: value for name, value in args.items() if name.startswith("moe_")}
    fields |= {"num_moe_experts": config.moe.num_experts, "moe_router_dtype": "fp32"}
    fields["moe_token_dispatcher_type"] = "alltoall"
    return fields if config.moe.everywhere else fields | _LAYER_BY_LAYER


def _latent(config: ModelConfig, args: Mapping[str, Any]) -> dict[str, Any]:
    if config.mla is None:
        return {}
    return {
        "_target_": "megatron.bridge.models.mla_provider.MLAModelProvider",
        **{name: args[name] for name in _LATENT if name in args},
        "qk_layernorm": True,
        "num_query_groups": config.num_attention_heads,
        **_LAYER_BY_LAYER,
    }


# The provider's own spec is of one kind of layer, and knows no latent attention.
_LAYER_BY_LAYER = {
    "transformer_layer_spec": {
        "_partial_": True,
        "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
        "use_transformer_engine": True,
    }
}
