"""config.json <-> ModelConfig, by table, in the spelling of transformers 4 and 5."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.configs import (
    features,
    foreign_keys,
    hf_falcon,
    hf_outer,
    hf_parts,
    local_rope,
    quantization,
    rope,
    windows,
)
from weights_conversion.configs.config_class import ConfigClass
from weights_conversion.configs.features import class_of
from weights_conversion.configs.hf_keys import GENERIC
from weights_conversion.errors import ConversionError
from weights_conversion.mapping.dialects import Dialect

# Keys that name what OUT does not hold: code of the source's own (never copied, never run; transformers has a class for
# every family), a weight file by another name, a tokenizer class, which tokenizer_config.json states; how weights were
# quantised, which are not any more.
LEFT_BEHIND = ("auto_map", "custom_pipelines", "transformers_weights", "tokenizer_class", "_commit_hash",
               *quantization.KEYS)  # fmt: skip


# Features that a target has or has not: the others are parts of these.
_OF_TARGETS = frozenset({"moe", "mla", "partial_rotary", "hybrid", "gated_delta", "post_norms", *features.SWITCHES})
# Keys that are read here apart from a class's fields, and say how the weights are stored.
READ = ("rope_parameters", "rope_scaling", "partial_rotary_factor", "layer_types", "n_head_kv")
# Why a key's other value cannot be, where that is not plain to see.
_REASONS = {
    "attention_bias": "it gives attention's output a bias too, which Megatron-Core has with biases of all linear "
    "layers alone (add_bias_linear)",
}


def keys_of(family: str) -> Mapping[str, tuple[str, ...]]:
    return class_of(family).fields


def read_config(family: str, raw: Mapping[str, Any], target: Dialect, where: str) -> ModelConfig:
    """The ModelConfig of a config.json. Everything that `target` cannot express is refused by name.

    `where` is the path of the file, for errors.
    """
    try:
        return _read_config(family, hf_outer.text_of(raw, where), target, where)
    except (AttributeError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{where} garbles a field ({type(error).__name__}: {error})") from error


def _read_config(family: str, raw: Mapping[str, Any], target: Dialect, where: str) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in FAMILIES[family].model_types:
        raise ConversionError(
            f"{where} says model_type {model_type!r}, but {family} is {' or '.join(FAMILIES[family].model_types)}; "
            "give the MODEL that the checkpoint is"
        )
    raw = with_rope(family, raw, where)
    problems = unsupported(family, raw, target, where)
    full = class_of(family).completed(raw)
    values: dict[str, Any] = {}
    full |= hf_parts.read_pattern(class_of(family), full, where)
    for name, keys in keys_of(family).items():
        stated = {key: full[key] for key in keys if full.get(key) is not None}
        value = next(iter(stated.values()), None)
        wanted = float if name == "layernorm_epsilon" else int
        if len(set(map(repr, stated.values()))) > 1:
            problems.append(f"{where} has two values of one field, {stated}; remove the wrong one")
        elif not isinstance(value, (int, wanted)) or isinstance(value, bool) or not 0 < value < math.inf:
            problems.append(f"{where} has {keys[0]} {value!r}, where a positive {wanted.__name__} was expected")
        else:
            values[name] = value
    problems += [
        f"{where} has {key} {full[key]!r}, where true or false was expected"
        for key, default in class_of(family).defaults.items()
        if isinstance(default, bool) and type(full.get(key)) not in (bool, type(None)) and full[key] not in (0, 1)
    ]
    if problems:
        raise ConversionError(*problems)
    theta, factor = read_rope(raw, where, full.get("rope_theta"))
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if class_of(family) is hf_falcon.CLASS:
        values |= hf_falcon.read(raw, full, heads, hidden)
    else:
        groups, head_dim = full["num_key_value_heads"], hf_parts.head_dim(class_of(family), full, where)
        values["num_query_groups"] = heads if groups is None else groups
        values["head_dim"] = hidden // heads if head_dim is None else head_dim
        values["sliding_window"], values["window_layers"] = _windows(family, full, where)
        values |= dict.fromkeys(features.required(family), True)
        values |= {name: bool(full.get(key)) for name, key in class_of(family).flags.items()}
        values |= hf_parts.read(class_of(family), raw, full, values, where)
        values["tie_word_embeddings"] = bool(full["tie_word_embeddings"])
    scaling = rope.read_scaling(raw, where, latent=class_of(family).latent)
    config = ModelConfig(family=family, rope_theta=theta, rope_scaling_factor=factor, rope_scaling=scaling, **values)
    own_head_dim = (
        class_of(family) is not hf_falcon.CLASS and hf_parts.head_dim(class_of(family), full, where) is not None
    ) or config.mla is not None
    check_heads(config, own_head_dim, where)
    return config


def _kinds(layer_types: Any) -> set[str]:
    return {str(kind) for kind in layer_types} if isinstance(layer_types, list) else {str(layer_types)}


def with_rope(family: str, raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`raw` with the rope that its class takes where none is stated, and one rope alone in rope_parameters."""
    if class_of(family).local_rope:
        local_rope.check_spelling(raw, where)
        return local_rope.flat(raw, where)
    default = class_of(family).rope
    if default is None or any(raw.get(key) for key in rope.KEYS):
        return raw
    if "rope_scaling" in raw:
        raise ConversionError(
            f"{where} has rope_scaling null and no rope_parameters, which is {default['rope_type']} of factor "
            f"{default['factor']:g} to transformers 5 and no scaling to 4; state rope_parameters"
        )
    return {**raw, "rope_parameters": dict(default)}


