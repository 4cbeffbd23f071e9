"""Megatron-Core's HybridModel: layers that are one sub-block each, as a pattern of symbols has them.

A model whose layers have attention and an MLP each is two sub-blocks a layer there: layer i of a GPTModel is 2i
(attention) and 2i+1 (the rest), and the last norm has another name. hybrid_layer_allocation.py: `|` stands between
pipeline stages, `/` in front of what predicts further tokens.
"""

from __future__ import annotations

from weights_conversion.config import ModelConfig

PATTERN = "hybrid_layer_pattern"
SPEC = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
_OF_ATTENTION = (".self_attention.", ".input_layernorm.")


def symbols(config: ModelConfig) -> str:
    """The pattern of a model: its own, or that of a GPTModel's layers."""
    if config.hybrid_layer_pattern is not None:
        return config.hybrid_layer_pattern
    layers = map(config.layer_features, range(config.num_layers))
    kinds = (("G" if "gated_delta" in features else "*", "E" if "moe" in features else "-") for features in layers)
    return "".join(symbol for kind in kinds for symbol in kind)


def sub_block(name: str) -> int:
    """Which of the two sub-blocks of a GPTModel's layer holds a parameter, by its name: 0 attention, 1 the rest."""
    return 0 if any(part in name for part in _OF_ATTENTION) else 1


def final_norm(name: str) -> str:
    """A GPTModel's name as it is there."""
    return name.replace("decoder.final_layernorm.", "decoder.final_norm.")


def stages(pattern: str) -> tuple[int, ...]:
    """How many layers each pipeline stage (and virtual stage, in the order of the layers) has; (): no cut is stated."""
    parts = pattern.partition("/")[0].split("|")
    return tuple(map(len, parts)) if len(parts) > 1 else ()
