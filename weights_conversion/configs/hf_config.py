"""config.json <-> ModelConfig, by table, in the spelling of transformers 4 and 5; Meta's params.json -> ModelConfig."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import rope
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import Placed
from weights_conversion.mapping.dialects import Dialect

# ModelConfig field -> config.json key (and the spellings of older releases).
LLAMA_KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings",),
    "layernorm_epsilon": ("rms_norm_eps",),
}
FALCON_KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "vocab_size": ("vocab_size",),
    "layernorm_epsilon": ("layer_norm_epsilon",),
}
# Keys that name what OUT does not hold: code of the source's own (never copied, never run; transformers has a class for
# every family), a weight file by another name, a tokenizer class, which tokenizer_config.json states.
LEFT_BEHIND = ("auto_map", "custom_pipelines", "transformers_weights", "tokenizer_class", "_commit_hash")


def keys_of(family: str) -> dict[str, tuple[str, ...]]:
    return FALCON_KEYS if family == "falcon" else LLAMA_KEYS


def read_config(family: str, raw: Mapping[str, Any], target: Dialect, where: str) -> ModelConfig:
    """The ModelConfig of a config.json. Everything that `target` cannot express is refused by name.

    `where` is the path of the file, for errors.
    """
    try:
        return _read_config(family, raw, target, where)
    except (AttributeError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{where} garbles a field ({type(error).__name__}: {error})") from error


def _read_config(family: str, raw: Mapping[str, Any], target: Dialect, where: str) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in FAMILIES[family].model_types:
        raise ConversionError(
            f"{where} says model_type {model_type!r}, but {family} is {' or '.join(FAMILIES[family].model_types)}; "
            "give the MODEL that the checkpoint is"
        )
    problems = unsupported(family, raw, target, where)
    values: dict[str, Any] = {}
    for name, keys in keys_of(family).items():
        value = next((raw[key] for key in keys if raw.get(key) is not None), None)
        wanted = float if name == "layernorm_epsilon" else int
        if name == "layernorm_epsilon" and value is None:
            value = 1e-5 if family == "falcon" else 1e-6  # transformers' defaults
        if not isinstance(value, (int, wanted)) or isinstance(value, bool) or value <= 0:
            problems.append(f"{where} has {keys[0]} {value!r}, where a positive {wanted.__name__} was expected")
        else:
            values[name] = value
    if problems:
        raise ConversionError(*problems)
    theta, factor = read_rope(raw, where)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if family == "falcon":
        values |= _falcon(raw, heads, hidden)
    else:
        values["num_query_groups"] = raw.get("num_key_value_heads") or heads
        values["head_dim"] = (
            raw.get("head_dim") or FAMILIES[family].config_defaults.get("head_dim") or hidden // heads
        )
        values["sliding_window"] = raw.get("sliding_window") if FAMILIES[family].windowed else None
        values |= dict.fromkeys(FAMILIES[family].features, True)
        values["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    scaling = rope.read_scaling(raw, where)
    config = ModelConfig(family=family, rope_theta=theta, rope_scaling_factor=factor, rope_scaling=scaling, **values)
    _check_heads(config, raw.get("head_dim") is not None and family != "falcon", where)
    return config


def _falcon(raw: Mapping[str, Any], heads: int, hidden: int) -> dict[str, Any]:
    grouped = bool(raw.get("new_decoder_architecture", raw.get("model_type") == "RefinedWeb"))  # its name of old
    kv = raw.get("num_kv_heads") or raw.get("n_head_kv") or heads
    norms = raw.get("num_ln_in_parallel_attn")
    return {
        "ffn_hidden_size": raw.get("ffn_hidden_size") or 4 * hidden,
        "num_query_groups": kv if grouped else 1 if raw.get("multi_query", True) else heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": raw.get("max_position_embeddings") or 2048,
        "num_layernorms": norms if norms in (1, 2) else 2 if grouped else 1,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
    }


def _check_heads(config: ModelConfig, own_head_dim: bool, where: str) -> None:
    heads, groups = config.num_attention_heads, config.num_query_groups
    problems = []
    for name in ("num_query_groups", "head_dim", "max_position_embeddings", "ffn_hidden_size"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) <= 0:
            problems.append(f"{where} has {name} {getattr(config, name)!r}, where a positive number was expected")
    if not problems and heads % groups:
        problems.append(f"{where}: {heads} attention heads cannot be divided among {groups} key/value heads")
    if not own_head_dim and config.hidden_size % heads:
        problems.append(f"{where}: hidden size {config.hidden_size} cannot be divided among {heads} attention heads")
    if not problems and config.head_dim % 2:
        problems.append(f"{where}: heads of {config.head_dim} rows have no rotary pairs; an even number was expected")
    if problems:
        raise ConversionError(*problems)


def unsupported(family: str, raw: Mapping[str, Any], target: Dialect, where: str) -> list[str]:
    """Features of a config.json that the target cannot express, as sentences."""
    found = []
    if raw.get("quantization_config"):
        found.append("quantized weights (quantization_config)")
    if family == "falcon":
        if not target.parallel_attention:
            found.append("falcon's attention in parallel with the MLP (parallel_attn)")
        if raw.get("alibi"):
            found.append("alibi position embeddings (alibi)")
        if not (raw.get("parallel_attn", True) or raw.get("new_decoder_architecture", False)):
            found.append("attention before the MLP instead of beside it (parallel_attn false)")
        if raw.get("bias"):
            found.append("linear layers with bias (bias)")
        if raw.get("activation", "gelu") != "gelu":
            found.append(f"activation {raw['activation']!r}")
    else:
        found += [f"{feature}, which {family} has" for feature in FAMILIES[family].features - target.features]
        for key in ("attention_bias", "mlp_bias"):
            if raw.get(key):
                found.append(f"{key} (linear layers with bias)")
        if raw.get("hidden_act", "silu") != "silu":
            found.append(f"hidden_act {raw['hidden_act']!r}")
        if raw.get("tie_word_embeddings") and not target.ties_heads:
            found.append("a head tied to the embedding (tie_word_embeddings)")
    malformed = []
    for key in ("rope_parameters", "rope_scaling"):
        stated = raw.get(key) or {}
        if not isinstance(stated, Mapping):
            malformed.append(f"{where} has {key} {stated!r}, where an object was expected")
            continue
        kind = stated.get("rope_type", stated.get("type"))
        if kind is not None and kind not in (ropes := [k for k in FAMILIES[family].ropes if k in target.ropes]):
            found.append(f"rope scaling of type {kind!r} (only {', '.join(ropes[1:])})")
        if (stated.get("partial_rotary_factor") or 1.0) != 1.0:
            found.append("rotary embedding on a part of each head (partial_rotary_factor)")
    if (raw.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append("rotary embedding on a part of each head (partial_rotary_factor)")
    sentences = [f"{where} asks for {what}, which {target.name} cannot express" for what in dict.fromkeys(found)]
    return sentences + malformed


def read_rope(raw: Mapping[str, Any], where: str) -> tuple[float, float]:
    """(theta, linear scaling factor) in either spelling. Two that disagree are an error, which names `where`."""
    ropes = [raw.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    for stated, key in zip(ropes, ("rope_parameters", "rope_scaling"), strict=True):
        if not isinstance(stated, Mapping):
            raise ConversionError(f"{where} has {key} {stated!r}, where an object was expected")
    new, old = ropes
    linear = [
        stated.get("factor", "missing") if stated.get("rope_type", stated.get("type")) == "linear" else 1.0
        for stated, present in ((new, "rope_parameters" in raw), (old, raw.get("rope_scaling") is not None))
        if present
    ]
    thetas = [value for value in (new.get("rope_theta"), raw.get("rope_theta")) if value is not None]
    found = []
    for name, values in (("rope_theta", thetas), ("rope scaling factor", linear)):
        for value in values:
            if not (type(value) in (int, float) and 0 < value <= sys.float_info.max):
                raise ConversionError(f"{where} has {name} {value!r}, where a positive number was expected")
        if len(set(values)) > 1:
            raise ConversionError(f"{where} has two values of {name}, {sorted(set(values))}; remove the wrong one")
        found.append(values[0] if values else None)
    theta, factor = found
    return float(theta or 10000.0), float(factor or 1.0)


def read_params(family: str, raw: Mapping[str, Any], tensors: Mapping[str, Placed], where: str) -> ModelConfig:
    """The ModelConfig of Meta's params.json; what it leaves out comes from the tensors' own shapes.

    `where` is the path of the file, for errors.
    """
    context = FAMILIES[family].meta_context
    if context is None:
        raise ConversionError(f"{where} is of Meta's Llama files, and no {family} model was published in them")
    if family == "codellama" and not raw.get("rope_theta"):
        raise ConversionError(f"{where} has no rope_theta, which differs among the Code Llama models; add it")
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
    stated = raw.get("vocab_size", -1)
    if stated not in (-1, None, embedding.rows):
        raise ConversionError(f"{where} says vocab_size {stated}, tok_embeddings.weight has {embedding.rows} rows")
    _check_heads(config, own_head_dim=False, where=where)
    return config


def write_config(config: ModelConfig, base: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json with `config`'s values on top of `base` (the source's own, or {}), for transformers 4 and 5.

    `dtype` is the name of the written weights' type ("bfloat16"). Rope theta and scaling are written in both
    spellings, since each release ignores the other's.
    """
    result = _renamed(base) if config.family == "falcon" else dict(base)
    result = {key: value for key, value in result.items() if key not in LEFT_BEHIND}
    result["architectures"] = [FAMILIES[config.family].hf_class]
    result.setdefault("model_type", FAMILIES[config.family].model_types[0])
    for name, keys in keys_of(config.family).items():
        result[next((key for key in keys if key in result), keys[0])] = getattr(config, name)
    if config.family == "falcon":
        _write_falcon(config, result)
    else:
        result.setdefault("hidden_act", "silu")
        result["num_key_value_heads"] = config.num_query_groups
        implied = FAMILIES[config.family].config_defaults.get("head_dim") is None
        if (
            "head_dim" in result
            or not implied
            or config.head_dim * config.num_attention_heads != config.hidden_size
        ):
            result["head_dim"] = config.head_dim
        result["tie_word_embeddings"] = config.tie_word_embeddings
        if FAMILIES[config.family].windowed:
            result["sliding_window"] = config.sliding_window
    linear = config.rope_scaling_factor != 1.0
    kind = {"rope_type": "linear", "factor": config.rope_scaling_factor} if linear else {"rope_type": "default"}
    if config.rope_scaling is not None:
        linear, kind = True, rope.write_scaling(config.rope_scaling)
    result["rope_theta"] = config.rope_theta
    result["rope_scaling"] = {"type": kind["rope_type"], **kind} if linear else None
    result["rope_parameters"] = {"rope_theta": config.rope_theta, **kind}
    result["torch_dtype"] = result["dtype"] = dtype
    return result


def _renamed(base: Mapping[str, Any]) -> dict[str, Any]:
    """A falcon config without the names of its first release (RefinedWeb), which needed code of its own."""
    if base.get("model_type", "falcon") == "falcon":
        return dict(base)
    gone = ("model_type", "n_layer", "n_head", "n_head_kv")
    result = {key: value for key, value in base.items() if key not in gone}
    result.setdefault("new_decoder_architecture", base["model_type"] == "RefinedWeb")
    return result


def _write_falcon(config: ModelConfig, result: dict[str, Any]) -> None:
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
