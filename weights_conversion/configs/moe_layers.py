"""Which layers have experts, as config.json and Megatron-Core's moe_layer_freq say it.

Hugging Face's layer i has experts where (i + 1) % decoder_sparse_step == 0 (Qwen) or i >= first_k_dense_replace
(DeepSeek, GLM); Megatron-Core's integer N means i % N == 0 (gpt_layer_specs.py), its list says it of each layer.
Stock Megatron-LM stacks the layers of a torch_dist checkpoint where moe_layer_freq is 1, and names them one by one
where it is a list or another number (transformer_block.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weights_conversion.config import ModelConfig
from weights_conversion.configs.config_class import ExpertKeys
from weights_conversion.errors import ConversionError

_MOST_LAYERS = 10_000
_TOKENS = re.compile(r"\d+|[\[\](),+*]")
FREQ_FLAG = "--moe-layer-freq"


# --- config.json ------------------------------------------------------------------------------------------------------


def read_hf(keys: ExpertKeys, full: Mapping[str, Any], num_layers: int) -> tuple[bool, ...] | str:
    """Of each layer whether it has experts, or a sentence on what is wrong. `full` has the class's defaults.

    Where a pattern says it, it has been read, and is `full`'s "pattern".
    """
    if keys.layers == "pattern":
        return tuple(symbol == "E" for symbol in full.get("pattern", ""))
    if keys.layers == "first":
        dense = full.get("first_k_dense_replace")
        if type(dense) is not int or dense < 0:
            return f"first_k_dense_replace {dense!r}, where a number of layers was expected"
        return tuple(layer >= dense for layer in range(num_layers))
    if keys.layers == "types":
        return _read_types(full, num_layers)
    if keys.layers != "step":
        return (True,) * num_layers
    step, plain = full.get("decoder_sparse_step"), full.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        return f"decoder_sparse_step {step!r}, where a positive number was expected"
    if not isinstance(plain, list) or not all(type(layer) is int for layer in plain):
        return f"mlp_only_layers {plain!r}, where a list of layers was expected"
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(num_layers))


def _read_types(full: Mapping[str, Any], num_layers: int) -> tuple[bool, ...] | str:
    """By mlp_layer_types; first_k_dense_replace, which the hub's files have and transformers does not read, agrees."""
    kinds = full.get("mlp_layer_types")
    if kinds is None:
        kinds = ["dense", *["sparse"] * (num_layers - 1)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        return f"mlp_layer_types {str(kinds)[:80]}, where dense or sparse was expected for each of {num_layers} layers"
    layers, first = tuple(kind == "sparse" for kind in kinds), full.get("first_k_dense_replace")
    if first is not None and layers != tuple(layer >= first for layer in range(num_layers)):
        return f"first_k_dense_replace {first!r}, while transformers goes by mlp_layer_types, which says otherwise"
    return layers


def write_hf(keys: ExpertKeys, layers: tuple[bool, ...]) -> dict[str, Any]:
    """The keys that say so in a config made from nothing. `misfit` has been asked before."""
    if keys.layers == "first":
        return {"first_k_dense_replace": layers.index(True)}
    if keys.layers == "types":
        return {"mlp_layer_types": ["sparse" if has else "dense" for has in layers]}
    if keys.layers != "step":
        return {}
    return {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer, has in enumerate(layers) if not has]}


def misfit(keys: ExpertKeys, layers: tuple[bool, ...]) -> str | None:
    """What a class cannot express of `layers`."""
    if keys.layers == "first" and not all(layers[layers.index(True) :]):
        return "dense layers behind its first layer with experts"
    if keys.layers == "" and not all(layers):
        return "dense layers beside those with experts"
    return None


# --- Megatron-Core ----------------------------------------------------------------------------------------------------


def parse_freq(text: str) -> int | list[int]:
    """--moe-layer-freq as Megatron-LM takes it: an integer, or a list as "([0]*1+[1]*2)". Raises ConversionError.

    Megatron-LM evaluates it; here it is parsed: lists, joined by + and repeated by *.
    """
    text = text.strip()
    if re.fullmatch(r"\d{1,6}", text):
        return int(text)
    tokens = _TOKENS.findall(text)
    if "".join(tokens) != re.sub(r"\s", "", text) or "[" not in tokens:
        raise _malformed(text)
    try:
        value = _sum(tokens)
    except (IndexError, RecursionError):
        raise _malformed(text) from None
    if tokens or not isinstance(value, list):
        raise _malformed(text)
    return value