def _windows(family: str, full: Mapping[str, Any], where: str) -> tuple[int | None, windows.Layers]:
    if class_of(family).mixed_windows:
        return windows.read_hf(full, where)
    switch = class_of(family).window_switch
    if not FAMILIES[family].windowed or (switch and not full.get(switch)):
        return None, None
    return windows.read_one(full, where), None


_KEYS = {"num_query_groups": "num_key_value_heads", "ffn_hidden_size": "intermediate_size"}


def check_heads(config: ModelConfig, own_head_dim: bool, where: str) -> None:
    heads, groups = config.num_attention_heads, config.num_query_groups
    problems = []
    for name in ("num_query_groups", "head_dim", "max_position_embeddings", "ffn_hidden_size"):
        if not isinstance(getattr(config, name), int) or getattr(config, name) <= 0:
            shown = f"{name} ({_KEYS[name]})" if name in _KEYS else name
            problems.append(f"{where} has {shown} {getattr(config, name)!r}, where a positive number was expected")
    if not problems and heads % groups:
        problems.append(f"{where}: {heads} attention heads cannot be divided among {groups} key/value heads")
    if not own_head_dim and config.hidden_size % heads:
        problems.append(f"{where}: hidden size {config.hidden_size} cannot be divided among {heads} attention heads")
    turning = config.head_dim * config.rotary_percent
    if not problems and (turning != int(turning) or turning % 2 or not turning):
        problems.append(f"{where}: heads of {turning:g} rows have no rotary pairs; an even number was expected")
    if problems:
        raise ConversionError(*problems)


def lacking(family: str, target: Dialect) -> list[str]:
    """Features that models of `family` may have and `target` has not."""
    return sorted(features.of(family).intersection(_OF_TARGETS).difference(target.features))


def unsupported(family: str, raw: Mapping[str, Any], target: Dialect, where: str) -> list[str]:
    """Features of a config.json that the target cannot express, as sentences."""
    found = []
    if FAMILIES[family].parallel_attention:
        if not target.parallel_attention:
            found.append("falcon's attention in parallel with the MLP (parallel_attn)")
        if not (raw.get("parallel_attn", True) or raw.get("new_decoder_architecture", False)):
            found.append("attention before the MLP instead of beside it (parallel_attn false)")
    else:
        found += [f"{feature}, which {family} has" for feature in lacking(family, target)]
        if raw.get("tie_word_embeddings") and not target.ties_heads:
            found.append("a head tied to the embedding (tie_word_embeddings)")
    malformed, partial = [], "partial_rotary" not in features.of(family)
    for key in ("rope_parameters", "rope_scaling"):
        stated = raw.get(key) or {}
        if not isinstance(stated, Mapping):
            malformed.append(f"{where} has {key} {stated!r}, where an object was expected")
            continue
        kind = stated.get("rope_type", stated.get("type"))
        if kind is not None and kind not in (ropes := [k for k in FAMILIES[family].ropes if k in target.ropes]):
            found.append(f"rope scaling of type {kind!r} (only {', '.join(ropes[1:])})")
        if partial and (stated.get("partial_rotary_factor") or 1.0) != 1.0:
            found.append("rotary embedding on a part of each head (partial_rotary_factor)")
        malformed += rope.contradictions(stated, f"{key} of {where}", class_of(family).rope_idle)
    if partial and (raw.get("partial_rotary_factor") or 1.0) != 1.0:
        found.append("rotary embedding on a part of each head (partial_rotary_factor)")
    sentences = [f"{where} asks for {what}, which {target.name} cannot express" for what in dict.fromkeys(found)]
    return sentences + foreign(family, raw, where) + malformed


