"""Rope scaling as config.json and as Megatron-Core's args spell it.

Sources: transformers' modeling_rope_utils.py; Megatron-Core's rotary_pos_embedding.py (Llama 3's constants) and
yarn_rotary_pos_embedding.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from reprlib import repr as short
from typing import Any

from weights_conversion.config import ModelConfig, RopeScaling
from weights_conversion.configs import rope_latent
from weights_conversion.configs.foreign_keys import is_plain
from weights_conversion.errors import ConversionError

KEYS = ("rope_parameters", "rope_scaling")
SCALED = ("llama3", "yarn")
# What Megatron-Core applies under --use-rope-scaling: constants in its code.
CORE_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CORE_LLAMA3_FACTOR = 8.0
_MSCALES = ("mscale", "mscale_all_dim")
_IDLE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def kind_of(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type")) or "default"


def contradictions(rope: Mapping[str, Any], where: str) -> list[str]:
    """What a rope object says beside its own kind, as sentences: transformers 4 and 5 would each make another model."""
    kind, other = rope.get("rope_type"), rope.get("type")
    if kind is not None and other is not None and kind != other:
        return [f"{where} has rope_type {kind!r} and type {other!r}; remove the wrong one"]
    if kind_of(rope) not in ("default", "linear"):
        return []  # the keys of the other kinds are read, and refused, where they are known
    idle = (*_IDLE, "original_max_position_embeddings", *(("factor",) if kind_of(rope) == "linear" else ()))
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
        values["attention_factor"] = _mscale(values["factor"], mscale) / _mscale(values["factor"], all_dim)
    return RopeScaling(**values)


def _mscale(factor: float, scale: float = 1.0) -> float:
    """Yarn's factor on cos and sin."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


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


