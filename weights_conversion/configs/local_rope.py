"""Gemma 3's attention in config.json: a rope of its own for layers with a window, a scale of its own for the scores.

Source: configuration_gemma3.py of transformers 4.57 and 5.24. What Megatron-Bridge says of it: formats/bridge_gemma.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError

FULL, LOCAL = "full_attention", "sliding_attention"  # the keys of rope_parameters, by the kind of layers
_KEY, _SCALAR, _PATTERN = "rope_local_base_freq", "query_pre_attn_scalar", "sliding_window_pattern"
_POST_EPSILON = 1e-5  # of norms behind attention and MLP in Megatron-Bridge
_PLAIN = (None, "default")


def check_spelling(raw: Mapping[str, Any], where: str) -> None:
    """Raises ConversionError for a scaling whose kind transformers 5 does not read: it sets rope_type before."""
    scaling = raw.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type") is None and scaling.get("type") not in _PLAIN:
        raise ConversionError(
            f"{where} has rope_scaling with type {scaling['type']!r} and no rope_type, which transformers 4 reads as "
            "that, and 5 as no scaling; rename type to rope_type"
        )


def flat(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`raw` in the spelling of transformers 4, where rope_parameters has a rope for each kind of layers."""
    ropes = raw.get("rope_parameters")
    if not isinstance(ropes, Mapping) or not {FULL, LOCAL} & set(ropes):
        return raw
    full, local = (ropes.get(kind) or {} for kind in (FULL, LOCAL))
    if set(ropes) - {FULL, LOCAL} or not isinstance(full, Mapping) or not isinstance(local, Mapping):
        raise ConversionError(f"{where} has rope_parameters {ropes!r}, where a rope of {FULL} and {LOCAL} was expected")
    further = {key: value for key, value in local.items() if key not in ("rope_type", "type", "rope_theta")}
    if local.get("rope_type", local.get("type")) not in (None, "default") or further:
        raise ConversionError(
            f"{where} has rope_parameters {dict(local)} for {LOCAL}, which is scaled only for {FULL}: it cannot be "
            "expressed"
        )
    stated = [value for value in (local.get("rope_theta"), raw.get(_KEY)) if value is not None]
    if len(set(map(repr, map(_whole, stated)))) > 1:
        raise ConversionError(f"{where} has two values of {_KEY}, {stated}; remove the wrong one")
    return {**raw, "rope_parameters": full, **({_KEY: stated[0]} if stated else {})}


def read_hf(full: Mapping[str, Any], where: str) -> dict[str, Any]:
    """ModelConfig's fields. `full` has the class's defaults."""
    theta, scalar = _positive(full, _KEY, where), _positive(full, _SCALAR, where)
    return {"local_rope_theta": float(theta), "query_pre_attn_scalar": _whole(scalar)}


def write_hf(config: ModelConfig, result: dict[str, Any]) -> None:
    result[_SCALAR] = config.query_pre_attn_scalar
    every = config.window_period
    if every is None:
        result.pop(_PATTERN, None)
    elif result.get(_PATTERN) is None or config.window_layers is not None:
        result[_PATTERN] = every


def write_rope(config: ModelConfig, result: dict[str, Any]) -> None:
    """In both spellings, of which each release ignores the other's. rope_parameters is that of full attention yet."""
    result[_KEY] = config.local_rope_theta
    local = {"rope_theta": config.local_rope_theta, "rope_type": "default"}
    result["rope_parameters"] = {FULL: result["rope_parameters"], LOCAL: local}


def trained_warning(config: ModelConfig) -> str | None:
    """What a config.json cannot say of a model that Megatron-Bridge trained."""
    if config.layernorm_epsilon == _POST_EPSILON:
        return None
    return (
        f"Megatron-Bridge 0.6 trains the norms behind attention and MLP with epsilon {_POST_EPSILON:g}, and "
        f"config.json has one for all norms, {config.layernorm_epsilon:g}: logits differ by some 1e-3 from those there"
    )


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _positive(full: Mapping[str, Any], key: str, where: str) -> float:
    if not _is_positive(full.get(key)):
        raise ConversionError(f"{where} has {key} {full.get(key)!r}, where a positive number was expected")
    return full[key]


def _whole(value: Any) -> Any:
    """An int where it is one, as transformers' class wants it; what is no number, as it is."""
    if not _is_positive(value):
        return value
    return int(value) if value == int(value) else value