def _malformed(text: str) -> ConversionError:
    return ConversionError(
        f"{FREQ_FLAG} {text[:80]!r} is neither a number nor a list of 0 (dense) and 1 (experts), as ([0]*1+[1]*2)"
    )


def _sum(tokens: list[str]) -> int | list[int]:
    value = _product(tokens)
    while tokens and tokens[0] == "+":
        tokens.pop(0)
        other = _product(tokens)
        if isinstance(value, int) or isinstance(other, int):
            raise IndexError
        value = value + other
    return value


def _product(tokens: list[str]) -> int | list[int]:
    value = _atom(tokens)
    while tokens and tokens[0] == "*":
        tokens.pop(0)
        other = _atom(tokens)
        times, part = (value, other) if isinstance(value, int) else (other, value)
        if not isinstance(times, int) or isinstance(part, int) or times * len(part) > _MOST_LAYERS:
            raise IndexError
        value = part * times
    return value


def _atom(tokens: list[str]) -> int | list[int]:
    token = tokens.pop(0)
    if token.isdigit():
        return int(token)
    if token == "(":
        value = _sum(tokens)
        if tokens.pop(0) != ")":
            raise IndexError
        return value
    if token != "[":
        raise IndexError
    items: list[int] = []
    while tokens[0] != "]":
        items.append(int(tokens.pop(0)) if tokens[0].isdigit() else _no_item())
        if tokens[0] == ",":
            tokens.pop(0)
    tokens.pop(0)
    return items


def _no_item() -> int:
    raise IndexError


def read_core(freq: Any, num_layers: int) -> tuple[bool, ...] | str:
    """Of each layer whether it has experts, or a sentence. `freq` is an int, a list, or a list's text."""
    if isinstance(freq, str):
        try:
            freq = parse_freq(freq)
        except ConversionError:
            return f"moe_layer_freq {freq[:80]!r}, where a number or a list was expected"
    if type(freq) is int and freq > 0:
        return tuple(layer % freq == 0 for layer in range(num_layers))
    if not isinstance(freq, (list, tuple)) or not all(one in (0, 1) for one in freq):
        return f"moe_layer_freq {freq!r}, where a positive number or a list of 0 and 1 was expected"
    if len(freq) != num_layers:
        return f"moe_layer_freq of {len(freq)} layers, where the model has {num_layers}"
    return tuple(one == 1 for one in freq)


def core_layer_freq(config: ModelConfig, override: int | list[int] | None = None) -> int | list[int]:
    """moe_layer_freq as it is written, and by it the form of torch_dist's keys: 1 is stacked, all else per layer.

    By default 1 where every layer has experts (or none), else the list: what Hugging Face's own numbers mean to
    Megatron-Core is another thing. `override` is --moe-layer-freq, which must name the same layers.
    """
    if config.moe is None:
        if override is not None:
            raise ConversionError(f"{FREQ_FLAG} {override} is for models with experts; {config.family} has none")
        return 1
    layers = config.moe.layers
    default: int | list[int] = 1 if config.moe.everywhere else [int(has) for has in layers]
    if override is None:
        return default
    read = read_core(override, config.num_layers)
    if read != layers:
        what = read if isinstance(read, str) else f"experts in the layers {_shown(read)}"
        raise ConversionError(
            f"{FREQ_FLAG} {override} says {what}, but this model has them in the layers {_shown(layers)}; "
            f"{FREQ_FLAG} {pattern(default)!r} is right"
        )
    return override


def is_stacked(freq: int | list[int]) -> bool:
    """Whether stock Megatron-LM stacks the layers in torch_dist."""
    return freq == 1


def pattern(freq: int | list[int]) -> str:
    """`freq` as a flag: runs of a list are one term each, so that 61 layers fit on a line."""
    if isinstance(freq, int):
        return str(freq)
    runs: list[tuple[int, int]] = []
    for one in freq:
        value, count = runs[-1] if runs else (one, 0)
        runs = [*runs[:-1], (one, count + 1)] if value == one and runs else [*runs, (one, 1)]
    return "(" + "+".join(f"[{value}]*{count}" for value, count in runs) + ")"


def _shown(layers: tuple[bool, ...]) -> str:
    return pattern([int(has) for has in layers]).strip("()")
