"""Args and names of Megatron-Core's HybridModel, whose layers are one sub-block each, by hybrid_layer_pattern.

Where it holds what a GPTModel does, attention and the rest in turn, args and names of torch_dist become a GPTModel's
here. Any other pattern is a model of its own kind, whose families have such layers. What stands between pipeline stages
(|) is of rank files alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from weights_conversion.errors import ConversionError
from weights_conversion.mapping.hybrid import PATTERN, SPEC

_OLD = "hybrid_override_pattern"
_NAMES = (PATTERN, _OLD, "is_hybrid_model", "spec")
IS_HYBRID = "_is_hybrid_model"  # in args, once they are a GPTModel's
_OTHERS = {"D": "sparse attention (DSA)", "+": "multi-latent attention"}
_OWN = "M*-EG"
_GPT = re.compile(r"([*G][-E])+")
# How a GPTModel's args say that layers are gated delta, where a pattern does not.
_VARIANT, _FREQ = "experimental_attention_variant", "linear_attention_freq"
_LAYER = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?P<layer>\d+)(?P<behind>\..+)")
_LONGEST = 100_000
# Where Megatron-Core's own layers of it are built, in this release and in older ones.
_SPECS = ("megatron.core.models.hybrid.", "megatron.core.models.mamba.")

T = TypeVar("T")


def pattern_of(args: Mapping[str, Any]) -> str | None:
    """The pattern of a HybridModel; None: it is none."""
    return next((args[name] for name in (PATTERN, _OLD) if isinstance(args.get(name), str) and args[name]), None)


def symbols(pattern: str, where: str) -> str:
    """A symbol for each layer, of those that some model here has. Raises ConversionError."""
    plain, shown = pattern.replace("|", ""), f"{PATTERN} {pattern[:60]!r}"
    problems = [
        f"{where} holds a HybridModel with {what} ({symbol} in its {shown}), which is not read yet"
        for symbol, what in _OTHERS.items()
        if symbol in plain
    ]
    if "/" in plain:
        problems.append(
            f"{where} holds a HybridModel with multi-token prediction (/ in its {shown}), which is not read yet"
        )
    if not problems and (len(plain) > _LONGEST or not re.fullmatch(f"[{re.escape(_OWN)}]+", plain)):
        problems.append(f"{where} holds a HybridModel of {shown}, where symbols of {_OWN} (and |) were expected")
    if problems:
        raise ConversionError(*problems)
    return plain


def is_gpt(args: Mapping[str, Any], plain: str) -> bool:
    """Whether it is what a GPTModel holds: attention and the rest in turn, and positions by a rotary embedding."""
    return _GPT.fullmatch(plain) is not None and args.get("position_embedding_type") != "none"


def read_args(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A HybridModel's args: a GPTModel's where it holds one, else with the plain pattern, and without the spec."""
    plain = symbols(pattern_of(args) or "", where)
    _check_spec(args.get("spec"), where)
    gpt = is_gpt(args, plain)
    if "G" in plain and not gpt:
        raise ConversionError(
            f"{where} holds a HybridModel with gated delta layers (G in its {PATTERN} {plain[:60]!r}) that are not all "
            "followed by an MLP or experts, which no supported family has"
        )
    changed = {name: value for name, value in args.items() if name not in _NAMES}
    for name in ("num_layers", "encoder_num_layers"):
        if changed.get(name) not in (None, len(plain)):
            raise ConversionError(
                f"the args of {where} have {name} {changed[name]}, but {PATTERN} {pattern_of(args)!r} has "
                f"{len(plain)} layers"
            )
    kinds = plain[1::2] if gpt else plain
    changed |= {name: len(kinds) for name in ("num_layers", "encoder_num_layers") if name in (*changed, "num_layers")}
    if gpt and "G" in plain:
        changed |= {_VARIANT: "gated_delta_net", _FREQ: [int(symbol == "G") for symbol in plain[::2]]}
    if "E" in kinds:
        freq = [int(kind == "E") for kind in kinds]
        changed["moe_layer_freq"] = freq if 0 in freq else 1
    else:
        changed |= {name: None for name in ("num_experts", "num_moe_experts") if name in changed}
    return changed | ({IS_HYBRID: True} if gpt else {PATTERN: plain})


def _check_spec(spec: Any, where: str) -> None:
    module = spec[0] if isinstance(spec, (list, tuple)) and spec else spec
    if isinstance(module, str) and not module.startswith(_SPECS):
        raise ConversionError(f"{where} holds a HybridModel with layers of its own code (spec is {spec!r})")


def hybrid_args(pattern: str) -> dict[str, Any]:
    """What of a GPTModel's args another HybridModel's are: its layers are sub-blocks."""
    count = len(symbols(pattern, f"the {PATTERN}"))
    sizes = {"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8}  # of no layer here: their defaults
    delta = {_VARIANT: None, _FREQ: None} if "G" in pattern else {}  # the pattern says it
    return {
        PATTERN: pattern, "spec": SPEC, "num_layers": count, "encoder_num_layers": count, "moe_layer_freq": 1,
        **sizes, **delta,
    }  # fmt: skip


def as_gpt_names(stored: Mapping[str, T], where: str) -> dict[str, T]:
    """`stored` under the names of a GPTModel."""
    found: dict[str, T] = {}
    for key, value in stored.items():
        match = _LAYER.fullmatch(key)
        name = key.replace("decoder.final_norm.", "decoder.final_layernorm.")
        if match:
            name = f"{match['before']}{int(match['layer']) // 2}{match['behind']}"
        if name in found:
            raise ConversionError(f"{where} has {key} beside another tensor of the same kind, against its {PATTERN}")
        found[name] = value
    return found


def warnings(args: Mapping[str, Any]) -> list[str]:
    """What HybridModel does not do, whatever its args say."""
    if not args.get(IS_HYBRID) or args.get("rope_scaling") is None or args["rope_scaling"].kind != "llama3":
        return []
    return [
        "args say --use-rope-scaling, which is exported; stock Megatron-LM's HybridModel ignores it: if the model was "
        "trained there, take rope_scaling out of the exported config.json"
    ]
