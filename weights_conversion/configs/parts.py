"""Values of a ModelConfig that have parts (experts, latent attention): completed, and compared part by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from weights_conversion.config import PARTS, Moe
from weights_conversion.configs import moe

# Of the experts: what no tensor's shape betrays, and what training may have changed.
SILENT = frozenset({"topk", "pre_softmax", "score_function", "scaling_factor", "num_groups", "group_topk", "clamp"})
_SHOWN_BY_TENSORS = ("expert_bias", "shared_gate", "biased")


def completed(stated: Moe, imported: Moe | None, args: Mapping[str, Any]) -> Moe:
    """What args state, with the import's values of those that the args have no place for (older releases, wrappers)."""
    if imported is None or len(imported.layers) != len(stated.layers):
        return stated
    absent = [field for field, name in moe.ARGS.items() if name not in args and field not in _SHOWN_BY_TENSORS]
    taken = [field for field in absent if field != "num_experts"]  # which has a second name
    return dataclasses.replace(stated, **{field: getattr(imported, field) for field in taken})


def differing(one: Any, two: Any) -> dict[str, tuple[Any, Any]]:
    """The parts in which two values differ, {} where they are no values of parts, or of two kinds."""
    if not isinstance(one, tuple(PARTS.values())) or type(one) is not type(two):
        return {}
    parts = {field.name: (getattr(one, field.name), getattr(two, field.name)) for field in dataclasses.fields(one)}
    return {name: pair for name, pair in parts.items() if pair[0] != pair[1]}


def is_silent(one: Any, two: Any) -> bool:
    """Whether two values differ in nothing that a shape would betray."""
    parts = differing(one, two)
    return bool(parts) and isinstance(one, Moe) and SILENT.issuperset(parts)


def shown(name: str, value: Any, other: Any) -> str:
    """`value` of field `name` in a sentence: of one with parts, those in which it differs from `other`."""
    parts = differing(value, other)
    if not parts:
        return "there" if isinstance(value, tuple(PARTS.values())) else str(value)
    return ", ".join(f"{moe.ARGS.get(part, part)} {pair[0]}" for part, pair in parts.items())


def malformed(kind: type[Any], stated: Any) -> str | None:
    """What is wrong with the parts that a manifest states, in words that follow "has"; None: nothing."""
    try:
        value = kind(**stated)
    except TypeError:
        return f"{kind.__name__.lower()} {stated!r}, where its sizes were expected"
    allowed = {"int": (int,), "bool": (bool,), "str": (str,)}
    optional = {"int | None": (int, type(None)), "float | None": (float, int, type(None))}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        types = (allowed | optional).get(str(field.type))
        if types is None:  # the layers
            fits = isinstance(part, (list, tuple)) and all(type(has) is bool for has in part)
        else:
            fits = type(part) in types
        if not fits:
            return f"{field.name} {part!r} of its {kind.__name__.lower()}, which is of the wrong type"
    return None
