"""Which of Megatron-Core's args decide the forward pass, and the values that mean the plain model: a table.

core_fields.json has every arg that reaches the model, as tests/make_core_args.py finds them in the releases' sources.
Each is one of four kinds (core_kinds.py): read by the converter, idle (it changes how a model is trained, not what it
computes from its weights), behind a gate (it counts only where another arg is set), or deciding: another value than its
default is refused by name, unless the family has it.
"""

from __future__ import annotations

import ast
import functools
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.configs.core_kinds import (
    GATES,
    IDLE,
    IDLE_PREFIXES,
    OWN_SPECS,
    PLAIN,
    READ,
    TRAINING,
    TRAINING_NAMES,
    WORDS,
)


@functools.cache
def fields() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("core_fields.json").read_text(encoding="utf-8"))


@functools.cache
def plain_values(name: str) -> tuple[Any, ...]:
    """What a deciding arg may be in the plain model, beside None."""
    if name in PLAIN:
        return PLAIN[name]
    values = []
    for source in fields()["model"].get(name, ()):
        try:
            values.append(ast.literal_eval(source or "None"))
        except (ValueError, SyntaxError):
            continue
    return tuple(value for value in values if value is not None) or (False,)


@functools.cache
def is_deciding(name: str) -> bool:
    if name in READ or name in IDLE or name.startswith(IDLE_PREFIXES):
        return False
    return name in PLAIN or name in fields()["model"]


def is_plain(name: str, value: Any) -> bool:
    """Whether a deciding arg's value means the plain model; of a list, each layer's value must."""
    if isinstance(value, (list, tuple)) and name in ("spec", "transformer_layer_spec"):
        return bool(value) and is_plain(name, value[0])
    if isinstance(value, (list, tuple)):
        return all(is_plain(name, part) or part == 0 for part in value)
    if value is None or value == "":
        return True
    if name in ("spec", "transformer_layer_spec"):
        return isinstance(value, str) and any(value == own or value.startswith(f"{own}.") for own in OWN_SPECS)
    plain = plain_values(name)
    if isinstance(value, float) and any(isinstance(one, (int, float)) and math.isclose(value, one) for one in plain):
        return True
    if plain == (False,) and value == 0:
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in plain) or (
        value is False and not any(isinstance(one, (bool, str)) for one in plain)
    )


def _gate(name: str) -> tuple[str, ...]:
    return next((gates for start, gates in GATES if name.startswith(start) and name not in gates), ())


def _is_shut(gate: str, args: Mapping[str, Any]) -> bool:
    return args.get(gate) is None if gate in READ else is_plain(gate, args.get(gate))


def foreign(args: Mapping[str, Any], has: Collection[str] = ()) -> dict[str, str]:
    """Deciding args whose value is not the plain model's: name -> what the model has. `has` are the family's own."""
    result = {}
    for name, value in args.items():
        if not is_deciding(name) or name in has or is_plain(name, value):
            continue
        # Behind a gate that is shut nothing counts; what stands behind one that is refused itself need not be named.
        gates = [gate for gate in _gate(name) if not _is_shut(gate, args)]
        if _gate(name) and not any(gate in has or gate in READ for gate in gates):
            continue
        result[name] = WORDS.get(name, name.replace("_", " "))
    return result


def unreadable(left_out: Mapping[str, str]) -> list[str]:
    """Those of the args that are no plain values which decide the model."""
    gated = [name for name in left_out if _gate(name)]
    deciding = [name for name in left_out if (is_deciding(name) or name in READ) and name not in gated]
    return [name for name in deciding if left_out[name] not in PLAIN.get(name, ())]  # silu as the function itself


def unknown(args: Mapping[str, Any]) -> dict[str, Any]:
    """Args that no release is known to have and that are set: name -> value."""
    return {
        name: value
        for name, value in args.items()
        if not is_known(name) and value not in (None, False, 0, "") and value != []
    }


def is_known(name: str) -> bool:
    """Whether some release has such an arg, or one of training's by its first word."""
    known = name in fields()["model"] or name in _training() or name in PLAIN
    return known or name.startswith((*TRAINING, *IDLE_PREFIXES))


@functools.cache
def _training() -> frozenset[str]:
    return TRAINING_NAMES | frozenset(fields()["training"])
