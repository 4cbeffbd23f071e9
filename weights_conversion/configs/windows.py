"""Sliding windows that some layers have and others not: layer_types of config.json, window_attn_skip_freq of args.

Megatron-Core counts layers from 1: an integer N means a window where layer % N != 0, a list says it of each layer
(is_layer_window_attention in transformer/utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.config import ModelConfig
from weights_conversion.configs.moe_layers import parse_freq, pattern
from weights_conversion.errors import ConversionError

ARG = "window_attn_skip_freq"
# Among args of a HybridModel that became a GPTModel's: each layer is two there, and attention the first of them.
_IN_HYBRID = "_is_hybrid_model"
KINDS = {"sliding_attention": True, "full_attention": False}

Layers = tuple[bool, ...] | None  # as ModelConfig.window_layers


def read_hf(full: Mapping[str, Any], where: str) -> tuple[int | None, Layers]:
    """(window, the layers that have it), where a class's layers may differ.

    By default every other layer has it, or all but every N-th, where the class has sliding_window_pattern N.
    """
    window, kinds, count = full.get("sliding_window"), full.get("layer_types"), full["num_hidden_layers"]
    _check(window, where)
    if kinds is None:
        every = full.get("sliding_window_pattern", 2)
        if type(every) is not int or every <= 0:
            raise ConversionError(f"{where} has sliding_window_pattern {every!r}, where a positive int was expected")
        layers = tuple((layer + 1) % every != 0 for layer in range(count))
    elif isinstance(kinds, list) and len(kinds) == count and all(kind in KINDS for kind in map(str, kinds)):
        layers = tuple(KINDS[kind] for kind in kinds)
    else:
        raise ConversionError(f"{where} has layer_types {str(kinds)[:120]}, where {' or '.join(KINDS)} was expected of "
                              f"each of its {count} layers")  # fmt: skip
    if window is None and any(layers):
        raise ConversionError(f"{where} has layers of sliding_attention and no sliding_window; state it")
    return plain(window, layers)


def read_one(full: Mapping[str, Any], where: str) -> int | None:
    """The window of every layer. `layer_types` (version 5) may only repeat it."""
    window, kinds = full["sliding_window"], full.get("layer_types")
    _check(window, where)
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and {str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])} != {expected}:
        raise ConversionError(
            f"{where} has sliding_window {window}, but not all of its layer_types are {expected}: layers that differ "
            "cannot be expressed"
        )
    return window


def _check(window: Any, where: str) -> None:
    if window is not None and (type(window) is not int or window <= 0):
        raise ConversionError(f"{where} has sliding_window {window!r}, where a positive int or null was expected")


def plain(window: int | None, layers: Layers) -> tuple[int | None, Layers]:
    """The one way to say it: no window where no layer has it, and no layers where all of them have it."""
    if window is None or (layers is not None and not any(layers)):
        return None, None
    return window, None if layers is None or all(layers) else layers


def write_hf(config: ModelConfig, result: dict[str, Any]) -> None:
    """layer_types and sliding_window. A window that no layer has stays as it was."""
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    result["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if config.sliding_window is not None:
        result["sliding_window"] = config.sliding_window


def read_core(args: Mapping[str, Any], where: str) -> Layers:
    """The layers with a window, None: all of them. Raises ConversionError."""
    freq, count = args.get(ARG), args.get("num_layers") or 0
    if freq is None or args.get("window_size") is None:
        return None
    if isinstance(freq, str):
        freq = parse_freq(freq)
    step = 2 if args.get(_IN_HYBRID) else 1
    if type(freq) is int and freq > 0:
        layers = tuple(number % freq != 0 for number in range(1, step * count + 1))
    elif isinstance(freq, (list, tuple)) and len(freq) == step * count and all(one in (0, 1) for one in freq):
        layers = tuple(one == 1 for one in freq)
    else:
        raise ConversionError(f"{where} have {ARG} {str(freq)[:120]}, where a positive number, or a list of 0 and 1 of "
                              f"{step * count} layers, was expected")  # fmt: skip
    layers = layers[::step]
    return None if all(layers) else layers


def skip_freq(config: ModelConfig) -> int | list[int] | None:
    """window_attn_skip_freq: None where all layers are alike."""
    layers = config.window_layers
    if layers is None or config.sliding_window is None:
        return None
    numbers = range(1, len(layers) + 1)
    every = (freq for freq in numbers if layers == tuple(number % freq != 0 for number in numbers))
    return next(every, [int(has) for has in layers])


def core_flags(config: ModelConfig) -> list[str]:
    """Neither of them is restored."""
    if config.sliding_window is None:
        return []
    flags = [f"--window-size {config.sliding_window - 1},0"]
    freq = skip_freq(config)
    if freq is None:
        return flags
    text = pattern(freq)
    return [*flags, f"--window-attn-skip-freq {text}" if isinstance(freq, int) else f"--window-attn-skip-freq '{text}'"]
