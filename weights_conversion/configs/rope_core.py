"""Rope scaling as Megatron-Core's args spell it, and what stock Megatron-LM does with it.

Sources: Megatron-Core's rotary_pos_embedding.py (Llama 3's constants) and yarn_rotary_pos_embedding.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from weights_conversion.config import ModelConfig, RopeScaling
from weights_conversion.configs import rope_latent
from weights_conversion.errors import ConversionError

# What Megatron-Core applies under --use-rope-scaling: constants in its code.
CORE_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CORE_LLAMA3_FACTOR = 8.0


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
        "mscale": _mscale(scaling),
    }


def _mscale(scaling: RopeScaling) -> float:
    """Megatron-Core multiplies cos and sin by 0.1 mscale ln(factor) + 1; transformers by attention_factor."""
    if scaling.attention_factor is None or scaling.factor <= 1:
        return 1.0
    return (scaling.attention_factor - 1.0) / (0.1 * math.log(scaling.factor))


_NUMBERS = (
    "yarn_rotary_scaling_factor", "rotary_scaling_factor", "yarn_original_max_position_embeddings", "mscale",
    "yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow", "scale_factor", "old_context_len", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip
_NO_MSCALE = ("mscale", 0)  # yarn without a factor on cos and sin


def _check(args: Mapping[str, Any], where: str) -> None:
    problems = [
        f"{where} have {name} {args[name]!r}, where a positive number was expected"
        for name in _NUMBERS
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
        _check(args, where)
    if args.get("position_embedding_type") == "yarn":
        factor = args.get("yarn_rotary_scaling_factor") or args.get("rotary_scaling_factor") or 1.0
        original = args.get("yarn_original_max_position_embeddings") or 4096
        mscale = 1.0 if args.get("mscale") is None else float(args["mscale"])
        # Bridge's own name of the constant factor
        stated = args.get("yarn_attention_factor")
        attention = stated if stated else None if mscale == 1.0 else rope_latent.yarn_mscale(factor, mscale)
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
    factors = [each.attention_factor or rope_latent.yarn_mscale(each.factor) for each in (stated, imported)]
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
    if (mscale := _mscale(scaling)) != 1.0:
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
