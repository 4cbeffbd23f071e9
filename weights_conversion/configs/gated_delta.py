"""Layers of gated delta among those of full attention: config.json <-> GatedDelta <-> Megatron-Core's args.

Sources: transformers' modeling_qwen3_next.py and configuration_qwen3_next.py; Megatron-Core's
experimental_attention_variant_module_specs.py (linear_attention_freq: an integer N makes every N-th layer full
attention, a list says 1 of linear ones) and ssm/gated_delta_net.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights_conversion.config import GatedDelta, ModelConfig
from weights_conversion.configs import moe_layers

SIZES = {
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_head_dim": "linear_key_head_dim",
    "value_head_dim": "linear_value_head_dim",
    "conv_kernel_dim": "linear_conv_kernel_dim",
}
_VARIANT, _FREQ = "experimental_attention_variant", "linear_attention_freq"
_KINDS = {"linear_attention": True, "full_attention": False}
READ = frozenset({*SIZES.values(), _VARIANT, _FREQ})


def read_hf(full: Mapping[str, Any], num_layers: int) -> GatedDelta | list[str]:
    """The layers of a config.json, or what is wrong, in words that follow "has". `full` has the class's defaults."""
    sizes, problems = _sizes(full)
    kinds, interval = full.get("layer_types"), full.get("full_attention_interval", 4)  # transformers' default
    layers: tuple[bool, ...] = ()
    if kinds is not None:
        known = isinstance(kinds, list) and all(isinstance(kind, str) and kind in _KINDS for kind in kinds)
        if not known or len(kinds) != num_layers:
            problems.append(f"layer_types {kinds!r}, where {num_layers} of {' and '.join(_KINDS)} were expected")
        else:
            layers = tuple(_KINDS[kind] for kind in kinds)
    elif type(interval) is int and interval > 0:
        layers = tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    else:
        problems.append(f"full_attention_interval {interval!r}, where a positive int was expected")
    return problems or GatedDelta(layers, **sizes)


def _sizes(stated: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    values: dict[str, Any] = {field: stated.get(key) for field, key in SIZES.items()}
    problems = [
        f"{SIZES[field]} {value!r}, where a positive int was expected"
        for field, value in values.items()
        if type(value) is not int or value <= 0
    ]
    if not problems and values["num_value_heads"] % values["num_key_heads"]:
        problems.append(
            f"{SIZES['num_value_heads']} {values['num_value_heads']}, which {SIZES['num_key_heads']} "
            f"{values['num_key_heads']} does not divide"
        )
    return values, problems


def write_hf(delta: GatedDelta, result: dict[str, Any]) -> None:
    """Both spellings of which layers are which: layer_types, and the interval where one says it."""
    result.update({key: getattr(delta, field) for field, key in SIZES.items()})
    result["layer_types"] = ["linear_attention" if linear else "full_attention" for linear in delta.layers]
    interval = _interval(delta.layers)
    if interval is not None:
        result["full_attention_interval"] = interval
    else:
        result.pop("full_attention_interval", None)


def _interval(layers: tuple[bool, ...]) -> int | None:
    """N where every N-th layer is full attention, and there is one; None: no number says which are."""
    if all(layers):
        return None
    number = layers.index(False) + 1
    return number if layers == tuple((layer + 1) % number != 0 for layer in range(len(layers))) else None


def of_text(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Args of a whole model with vision as those of its text model, whose positions are the same on all of mrope's
    axes: plain rope."""
    if args.get(_VARIANT) is None or args.get("position_embedding_type") != "mrope":
        return args
    return {**args, "position_embedding_type": "rope", "mrope_section": None}


def read_core(args: Mapping[str, Any]) -> GatedDelta | list[str] | None:
    """The layers that Megatron-Core's args state, or what is wrong; None: there are none."""
    if args.get(_VARIANT) is None:
        return None
    if args[_VARIANT] != "gated_delta_net":
        return [f"{_VARIANT} {args[_VARIANT]!r}, which none of the supported families has"]
    sizes, problems = _sizes(args)
    freq, count = args.get(_FREQ), args.get("num_layers")
    if type(count) is not int or not 0 < count < 100_000:
        return [*problems, f"num_layers {count!r}, where a number of layers was expected"]
    layers: tuple[bool, ...] = ()
    if type(freq) is int and freq > 0:
        layers = tuple((layer + 1) % freq != 0 for layer in range(count))
    elif isinstance(freq, (list, tuple)) and len(freq) == count and all(one in (0, 1) for one in freq):
        layers = tuple(one == 1 for one in freq)
    else:
        problems.append(
            f"{_FREQ} {freq!r}, where a number or a list of {count} of 0 (full) and 1 (linear) was expected"
        )
    return problems or GatedDelta(layers, **sizes)


def freq_of(delta: GatedDelta) -> int | list[int]:
    """linear_attention_freq. The list where a number would be 1, which is no linear layer."""
    interval = _interval(delta.layers)
    return [int(linear) for linear in delta.layers] if interval in (None, 1) else interval


def write_core(config: ModelConfig) -> dict[str, Any]:
    """Args of such a model; of any other, none: it has the defaults."""
    delta = config.gated_delta
    if delta is None:
        return {}
    return {
        _VARIANT: "gated_delta_net",
        _FREQ: freq_of(delta),
        **{name: getattr(delta, field) for field, name in SIZES.items()},
        "attention_output_gate": config.attention_output_gate,
    }


def core_flags(config: ModelConfig) -> list[str]:
    """Flags of Megatron-LM, none of which --use-checkpoint-args restores."""
    delta = config.gated_delta
    if delta is None:
        return []
    freq = freq_of(delta)
    text = moe_layers.pattern(freq)  # Megatron-LM's parser takes no spaces
    shown = f"'{text}'" if isinstance(freq, list) else text
    sizes = [f"--{name.replace('_', '-')} {getattr(delta, field)}" for field, name in SIZES.items()]
    return [f"--{_VARIANT.replace('_', '-')} gated_delta_net", f"--linear-attention-freq {shown}", *sizes]


def core_warnings(config: ModelConfig) -> list[str]:
    if config.gated_delta is None:
        return []
    found = [
        "layers of gated delta need Transformer Engine (--transformer-impl transformer_engine) and the package "
        "flash-linear-attention; Megatron-Core's own layer spec has none"
    ]
    if config.mtp_num_layers:
        found.append(
            "pretrain_gpt.py of Megatron-LM 0.19 stops at a prediction layer beside gated delta, gpt_builders.py and "
            "Megatron-Bridge build it; --mtp drop leaves it out"
        )
    return found
