"""Yarn of latent attention: its angles, and its softmax scale, which depends on mscale_all_dim.

cos and sin are multiplied by m(mscale) / m(mscale_all_dim), with m(s) = 0.1 s ln(factor) + 1 and m(0) = 1, the scale
of the softmax by m(mscale_all_dim)^2. Transformers takes m(1) for the first where one of the two is absent
(modeling_rope_utils.py), Megatron-Core divides by m(0) (yarn_rotary_pos_embedding.py). There the context of before and
both betas are constants, which no flag and no arg of Megatron-LM carries; Megatron-Bridge states them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from weights_conversion.config import ModelConfig, RopeScaling
from weights_conversion.errors import ConversionError

CONSTANTS = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
_BRIDGE = ("original_max_position_embeddings", "beta_fast", "beta_slow")
_NUMBERS = ("rotary_scaling_factor", "mscale", "mscale_all_dim", *_BRIDGE)


def yarn_mscale(factor: float, scale: float = 1.0) -> float:
    """Yarn's factor on cos and sin: m(scale)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def canonical(scaling: RopeScaling) -> RopeScaling:
    """The same yarn with mscale and mscale_all_dim where the softmax is scaled, else with what differs from m(1)."""
    factor, all_dim = scaling.factor, scaling.mscale_all_dim or 0.0
    mscale = core_mscale(scaling)
    if all_dim and factor > 1:
        return dataclasses.replace(scaling, mscale=mscale, mscale_all_dim=all_dim, attention_factor=None)
    attention = None if mscale == 1.0 else yarn_mscale(factor, mscale)
    if factor <= 1 and scaling.attention_factor != 1.0:  # stated by itself, whatever the factor
        attention = scaling.attention_factor
    return dataclasses.replace(scaling, mscale=None, mscale_all_dim=None, attention_factor=attention)


def core_mscale(scaling: RopeScaling) -> float:
    """Megatron-Core's mscale, by which cos and sin are multiplied by what the model has."""
    factor, all_dim = scaling.factor, scaling.mscale_all_dim or 0.0
    if factor <= 1 or (scaling.attention_factor is None and not all_dim):
        return 1.0
    if scaling.attention_factor is None and scaling.mscale:
        return scaling.mscale
    on_angles = scaling.attention_factor if scaling.attention_factor is not None else yarn_mscale(factor, 1.0)
    return (on_angles * yarn_mscale(factor, all_dim) - 1.0) / (0.1 * math.log(factor))


def read_core(args: Mapping[str, Any], where: str) -> RopeScaling | None:
    """The yarn that Megatron-Core's args state, None for plain rope. Raises ConversionError."""
    problems = [
        f"{where} have {name} {args[name]!r}, where a positive number was expected"
        for name in _NUMBERS
        if args.get(name) is not None
        and not (type(args[name]) in (int, float) and (0 < args[name] < math.inf or (args[name] == 0 and "ms" in name)))
    ]
    kind = args.get("rope_type") or "yarn"
    if kind not in ("rope", "yarn"):
        problems.append(f"{where} have rope_type {kind!r}, where 'rope' or 'yarn' was expected")
    if problems:
        raise ConversionError(*problems)
    factor = float(args.get("rotary_scaling_factor") or 1.0)
    all_dim = float(args.get("mscale_all_dim") or 0.0)
    if kind == "rope":
        if factor > 1 and all_dim:
            raise ConversionError(
                f"{where} have rope_type 'rope' with rotary_scaling_factor {factor:g} and mscale_all_dim {all_dim:g}, "
                "by which Megatron-Core scales the softmax and transformers does not: it cannot be expressed"
            )
        return None
    if factor == 1.0:  # yarn of factor 1 is plain rope
        return None
    mscale = 1.0 if args.get("mscale") is None else float(args["mscale"])
    stated: dict[str, Any] = {name: args[name] for name in _BRIDGE if args.get(name) is not None}
    original = int(stated.get(_BRIDGE[0], CONSTANTS[_BRIDGE[0]]))
    return RopeScaling(
        "yarn", factor, original,
        beta_fast=float(stated.get("beta_fast", 32.0)), beta_slow=float(stated.get("beta_slow", 1.0)),
        mscale=mscale if all_dim else None, mscale_all_dim=all_dim or None,
        attention_factor=None if all_dim or mscale == 1.0 else yarn_mscale(factor, mscale),
    )  # fmt: skip


def write_core(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"mscale": 1.0, "mscale_all_dim": 0.0}
    return {
        "rotary_scaling_factor": scaling.factor,
        "mscale": core_mscale(scaling),
        "mscale_all_dim": scaling.mscale_all_dim or 0.0,
    }


def write_hf(scaling: RopeScaling) -> dict[str, Any]:
    """Keys of config.json beside rope_type, factor and original_max_position_embeddings, which its own code wants."""
    result: dict[str, Any] = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        if getattr(scaling, name) is not None:
            result[name] = getattr(scaling, name)
    return result if scaling.truncate else result | {"truncate": False}


def completed(stated: RopeScaling, imported: RopeScaling) -> RopeScaling:
    """What args state, with the constants of the import, which args cannot carry."""
    if any(getattr(stated, name) != value for name, value in CONSTANTS.items()):
        return stated
    numbers = zip(_carried(stated), _carried(imported), strict=True)
    if all(math.isclose(one, two, rel_tol=1e-9, abs_tol=1e-12) for one, two in numbers):
        return imported
    return dataclasses.replace(stated, **{name: getattr(imported, name) for name in CONSTANTS})


def constants_note(scaling: RopeScaling | None, args: Mapping[str, Any]) -> list[str]:
    """A note on Megatron-Core's constants in an exported yarn that neither args, import nor reference state."""
    if scaling is None or scaling.kind != "yarn" or any(args.get(name) is not None for name in _BRIDGE):
        return []
    if any(getattr(scaling, name) != value for name, value in CONSTANTS.items()):
        return []
    shown = ", ".join(f"{name} {CONSTANTS[name]:g}" for name in _BRIDGE)
    return [
        f"values     of Megatron-Core's code: {shown} (yarn's, which no arg states and Megatron-LM trains with); if "
        "the model that it was trained from has others, --reference gives them"
    ]


def _carried(scaling: RopeScaling) -> tuple[float, float, float]:
    return scaling.factor, core_mscale(scaling), scaling.mscale_all_dim or 0.0


def core_flags(scaling: RopeScaling | None) -> list[str]:
    if scaling is None:
        return []
    values = write_core(scaling)
    return [
        f"--rotary-scaling-factor {scaling.factor:g}",
        f"--mscale {values['mscale']!r}",
        f"--mscale-all-dim {values['mscale_all_dim']!r}",
    ]


def core_warnings(config: ModelConfig) -> list[str]:
    scaling = config.rope_scaling
    if config.mla is None or scaling is None:
        return []
    different = [
        f"{name} {getattr(scaling, name):g}" for name, value in CONSTANTS.items() if getattr(scaling, name) != value
    ]
    if not different:
        return []
    constants = ", ".join(f"{name} {value:g}" for name, value in CONSTANTS.items() if name != "truncate")
    return [
        f"Megatron-Core has constants for latent attention's yarn ({constants}), this model differs in "
        f"{', '.join(different)}: training computes other angles, unless its code is changed; an export writes the "
        "model's own from the manifest, or from --reference"
    ]
