"""ModelConfig -> config.json, in the spelling of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import hf_falcon, hf_outer, hf_parts, local_rope, windows
from weights_conversion.configs.features import class_of
from weights_conversion.configs.hf_config import LEFT_BEHIND, keys_of


def written_warnings(config: ModelConfig) -> list[str]:
    """What a release of transformers does not make of the written config.json."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if FAMILIES[config.family].bridge_only and (trained := local_rope.trained_warning(config)):
        return [trained]
    if config.moe is not None and config.moe.clamp not in (None, usual := class_of(config.family).clamp):
        return [f"transformers 5.12 and older clamp at {usual:g} whatever config.json says; this model has "
                f"{config.moe.clamp:g}"]  # fmt: skip
    if not class_of(config.family).whole_heads or hidden % heads == 0:
        return []
    return [
        f"transformers 5 refuses {FAMILIES[config.family].hf_class} with a hidden size of {hidden} and {heads} heads, "
        f"which do not divide it, though each is {config.head_dim} wide (head_dim); 4.57 loads the export"
    ]


def is_wrapped(family: str, base: Mapping[str, Any]) -> bool:
    """Whether an export on top of the config `base` is a repository around a text model; made from nothing, it is."""
    outer = FAMILIES[family].outer
    return outer is not None and (hf_outer.KEY in base or (not base and outer.usual))


def write_config(config: ModelConfig, base: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json with `config`'s values on top of `base` (the source's own, or {}), for transformers 4 and 5.

    `dtype` is the name of the written weights' type ("bfloat16"). Rope theta and scaling are written in both
    spellings, since each release ignores the other's.
    """
    outer = FAMILIES[config.family].outer
    if outer is None or not is_wrapped(config.family, base):
        return _write_config(config, base, dtype)
    text = _write_config(config, hf_outer.text_of(base), dtype)
    return hf_outer.around(base, text, outer.model_type, outer.hf_class)


def _write_config(config: ModelConfig, base: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    result = hf_falcon.renamed(base) if class_of(config.family) is hf_falcon.CLASS else dict(base)
    result = {key: value for key, value in result.items() if key not in LEFT_BEHIND}
    result["architectures"] = [FAMILIES[config.family].hf_class]
    result["model_type"] = FAMILIES[config.family].model_types[0]  # transformers' own: kimi_k2 is deepseek_v3 there
    for name, keys in keys_of(config.family).items():
        told = [key for key in keys if key in result or key in class_of(config.family).written]
        result |= dict.fromkeys(told or keys[:1], getattr(config, name))
    if class_of(config.family) is hf_falcon.CLASS:
        hf_falcon.write(config, result)
    else:
        if "hidden_act" in class_of(config.family).defaults:
            result.setdefault("hidden_act", "silu")
        result["num_key_value_heads"] = config.num_query_groups
        hf_parts.write(class_of(config.family), config, result)
        result["tie_word_embeddings"] = config.tie_word_embeddings
        if class_of(config.family).mixed_windows:
            windows.write_hf(config, result)
        elif FAMILIES[config.family].windowed:
            result.pop("layer_types", None)  # the window of before, should training have dropped it
            _write_window(config, result)
    result["torch_dtype"] = result["dtype"] = dtype
    if FAMILIES[config.family].rotary:
        hf_parts.write_rope(class_of(config.family), config, result)
    return result


def _write_window(config: ModelConfig, result: dict[str, Any]) -> None:
    """One window, of all layers. Where a key of its own turns it off, what says the same stays as the source had it."""
    known, window = class_of(config.family), config.sliding_window
    if not known.window_switch:
        result["sliding_window"] = window
        return
    full = known.completed(result)
    if (full.get("sliding_window") if full.get(known.window_switch) else None) != window:
        result |= {known.window_switch: window is not None} | ({} if window is None else {"sliding_window": window})
