"""Parts of a config.json that not every class has: experts, latent attention, a part of each head, further layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from weights_conversion.config import Mla, ModelConfig
from weights_conversion.configs import gated_delta, layer_pattern, local_rope, mamba, mla, moe, rope
from weights_conversion.configs.config_class import ConfigClass
from weights_conversion.errors import ConversionError


def read(
    known: ConfigClass, raw: Mapping[str, Any], full: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Experts, latent attention, the part of each head that turns, and layers that predict further tokens."""
    found: dict[str, Any] = {"rotary_percent": rope.read_percent(raw, where, known.rotary_percent)}
    pattern = full.get("pattern")
    if known.experts is not None and (pattern is None or "E" in pattern):
        found["moe"] = moe.read_hf(known, full, values["num_layers"])
    if pattern is not None:
        found["hybrid_layer_pattern"] = pattern
        found["mamba"] = mamba.read_hf(full) if "M" in pattern else None
        epsilon = mamba.epsilon_problem(pattern, values["layernorm_epsilon"])
        found["norm"] = [] if epsilon is None else [epsilon]
    if known.latent:
        found["mla"] = sizes = mla.read_hf(full, own_head_dim="head_dim" not in known.defaults)
        if isinstance(sizes, Mla):  # the part of a head that turns is a head of its own
            found |= {"head_dim": sizes.qk_pos_emb_head_dim, "num_query_groups": values["num_attention_heads"]}
    if known.gated_delta:
        found["gated_delta"] = gated_delta.read_hf(full, values["num_layers"])
    if known.local_rope:
        found |= local_rope.read_hf(full, where)
    if problems := [f"{where} has {what}" for part in found.values() if isinstance(part, list) for what in part]:
        raise ConversionError(*problems)
    further = {full[key] for key in known.further if full.get(key) is not None}
    if len(further) > 1 or not all(type(number) is int and number >= 0 for number in further):
        raise ConversionError(f"{where} has {known.further[0]} {sorted(map(repr, further))}, where one number "
                              "of layers was expected")  # fmt: skip
    found.pop("norm", None)
    return found | {"mtp_num_layers": next(iter(further), 0)}


def head_dim(known: ConfigClass, full: Mapping[str, Any], where: str) -> Any:
    """The size of a head by any of its keys; None: none says it."""
    stated = {key: full[key] for key in known.spellings("head_dim") if full.get(key) is not None}
    if len(set(map(repr, stated.values()))) > 1:
        raise ConversionError(f"{where} has two values of one field, {stated}; remove the wrong one")
    return next(iter(stated.values()), None)


def read_pattern(known: ConfigClass, full: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the layers are, and their number with it, where a class says so: as "pattern" and num_hidden_layers."""
    if not known.pattern:
        return {}
    pattern = layer_pattern.read_hf(known.pattern, full)
    if isinstance(pattern, list):
        raise ConversionError(*(f"{where} has {what}" for what in pattern))
    return {"pattern": pattern, "num_hidden_layers": len(pattern)}


def with_further_layers(
    known: ConfigClass, config: ModelConfig, names: Collection[str]
) -> tuple[ModelConfig, list[str]]:
    """The config with as many layers that predict further tokens as files hold, and a note where it says others.

    Their weights stand behind the last layer's, as `model.layers.{num_layers}`, or beside the model, as `mtp.layers.0`.
    transformers knows their number at most, and neither loads nor saves them.
    """
    if not known.predicts:
        return config, []
    pattern, first = (r"mtp\.layers\.", 0) if known.mtp_apart else (r"model\.layers\.", config.num_layers)
    numbers = {int(match[1]) for name in names if (match := re.match(rf"{pattern}(\d{{1,6}})\.", name))}
    found = 0
    while first + found in numbers:
        found += 1
    if known.mtp_apart:
        _check_apart(config, found)
    if found and config.mtp_num_layers == 0:
        return replace(config, mtp_num_layers=found), []
    if found or config.mtp_num_layers == 0:
        return config, []
    note = (
        f"config     {known.further[0]} is {config.mtp_num_layers}, and the files hold no such layer: the model "
        "is taken to have none"
    )
    return replace(config, mtp_num_layers=0), [note]


def _check_apart(config: ModelConfig, found: int) -> None:
    """Raises ConversionError for prediction layers that Megatron-Core cannot have as Hugging Face's code has them."""
    problems = []
    if found > 1:
        problems.append(
            f"the files hold {found} layers below mtp. that share one projection (mtp.fc), where Megatron-Core has one "
            "for each: no more than one can be expressed"
        )
    if found and config.gated_delta is not None and config.gated_delta.layers[-1]:
        problems.append(
            "the files hold a layer that predicts a further token (mtp.) with full attention, and the last layer has "
            "linear attention: Megatron-Core makes the one as the other"
        )
    if problems:
        raise ConversionError(*problems)


def write(known: ConfigClass, config: ModelConfig, result: dict[str, Any]) -> None:
    """The size of a head, switches, experts, latent attention, kinds of layers and further layers."""
    usual = config.head_dim * config.num_attention_heads == config.hidden_size or config.mla is not None
    if "head_dim" in result or known.defaults.get("head_dim") is not None or not usual:
        result |= {key: config.head_dim for key in known.spellings("head_dim") if key == "head_dim" or key in result}
    result.update({key: getattr(config, name) for name, key in known.flags.items()})
    for key, value in known.written.items():
        result.setdefault(key, value)
    if config.moe is not None:
        moe.write_hf(known, config.moe, result)
    if config.mla is not None:
        mla.write_hf(config.mla, result)
    if config.hybrid_layer_pattern is not None:
        layer_pattern.write_hf(known.pattern, config.hybrid_layer_pattern, result)
    if config.mamba is not None:
        mamba.write_hf(config.mamba, result)
    if config.gated_delta is not None:
        gated_delta.write_hf(config.gated_delta, result)
    if known.local_rope:
        local_rope.write_hf(config, result)
    further = known.further
    if further:
        result.update(dict.fromkeys([further[0], *(key for key in further if key in result)], config.mtp_num_layers))


def write_rope(known: ConfigClass, config: ModelConfig, result: dict[str, Any]) -> None:
    """Theta and scaling in the spelling of transformers 4 and of 5, since each release ignores the other's."""
    linear = config.rope_scaling_factor != 1.0
    kind = {"rope_type": "linear", "factor": config.rope_scaling_factor} if linear else {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling, latent = config.rope_scaling, config.mla is not None
        linear, kind = True, rope.write_scaling(scaling, latent=latent, always=known.rope or ())
    partial = {"partial_rotary_factor": config.rotary_percent} if known.rotary_percent != 1.0 else {}
    said = [value for key in ("rope_scaling", "rope_parameters") if isinstance(value := result.get(key), dict)]
    stated = {key: value for each in said for key, value in each.items()}
    kept = {key: stated[key] for key in known.rope_idle if key in stated}
    result["rope_theta"] = config.rope_theta
    result["rope_scaling"] = {"type": kind["rope_type"], **kind} if linear else None
    result |= {"rope_parameters": {"rope_theta": config.rope_theta, **kind, **partial, **kept}, **partial}
    if known.local_rope:
        local_rope.write_rope(config, result)
