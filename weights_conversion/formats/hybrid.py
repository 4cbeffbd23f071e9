"""Megatron-Core's HybridModel, where it holds what a GPTModel does: one sub-block per layer, by hybrid_layer_pattern.

Layer i of a GPTModel is there layers 2i (*: attention) and 2i+1 (-: MLP, E: experts); the last norm is
`decoder.final_norm`. Here names and args become a GPTModel's. What stands between pipeline stages (|) decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from weights_conversion.errors import ConversionError

PATTERN = "hybrid_layer_pattern"
SPEC = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
_OLD = "hybrid_override_pattern"
_NAMES = (PATTERN, _OLD, "is_hybrid_model", "spec")
IS_HYBRID = "_is_hybrid_model"  # in args, once they are a GPTModel's
_OTHERS = {"M": "state-space (Mamba) layers", "G": "gated delta layers", "D": "sparse attention (DSA)"}
_LAYER = re.compile(r"(?P<before>(?:.*\.)?decoder\.layers\.)(?P<layer>\d+)(?P<behind>\..+)")
_LONGEST = 100_000

T = TypeVar("T")


def pattern_of(args: Mapping[str, Any]) -> str | None:
    """The pattern of a HybridModel; None: it is none."""
    return next((args[name] for name in (PATTERN, _OLD) if isinstance(args.get(name), str) and args[name]), None)


def sub_blocks(pattern: str, where: str) -> str:
    """The symbols of the layers, in pairs of attention and MLP. Raises ConversionError for any other model."""
    plain = pattern.replace("|", "")
    problems = [
        f"{where} holds a HybridModel with {what} ({symbol} in its {PATTERN} {pattern[:60]!r}), which is not read yet"
        for symbol, what in _OTHERS.items()
        if symbol in plain
    ]
    if "/" in plain:
        problems.append(
            f"{where} holds a HybridModel with multi-token prediction (/ in its {PATTERN} {pattern[:60]!r}), which is "
            "not read yet"
        )
    if not problems and (len(plain) > _LONGEST or not re.fullmatch(r"(\*[-E])+", plain)):
        problems.append(
            f"{where} holds a HybridModel of {PATTERN} {pattern[:60]!r}, which is no attention (*) and MLP (-, or E of "
            "experts) in turn, as the layers of a supported model are"
        )
    if problems:
        raise ConversionError(*problems)
    return plain


def as_gpt_args(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Args of the GPTModel that a HybridModel's args describe."""
    plain = sub_blocks(pattern_of(args) or "", where)
    kinds = plain[1::2]
    changed = {name: value for name, value in args.items() if name not in _NAMES}
    for name in ("num_layers", "encoder_num_layers"):
        if changed.get(name) is not None:
            if changed[name] != len(plain):
                raise ConversionError(
                    f"the args of {where} have {name} {changed[name]}, but {PATTERN} {pattern_of(args)!r} has "
                    f"{len(plain)} layers"
                )
            changed[name] = len(kinds)
    changed["num_layers"] = len(kinds)
    if "E" in kinds:
        freq = [int(kind == "E") for kind in kinds]
        changed["moe_layer_freq"] = freq if 0 in freq else 1
    else:
        changed |= {name: None for name in ("num_experts", "num_moe_experts") if name in changed}
    return changed | {IS_HYBRID: True}


def hybrid_args(args: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """What of a GPTModel's args another HybridModel's are: its layers are sub-blocks."""
    count = len(sub_blocks(pattern, f"the {PATTERN}"))
    sizes = {"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8}  # of no layer here: their defaults
    return {
        PATTERN: pattern, "spec": SPEC, "num_layers": count, "encoder_num_layers": count, "moe_layer_freq": 1, **sizes,
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
