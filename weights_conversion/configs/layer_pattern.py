"""Which sub-block each layer is, of models whose layers are one each: a symbol for each, or a list of names.

Megatron-Core's symbols (hybrid_layer_allocation.py), which Nemotron-H's own code has too: M state space, * attention,
- MLP, E experts. transformers 5 lists names instead, and has changed two of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SYMBOLS = "M*-E"
_OF_NAMES = {
    "linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E",
}  # fmt: skip
_LONGEST = 100_000


def read_hf(keys: Sequence[str], full: Mapping[str, Any]) -> str | list[str]:
    """The pattern that a config.json states under one of `keys` or several, or what is wrong, behind "config.json has".

    Where num_hidden_layers is stated too, it must be the pattern's length.
    """
    stated = {key: full[key] for key in keys if full.get(key) is not None}
    patterns = {key: _symbols(value) for key, value in stated.items()}
    wrong = [
        f"{key} {str(stated[key])[:60]!r}, where a symbol of {SYMBOLS} for each layer was expected"
        for key, pattern in patterns.items()
        if pattern is None
    ]
    if not stated:
        wrong.append(f"no {keys[0]}, which says what each layer is")
    found = next(iter(patterns.values()), None)
    if not wrong and len(set(patterns.values())) > 1:
        wrong.append(f"two values of one field, {patterns}; remove the wrong one")
    layers = full.get("num_hidden_layers")
    if not wrong and found is not None and layers not in (None, len(found)):
        wrong.append(f"num_hidden_layers {layers!r} and {next(iter(stated))} of {len(found)} layers")
    return wrong if wrong or found is None else found


def _symbols(value: Any) -> str | None:
    if isinstance(value, list) and len(value) <= _LONGEST and all(isinstance(name, str) for name in value):
        value = "".join(_OF_NAMES.get(name, "?") for name in value)
    if not isinstance(value, str) or len(value) > _LONGEST:
        return None
    return value if re.fullmatch(f"[{re.escape(SYMBOLS)}]+", value) else None


def write_hf(keys: Sequence[str], pattern: str, result: dict[str, Any]) -> None:
    """Under the first of `keys`, which every release reads, and under those that `result` has, in its own words.

    One that is null goes: transformers 5 takes layer_types null for a value.
    """
    for key in keys[1:]:
        if key in result and result[key] is None:
            del result[key]
        if result.get(key) is not None and _symbols(result[key]) != pattern:
            newer = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
            result[key] = [newer[symbol] for symbol in pattern]
    result[keys[0]] = pattern
