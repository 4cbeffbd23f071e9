"""Meta's params.json -> ModelConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import foreign_keys
from weights_conversion.configs.hf_config import check_heads
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import Placed

# What Meta's files state and what is read here; the last line decides nothing of the model.
KNOWN = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps", "rope_theta"),
    *("multiple_of", "ffn_dim_multiplier"),  # of the MLP, whose size the tensors show
    *("max_seq_len", "max_batch_size", "model_parallel_size"),
)


def read_params(family: str, raw: Mapping[str, Any], tensors: Mapping[str, Placed], where: str) -> ModelConfig:
    """The ModelConfig of Meta's params.json; what it leaves out comes from the tensors' own shapes.

    `where` is the path of the file, for errors.
    """
    context = FAMILIES[family].meta_context
    if context is None:
        raise ConversionError(f"{where} is of Meta's Llama files, and no {family} model was published in them")
    if FAMILIES[family].meta_states_theta and not raw.get("rope_theta"):
        raise ConversionError(f"{where} has no rope_theta, which differs among the Code Llama models; add it")
    for key in ("quantization_args", "lora_args"):
        if raw.get(key):
            raise ConversionError(f"{where} has {key}: the weights are quantized; take the release that is not")
    if problems := foreign_keys.refusals(raw, KNOWN, where, f"{family} of Meta's files"):
        raise ConversionError(*problems)
    embedding, first = tensors.get("tok_embeddings.weight"), tensors.get("layers.0.feed_forward.w1.weight")
    if embedding is None or first is None:
        raise ConversionError(
            "the consolidated files hold no tok_embeddings.weight and layers.0.feed_forward.w1.weight"
        )
    try:
        hidden, heads = int(raw["dim"]), int(raw["n_heads"])
        config = ModelConfig(
            family=family,
            num_layers=int(raw["n_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=first.rows,
            num_attention_heads=heads,
            num_query_groups=int(raw.get("n_kv_heads") or heads),
            head_dim=hidden // heads,
            vocab_size=embedding.rows,
            max_position_embeddings=context,
            layernorm_epsilon=float(raw["norm_eps"]),
            rope_theta=float(raw.get("rope_theta") or 10000.0),
        )
    except (KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{where} lacks or garbles a field ({type(error).__name__}: {error})") from error
    _check_sizes(config, raw, where)
    stated = raw.get("vocab_size", -1)
    if stated not in (-1, None, embedding.rows):
        raise ConversionError(f"{where} says vocab_size {stated}, tok_embeddings.weight has {embedding.rows} rows")
    for key, found in (("head_dim", config.head_dim), ("hidden_dim", first.rows)):
        if raw.get(key) not in (None, found):
            raise ConversionError(f"{where} says {key} {raw[key]!r}, but its model has {found}")
    check_heads(config, own_head_dim=False, where=where)
    return config


def _check_sizes(config: ModelConfig, raw: Mapping[str, Any], where: str) -> None:
    """Raises ConversionError where a size or number of params.json is not positive."""
    sizes = {
        "dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_query_groups, "norm_eps": config.layernorm_epsilon, "rope_theta": config.rope_theta,
    }  # fmt: skip
    if wrong := [f"{key} {raw.get(key)!r}" for key, size in sizes.items() if not (size > 0 and math.isfinite(size))]:
        raise ConversionError(f"{where} has {', '.join(wrong)}, where a positive number was expected")