def foreign(family: str, raw: Mapping[str, Any], where: str) -> list[str]:
    """What a config.json asks for that no model of `family` computes, as sentences: known keys by value, others by
    name."""
    known, raw = class_of(family), hf_outer.text_of(raw, where)
    reader = FAMILIES[family].hf_class.removesuffix("ForCausalLM") + "Config of transformers"
    problems = [
        f"{where} has {key} {raw[key]!r}, where {family} models have {plain[0]!r}: it cannot be expressed"
        + (f", since {reason}" if raw[key] and (reason := _reason(key, known.completed(raw), known)) else "")
        for key, plain in known.plain.items()
        if key in raw and not any(raw[key] is value or raw[key] == value for value in plain)
        if key != "use_sliding_window"
        or not foreign_keys.idle_window(known.completed(raw), experts=known.experts is not None)
    ]
    problems += quantization.problems(raw, where)
    if raw.get("transformers_weights") not in (None, "model.safetensors", "model.safetensors.index.json"):
        problems.append(
            f"{where} has transformers_weights {raw['transformers_weights']!r}; rename that file to "
            "model.safetensors and remove the key"
        )
    kinds = raw.get("layer_types")
    mixed = FAMILIES[family].windowed or known.pattern or known.gated_delta
    if kinds is not None and not mixed and _kinds(kinds) - {"full_attention"}:
        problems.append(f"{where} has layer_types {sorted(_kinds(kinds))}, where all layers are full_attention")
    read = {*known.plain, *READ, *(key for key in raw if known.knows(key))}
    return problems + foreign_keys.refusals(raw, read, where, reader)


def _reason(key: str, full: Mapping[str, Any], known: ConfigClass) -> str | None:
    """Why what a key asks for cannot be expressed, where its name does not say it."""
    if key != "use_sliding_window":
        return _REASONS.get(key)
    if known.experts is not None:  # max_window_layers is read, or is not
        return "not all layers have the window, and releases of transformers differ in which do"
    return None if full.get("max_window_layers") == 0 else "not all layers have the window"


def unread(family: str, raw: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that nobody here has heard of, and whose names say nothing of the forward pass."""
    known, raw = class_of(family), hf_outer.text_of(raw)
    heard = {*GENERIC, *known.plain, *READ, *LEFT_BEHIND, "head_dim"}  # which counts also where a class has no such key
    return [
        key
        for key, value in raw.items()
        if not (key in heard or known.knows(key) or key.startswith("_") or foreign_keys.is_plain(key, value))
    ]


def read_rope(raw: Mapping[str, Any], where: str, default: float | None = None) -> tuple[float, float]:
    """(theta, linear scaling factor) in either spelling. Two that disagree are an error, which names `where`.

    `default`: the theta of the config class.
    """
    raw = local_rope.flat(hf_outer.text_of(raw, where), where)
    ropes = [raw.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    for stated, key in zip(ropes, ("rope_parameters", "rope_scaling"), strict=True):
        if not isinstance(stated, Mapping):
            raise ConversionError(f"{where} has {key} {stated!r}, where an object was expected")
    new, old = ropes
    linear = [
        stated.get("factor", "missing") if stated.get("rope_type", stated.get("type")) == "linear" else 1.0
        for stated in (new, old)
        if stated
    ]
    places = (new.get("rope_theta"), old.get("rope_theta"), raw.get("rope_theta"))
    thetas = [value for value in places if value is not None]
    found = []
    for name, values in (("rope_theta", thetas), ("rope scaling factor", linear)):
        for value in values:
            if not (type(value) in (int, float) and 0 < value <= sys.float_info.max):
                raise ConversionError(f"{where} has {name} {value!r}, where a positive number was expected")
        if len(set(values)) > 1:
            raise ConversionError(f"{where} has two values of {name}, {sorted(set(values))}; remove the wrong one")
        found.append(values[0] if values else None)
    theta, factor = found
    return float(theta or default or 10000.0), float(factor or 1.0)