def write_core(config: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's args of the scaling, those of a model without any included."""
    scaling = config.rope_scaling
    args: dict[str, Any] = {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "use_rope_scaling": False,
        "rope_scaling_factor": CORE_LLAMA3_FACTOR,
        "rotary_scaling_factor": 1.0,
    }
    if (
        scaling is not None
        and scaling.kind == "yarn"
        and scaling.factor <= 1
        and scaling.attention_factor not in (None, 1)
    ):
        raise ConversionError(
            f"the model has yarn of factor {scaling.factor:g} with attention_factor {scaling.attention_factor:g}, "
            "which Megatron-Core cannot express: its mscale counts for factors above 1"
        )
    if config.mla is not None:
        return args | rope_latent.write_core(scaling)
    if scaling is None:
        return args
    if scaling.kind == "llama3":
        return args | {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}
    return args | {
        "position_embedding_type": "yarn",
        # Where it is true, Megatron-LM makes the type rope, whatever the checkpoint or a flag says.
        "use_rotary_position_embeddings": False,
        "rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": None if scaling.beta_fast == 32.0 else scaling.beta_fast,
        "yarn_beta_slow": None if scaling.beta_slow == 1.0 else scaling.beta_slow,
        "yarn_correction_range_round_to_int": None if scaling.truncate else False,
        "mscale": _core_mscale(scaling),
    }


def _core_mscale(scaling: RopeScaling) -> float:
    """Megatron-Core multiplies cos and sin by 0.1 mscale ln(factor) + 1; transformers by attention_factor."""
    if scaling.attention_factor is None or scaling.factor <= 1:
        return 1.0
    return (scaling.attention_factor - 1.0) / (0.1 * math.log(scaling.factor))


_CORE_NUMBERS = (
    "yarn_rotary_scaling_factor", "rotary_scaling_factor", "yarn_original_max_position_embeddings", "mscale",
    "yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow", "scale_factor", "old_context_len", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip
_NO_MSCALE = ("mscale", 0)  # yarn without a factor on cos and sin


def _check_core(args: Mapping[str, Any], where: str) -> None:
    problems = [
        f"{where} have {name} {args[name]!r}, where a positive number was expected"
        for name in _CORE_NUMBERS
        if args.get(name) is not None
        and not (type(args[name]) in (int, float) and (0 < args[name] < math.inf or (name, args[name]) == _NO_MSCALE))
    ]
    if problems:
        raise ConversionError(*problems)


def read_core(args: Mapping[str, Any], where: str) -> RopeScaling | None:
    """The scaling that Megatron-Core's args (or Megatron-Bridge's run_config.yaml) state. Raises ConversionError."""
    if args.get("multi_latent_attention"):
        return rope_latent.read_core(args, where)
    if args.get("position_embedding_type") == "yarn" or args.get("rope_scaling") is True or args.get("scale_factor"):
        _check_core(args, where)
    if args.get("position_embedding_type") == "yarn":
        factor = args.get("yarn_rotary_scaling_factor") or args.get("rotary_scaling_factor") or 1.0
        original = args.get("yarn_original_max_position_embeddings") or 4096
        mscale = 1.0 if args.get("mscale") is None else float(args["mscale"])
        # Bridge's own name of the constant factor
        stated = args.get("yarn_attention_factor")
        attention = stated if stated else None if mscale == 1.0 else _mscale(factor, mscale)
        return RopeScaling(
            "yarn", float(factor), int(original), attention_factor=attention,
            beta_fast=float(args.get("yarn_beta_fast") or 32.0), beta_slow=float(args.get("yarn_beta_slow") or 1.0),
            truncate=args.get("yarn_correction_range_round_to_int") is not False,
        )  # fmt: skip
    if args.get("use_rope_scaling") or args.get("rope_scaling") is True or args.get("scale_factor"):
        factor = args.get("rope_scaling_factor") or args.get("scale_factor") or CORE_LLAMA3_FACTOR
        if type(factor) not in (int, float) or not 0 < factor < math.inf:
            raise ConversionError(f"{where} have rope_scaling_factor {factor!r}, where a positive number was expected")
        original = args.get("old_context_len") or CORE_LLAMA3["original_max_position_embeddings"]
        return RopeScaling(
            "llama3", float(factor), int(original),
            low_freq_factor=float(args.get("low_freq_factor") or CORE_LLAMA3["low_freq_factor"]),
            high_freq_factor=float(args.get("high_freq_factor") or CORE_LLAMA3["high_freq_factor"]),
        )  # fmt: skip
    return None


def completed(stated: RopeScaling | None, imported: RopeScaling | None, *, latent: bool = False) -> RopeScaling | None:
    """What args state, with what they cannot carry from the import: Llama 3's constants, the last digit of a factor."""
    if stated is None or imported is None or stated.kind != imported.kind:
        return stated
    if latent:
        return rope_latent.completed(stated, imported)
    if stated.kind == "llama3":
        constants = all(getattr(stated, name) == value for name, value in CORE_LLAMA3.items())
        return dataclasses.replace(imported, factor=stated.factor) if constants else stated
    one, two = (dataclasses.replace(each, attention_factor=None) for each in (stated, imported))
    factors = [each.attention_factor or _mscale(each.factor) for each in (stated, imported)]
    return imported if one == two and math.isclose(*factors, rel_tol=1e-9) else stated


def core_flags(config: ModelConfig) -> list[str]:
    """Flags of Megatron-LM that --use-checkpoint-args does not restore."""
    scaling = config.rope_scaling
    if config.mla is not None:
        return rope_latent.core_flags(scaling)
    if scaling is None:
        return []
    if scaling.kind == "llama3":
        return ["--use-rope-scaling", f"--rope-scaling-factor {scaling.factor:g}"]
    flags = [
        "--position-embedding-type yarn",
        f"--rotary-scaling-factor {scaling.factor:g}",
        f"--yarn-original-max-position-embeddings {scaling.original_max_position_embeddings}",
    ]
    if scaling.beta_fast != 32.0:
        flags.append(f"--yarn-beta-fast {scaling.beta_fast:g}")
    if scaling.beta_slow != 1.0:
        flags.append(f"--yarn-beta-slow {scaling.beta_slow:g}")
    if not scaling.truncate:
        flags.append("--no-yarn-correction-range-round-to-int")
    if (mscale := _core_mscale(scaling)) != 1.0:
        flags.append(f"--mscale {mscale!r}")
    return flags


def core_warnings(config: ModelConfig) -> list[str]:
    """What stock Megatron-LM does with the scaling, whatever flags it is given."""
    scaling = config.rope_scaling
    if config.mla is None and scaling is not None and scaling.kind == "yarn":
        return ["yarn's flags reach the model in Megatron-LM 0.19 and newer; older releases refuse them"]
    if scaling is None or scaling.kind != "llama3":
        return rope_latent.core_warnings(config)
    warnings = []
    if scaling.factor != CORE_LLAMA3_FACTOR:
        warnings.append(
            f"stock Megatron-LM never passes --rope-scaling-factor to the model: it trains with factor "
            f"{CORE_LLAMA3_FACTOR:g} where this model has {scaling.factor:g}; set rope_scaling_factor in its code"
        )
    different = [
        f"{name} {getattr(scaling, name):g}" for name, value in CORE_LLAMA3.items() if getattr(scaling, name) != value
    ]
    if different:
        warnings.append(
            f"Megatron-Core has constants for Llama 3's rope scaling, this model differs in {', '.join(different)}"
        )
    return warnings


def assumed_factor(args: Mapping[str, Any]) -> bool:
    """Whether Llama 3's scaling is on and nothing says by which factor, as in releases before 0.11."""
    stated = any(args.get(name) for name in ("rope_scaling_factor", "scale_factor"))
    return bool(args.get("use_rope_scaling") or args.get("rope_scaling") is True) and not stated


def assumed_warnings(config: ModelConfig, args: Mapping[str, Any]) -> list[str]:
    """What no arg states of a scaling that is on; `args` as core_args.normalise gives them."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3" or not args.get("_is_factor_assumed"):
        return []
    return [
        f"nothing says what Llama 3's rope_scaling_factor is: {scaling.factor:g} is used, with Megatron-Core's "
        "constants; where it was trained with others, set them in the exported config.json"
    ]


def trained_warnings(config: ModelConfig) -> list[str]:
    """What a checkpoint's stated factor may not be what it was trained with."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3" or scaling.factor == CORE_LLAMA3_FACTOR:
        return []
    return [
        f"args say rope_scaling_factor {scaling.factor:g}, which is exported; stock Megatron-LM trains with "
        f"{CORE_LLAMA3_FACTOR:g} whatever that flag says: if it was used unchanged, set factor "
        f"{CORE_LLAMA3_FACTOR:g} in the exported config.json"
    ]
