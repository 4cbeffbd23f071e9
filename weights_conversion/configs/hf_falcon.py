"""Falcon's config.json, of its first release (RefinedWeb) too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.config import ModelConfig
from weights_conversion.configs.hf_keys import CONFIG_CLASSES

CLASS = CONFIG_CLASSES["FalconForCausalLM"]  # whose heads and norms these keys say
_TYPE = "falcon"  # model_type, since transformers has the class


def read(raw: Mapping[str, Any], full: Mapping[str, Any], heads: int, hidden: int) -> dict[str, Any]:
    """`full` is `raw` with the class's defaults; a config of the first release means what its own code made of it."""
    grouped = bool(raw.get("new_decoder_architecture", raw.get("model_type") == "RefinedWeb"))  # its name of old
    kv = full["num_kv_heads"] or full.get("n_head_kv") or heads
    norms = full["num_ln_in_parallel_attn"]
    return {
        "ffn_hidden_size": full["ffn_hidden_size"] or 4 * hidden,
        "num_query_groups": kv if grouped else 1 if full["multi_query"] else heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": full["max_position_embeddings"] or 2048,
        "num_layernorms": 2 if grouped and norms in (2, None) else 1,
        "tie_word_embeddings": bool(full["tie_word_embeddings"]),
    }


def renamed(base: Mapping[str, Any]) -> dict[str, Any]:
    """A falcon config without the names of its first release (RefinedWeb), which needed code of its own."""
    if base.get("model_type", _TYPE) == _TYPE:
        return dict(base)
    gone = ("model_type", "n_layer", "n_head", "n_head_kv")
    result = {key: value for key, value in base.items() if key not in gone}
    result.setdefault("new_decoder_architecture", base["model_type"] == "RefinedWeb")
    return result


def write(config: ModelConfig, result: dict[str, Any]) -> None:
    base = dict(result)
    grouped = base.get("new_decoder_architecture", config.num_query_groups > 1)
    result["new_decoder_architecture"] = grouped
    result["ffn_hidden_size"] = config.ffn_hidden_size
    result["max_position_embeddings"] = config.max_position_embeddings
    result["num_ln_in_parallel_attn"] = config.num_layernorms if grouped else base.get("num_ln_in_parallel_attn")
    if "num_kv_heads" not in base:
        result["num_kv_heads"] = config.num_query_groups if grouped else config.num_attention_heads
    result.setdefault("multi_query", config.num_query_groups == 1 or grouped)
    for key, value in (("parallel_attn", True), ("alibi", False), ("bias", False)):
        result.setdefault(key, value)
    result["tie_word_embeddings"] = config.tie_word_embeddings
