"""What a config.json says of quantised weights (quantization_config): which are read, and which are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weights_conversion.errors.text import short

KEYS = ("quantization_config", "compression_config")
_INSTEAD = "give the unquantised model that it was made from"
_FP8 = ("fp8", "fbgemm_fp8", "finegrained_fp8")


@dataclass(frozen=True)
class Quantisation:
    """`block`: rows and columns that share a scale; None: as the scales' shapes show. `per_row`: a scale a row."""

    method: str
    block: tuple[int, int] | None = None
    per_row: bool = False


def read(raw: Mapping[str, Any], where: str) -> Quantisation | list[str] | None:
    """What is stated; a list of sentences where it cannot be read; None: nothing is stated."""
    stated = {key: raw[key] for key in KEYS if raw.get(key)}
    if not stated:
        return None
    key, said = next(iter(stated.items()))
    if not isinstance(said, Mapping):
        return [f"{where} has {key} {short(said)}, where an object was expected"]
    found = _of_method(said)
    if isinstance(found, str):
        return [f"{where} has {key}: the weights are quantised ({found}); {_INSTEAD}"]
    return found


def problems(raw: Mapping[str, Any], where: str) -> list[str]:
    """Why the weights that a config.json states cannot be read, as sentences."""
    found = read(raw, where)
    return found if isinstance(found, list) else []


def _of_method(said: Mapping[str, Any]) -> Quantisation | str:
    """The value, or what is refused, in a few words."""
    method = str(said.get("quant_method") or ("gptq" if "bits" in said else "unknown")).lower()
    if method in _FP8:
        block = said.get("weight_block_size")
        if said.get("fmt") not in (None, "e4m3", "e5m2"):
            return f"{method}, {short(said['fmt'])}"
        if block is None:
            return Quantisation(method)
        pair = _pair(block)
        return f"{method} with weight_block_size {short(block)}" if pair is None else Quantisation(method, pair)
    if method == "mxfp4":
        return Quantisation(method)
    if method == "compressed-tensors":
        return _compressed(said)
    if method == "modelopt" and str(said.get("quant_algo")).upper() == "FP8":
        return Quantisation(method)
    width = next((said[key] for key in ("bits", "w_bit", "nbits") if isinstance(said.get(key), int)), None)
    algorithm = said.get("quant_algo")
    return ", ".join([method, *([f"{width} bits"] if width else []), *([short(algorithm)] if algorithm else [])])


def _compressed(said: Mapping[str, Any]) -> Quantisation | str:
    groups = said.get("config_groups") or {}
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) and all(
        isinstance(group, Mapping) for group in groups.values()
    ) else []  # fmt: skip
    name = "compressed-tensors"
    if not weights or not all(isinstance(each, Mapping) for each in weights):
        return f"{name}, {short(said.get('format'))}"
    found = set()
    for each in weights:
        bits, kind, strategy = each.get("num_bits"), each.get("type"), each.get("strategy") or "tensor"
        if (bits, kind) != (8, "float") or each.get("symmetric") is False:
            return f"{name}, {short(said.get('format'))}: {short(bits)} bits, {short(kind)}"
        block = _pair(each.get("block_structure")) if strategy == "block" else None
        if strategy not in ("tensor", "channel", "block") or (strategy == "block" and block is None):
            return f"{name}, {short(said.get('format'))}: strategy {short(strategy)}"
        found.add(Quantisation(name, block, strategy == "channel"))
    return found.pop() if len(found) == 1 else Quantisation(name)


def _pair(value: Any) -> tuple[int, int] | None:
    """Two positive sizes, as [128, 128] or "128x128"."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)):
        value = [int(match[1]), int(match[2])]
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    if not all(type(size) is int and 0 < size < 1 << 31 for size in value):
        return None
    return value[0], value[1]
