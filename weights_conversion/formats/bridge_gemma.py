"""Gemma 3 in the section `model` of Megatron-Bridge's run_config.yaml: a provider with layers of its own.

It says in its own words which layers have a window, two ropes, and a scale of the scores. Sources:
megatron/bridge/models/gemma/gemma3_provider.py, gemma_vl/gemma3_vl_provider.py and common/te_layers.py of
Megatron-Bridge 0.6.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError

_USUAL = 6  # all layers but every sixth have the window
_SCALAR = 256  # the provider's default of what scores are divided by the root of
_MODULE = "megatron.bridge.models.gemma.gemma3_provider"
_PROVIDER = re.compile(r"\.gemma3(_vl)?_provider(\.|$)")
_POST_EPSILON = 1e-5  # of the norms behind attention and MLP: the default of a class, which is not given the model's


def check(config: ModelConfig) -> None:
    """Raises ConversionError for layers that the provider's pattern cannot say."""
    if config.window_period is None:
        layers = [str(layer) for layer in range(config.num_layers) if config.window_of(layer) is None]
        raise ConversionError(
            "Megatron-Bridge's Gemma 3 has full attention in every N-th layer (interleaved_attn_pattern), and this "
            f"model has it in layers {', '.join(layers)} of {config.num_layers}, counted from 0: that cannot be said"
        )


def section(config: ModelConfig) -> dict[str, Any]:
    """Fields of Gemma3ModelProvider, over those that every provider has."""
    return {
        "_target_": f"{_MODULE}.Gemma3ModelProvider",
        "activation_func": {"_call_": False, "_target_": "megatron.core.activations.fast_gelu"},
        "interleaved_attn_pattern": [(config.window_period or 1) - 1, 1],
        "layernorm_zero_centered_gamma": True,
        "rope_scaling": False,
        "rope_scaling_factor": config.rope_scaling_factor,  # linear here, and of full attention alone
        "rotary_base": [config.local_rope_theta, config.rope_theta],
        "seq_len_interpolation_factor": None,
        "softmax_scale": 1.0 / math.sqrt(config.query_pre_attn_scalar or config.head_dim),
        "transformer_layer_spec": {"_call_": False, "_target_": f"{_MODULE}.gemma3_layer_spec"},
        "window_attn_skip_freq": None,
        "window_size": config.sliding_window,
    }


def in_core_words(args: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A Gemma 3's provider (with vision or without) in the words of Megatron-Core's args; others' as they are."""
    if not any(_PROVIDER.search(str(args.get(name))) for name in ("_target_", "transformer_layer_spec")):
        return args
    if problems := _problems(args):
        raise ConversionError(*(f"{where} have {problem}" for problem in problems))
    own = ("interleaved_attn_pattern", "is_vision_language", "softmax_scale", "transformer_layer_spec")
    kept = {name: value for name, value in args.items() if name not in (*own, "rope_scaling_factor", "rope_scaling")}
    (local, theta), window, scale = args["rotary_base"], args.get("window_size"), args.get("softmax_scale")
    return {
        **kept,
        "rotary_base": theta,
        "local_rope_theta": float(local),
        "query_pre_attn_scalar": _SCALAR if scale is None else _whole(1.0 / scale**2),
        "seq_len_interpolation_factor": args.get("rope_scaling_factor"),
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": _period(args),
    }


def _problems(args: Mapping[str, Any]) -> list[str]:
    """What is not as a provider has it, in words that follow "have"."""
    bases, pattern, window = (args.get(name) for name in ("rotary_base", "interleaved_attn_pattern", "window_size"))
    found = []
    if not (isinstance(bases, (list, tuple)) and len(bases) == 2 and all(map(_is_positive, bases))):
        found.append(f"rotary_base {bases!r}, where that of layers with a window and that of the others were expected")
    if (period := _period(args)) <= 0:
        found.append(f"interleaved_attn_pattern {pattern!r}, where two numbers of layers were expected")
    if not (type(window) is int and window > 0) and (window is not None or period > 1):
        found.append(f"window_size {window!r}, where a number of tokens was expected")
    for name in ("softmax_scale", "rope_scaling_factor"):
        if args.get(name) is not None and not _is_positive(args[name]):
            found.append(f"{name} {args[name]!r}, where a positive number was expected")
    if args.get("seq_len_interpolation_factor") not in (None, 1):
        found.append(
            f"seq_len_interpolation_factor {args['seq_len_interpolation_factor']!r}, which scales the rope of layers "
            "with a window too: it cannot be expressed"
        )
    return found


def _period(args: Mapping[str, Any]) -> int:
    """Which layers have full attention: every so many-th; 0 where that is not well said."""
    pattern = args.get("interleaved_attn_pattern")
    if pattern is None:
        return _USUAL
    numbers = isinstance(pattern, (list, tuple)) and len(pattern) == 2 and all(type(n) is int for n in pattern)
    return sum(pattern) if numbers and min(pattern) >= 0 else 0


def warnings(config: ModelConfig) -> list[str]:
    """What Megatron-Bridge makes of the model's epsilon."""
    if config.layernorm_epsilon == _POST_EPSILON:
        return []
    return [
        f"Megatron-Bridge 0.6 computes the norms behind attention and MLP with epsilon {_POST_EPSILON:g}, whatever "
        f"layernorm_epsilon says (TERowParallelLinearLayerNorm in its models/common/te_layers.py); this model has "
        f"{config.layernorm_epsilon:g}: pass eps=config.layernorm_epsilon there, or its logits are off by some 1e-3"
    ]


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _whole(value: float) -> float:
    """Without what rounding has left of it; an int where it is one, as transformers' class wants it."""
    near = float(f"{value:.12g}")
    return int(near) if near == int(near) else near
