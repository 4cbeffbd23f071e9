"""What the models of a family have: what its file states, and what its config class of transformers is known by.

A switch that the class has a key of (ConfigClass.flags) is stated by the family too: its models may have it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from weights_conversion.architectures import FAMILIES
from weights_conversion.configs import gated_delta, mamba, mla, moe, own_args, windows
from weights_conversion.configs.config_class import ConfigClass
from weights_conversion.configs.hf_keys import CONFIG_CLASSES

# ModelConfig's, true or false
SWITCHES = ("add_qkv_bias", "qk_layernorm", "attention_output_gate", "layernorm_zero_centered_gamma")
# Feature -> args of Megatron-Core that families with it may have; their values are looked at where they are read.
ARGS: dict[str, frozenset[str]] = {
    "moe": moe.READ,
    "mla": mla.READ | {"qk_layernorm"},
    "mtp": frozenset({"mtp_num_layers"}),
    "partial_rotary": frozenset({"rotary_percent"}),
    "mixed_windows": frozenset({windows.ARG}),
    "hybrid": mamba.READ,
    "gated_delta": gated_delta.READ,
    "layernorm_zero_centered_gamma": frozenset({"apply_layernorm_1p"}),
    "post_norms": frozenset({"query_pre_attn_scalar"}),
}


def class_of(family: str) -> ConfigClass:
    return CONFIG_CLASSES[FAMILIES[family].hf_class]


@functools.cache
def of(family: str) -> frozenset[str]:
    known = class_of(family)
    by_class = {
        "moe": known.experts is not None,
        "mla": known.latent,
        "mtp": known.predicts,
        "gated_delta": known.gated_delta,
        "partial_rotary": known.rotary_percent != 1.0,
        "mixed_windows": known.mixed_windows,
        "biases": known.experts is not None and known.experts.biased,
        "hybrid": bool(known.pattern),
    }
    stated = FAMILIES[family].features | known.flags.keys() | own_args.names_of(family)
    return stated | {name for name, there in by_class.items() if there}


def required(family: str) -> frozenset[str]:
    """Switches that are on in every model of the family."""
    return frozenset(of(family) & set(SWITCHES)) - class_of(family).flags.keys()


def lacking(family: str, values: Mapping[str, Any]) -> list[str]:
    """ModelConfig fields of several parts that every model of the family has, and that are None in `values`."""
    pattern = values.get("hybrid_layer_pattern")
    if "hybrid" in of(family):
        wanted = {"hybrid_layer_pattern": True, "moe": "E" in (pattern or ""), "mamba": "M" in (pattern or "")}
    else:
        wanted = {name: name in of(family) for name in ("moe", "mla", "gated_delta")}
    return [name for name, needed in wanted.items() if needed and values.get(name) is None]


def has_one_size(family: str) -> bool:
    """Whether a config has one size of MLPs, that of experts (Mixtral): args may say anything of dense ones."""
    experts = class_of(family).experts
    return experts is not None and experts.ffn in class_of(family).fields["ffn_hidden_size"]


def args_of(features: frozenset[str]) -> frozenset[str]:
    """Names of args (of switches too) that a family with `features` may have set."""
    return frozenset(features).union(*(ARGS.get(name, frozenset()) for name in features))


def everywhere() -> frozenset[str]:
    """Args that some family may have set."""
    return args_of(frozenset().union(*(of(family) for family in FAMILIES)))
