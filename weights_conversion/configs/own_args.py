"""Args of Megatron-Core that every model of a family has, beside those that a ModelConfig says (Family.own_args)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.architectures import FAMILIES

# A TransformerConfig, as Megatron-Bridge stores it, names its activation in place of args' switches.
_ACTIVATION = "activation_func"
_BY_SWITCH = {
    "quick_geglu": ("quick_gelu", "quick_gelu_impl"),
    "squared_relu": ("squared_relu",),
    "openai_gelu": ("fast_gelu", "openai_gelu", "openai_gelu_impl"),
}


def names_of(family: str) -> frozenset[str]:
    """Names of args that models of the family may have set."""
    own = FAMILIES[family].own_args
    return frozenset(own) | ({_ACTIVATION} if own.keys() & _BY_SWITCH.keys() else frozenset())


def misfits(args: Mapping[str, Any], family: str) -> list[str]:
    """Args that are not as the family's models have them, in words that follow "holds a model". What is absent is not
    said to be otherwise: not every wrapper stores every arg."""
    wrong = [
        f"with {name} {args[name]!r}, where {family} has {value!r}"
        for name, value in FAMILIES[family].own_args.items()
        if name in args and (args[name] or None) != (value or None)
    ]
    for switch, functions in _BY_SWITCH.items():
        stated = args.get(_ACTIVATION) if switch in FAMILIES[family].own_args else None
        if isinstance(stated, str) and stated.rpartition(".")[2] not in functions:
            wrong.append(f"with {_ACTIVATION} {stated!r}, where {family} has {functions[0]}")
    return wrong
