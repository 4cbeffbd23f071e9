"""Rope scaling as config.json spells it. Source: transformers' modeling_rope_utils.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from reprlib import repr as short
from typing import Any

from weights_conversion.config import RopeScaling
from weights_conversion.configs import rope_latent
from weights_conversion.configs.foreign_keys import is_plain
from weights_conversion.errors import ConversionError

KEYS = ("rope_parameters", "rope_scaling")
SCALED = ("llama3", "yarn")
_IDLE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def kind_of(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type")) or "default"


def contradictions(rope: Mapping[str, Any], where: str, further: tuple[str, ...] = ()) -> list[str]:
    """What a rope object says beside its own kind, as sentences: transformers 4 and 5 would each make another model."""
    kind, other = rope.get("rope_type"), rope.get("type")
    if kind is not None and other is not None and kind != other:
        return [f"{where} has rope_type {kind!r} and type {other!r}; remove the wrong one"]
    if kind_of(rope) not in ("default", "linear"):
        return []  # the keys of the other kinds are read, and refused, where they are known
    idle = (*_IDLE, *further, "original_max_position_embeddings", *(("factor",) if kind_of(rope) == "linear" else ()))
    return [
        f"{where} has {key} {short(value)}, which rope of type {kind_of(rope)} does not have; "
        "remove it, or state the rope_type that has it"
        for key, value in rope.items()
        if key not in idle and not is_plain(key, value)
    ]


def read_percent(raw: Mapping[str, Any], where: str, default: float) -> float:
    """The part of each head that turns (partial_rotary_factor), wherever it stands; `default` is the class's."""
    places = [raw, *(stated for key in KEYS if isinstance(stated := raw.get(key), Mapping))]
    found = {place["partial_rotary_factor"] for place in places if place.get("partial_rotary_factor") is not None}
    if len(found) > 1:
        raise ConversionError(f"{where} has two values of partial_rotary_factor, {sorted(found)}; remove the wrong one")
    value = next(iter(found), default)
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise ConversionError(f"{where} has partial_rotary_factor {value!r}, where a number up to 1 was expected")
    return float(value)


def read_scaling(raw: Mapping[str, Any], where: str, *, latent: bool = False) -> RopeScaling | None:
    """Llama 3's or yarn's scaling of a config.json, None where it has neither. Two that disagree are an error.

    `latent`: of a model with latent attention, whose softmax yarn scales too.
    """
    found = []
    for key in KEYS:
        rope = raw.get(key)
        if isinstance(rope, Mapping):
            found.append(_scaling(rope, raw, f"{key} of {where}", latent) if kind_of(rope) in SCALED else None)
    if len(set(found)) > 1:
        raise ConversionError(f"{where} has two kinds of rope scaling, in rope_parameters and rope_scaling; remove one")
    return found[0] if found else None


def _scaling(rope: Mapping[str, Any], raw: Mapping[str, Any], where: str, latent: bool) -> RopeScaling:
    kind = kind_of(rope)
    allowed = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    }[kind]
    values: dict[str, Any] = {"kind": kind}
    problems = []
    for key, value in rope.items():
        if key in _IDLE or value is None:
            continue
        if key not in (*allowed, "factor", "original_max_position_embeddings"):
            problems.append(f"the {where} has {key} {value!r}, which is not known for rope scaling of kind {kind}")
        elif key == "truncate":
            values[key] = bool(value)
        elif type(value) not in (int, float) or not 0 <= value < math.inf:
            problems.append(f"the {where} has {key} {value!r}, where a positive number was expected")
        else:
            values[key] = int(value) if key == "original_max_position_embeddings" else float(value)
    if not values.get("factor"):
        problems.append(f"the {where} has no factor, which rope scaling of kind {kind} needs")
    if kind == "llama3" and not values.get("original_max_position_embeddings"):
        problems.append(f"the {where} has no original_max_position_embeddings, which rope scaling of kind llama3 needs")
    if problems:
        raise ConversionError(*problems)
    # transformers: the context of before, where it is not stated, is the model's own
    values.setdefault("original_max_position_embeddings", int(raw.get("max_position_embeddings") or 0))
    if latent:
        return rope_latent.canonical(RopeScaling(**values))
    mscale, all_dim = values.pop("mscale", None), values.pop("mscale_all_dim", None)
    if mscale and all_dim and "attention_factor" not in values:
        on_angles, on_softmax = (rope_latent.yarn_mscale(values["factor"], scale) for scale in (mscale, all_dim))
        values["attention_factor"] = on_angles / on_softmax
    return RopeScaling(**values)


def write_scaling(
    scaling: RopeScaling, *, latent: bool = False, always: Collection[str] = ()
) -> dict[str, Any]:  # fmt: skip
    """The object of config.json, in the keys that transformers 4 and 5 read; `always` are written in any case."""
    result: dict[str, Any] = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    if scaling.kind == "llama3":
        return result | {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if latent:
        return result | rope_latent.write_hf(scaling)
    defaults = {field.name: field.default for field in dataclasses.fields(RopeScaling)}
    for name in ("attention_factor", "beta_fast", "beta_slow", "truncate"):
        if getattr(scaling, name) != defaults[name] or (name in always and scaling.kind == "yarn"):
            result[name] = getattr(scaling, name)
    return result
