"""Norms as they are before a model is loaded: their stored names, by stage, and whether all of their weights are so."""

from __future__ import annotations

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.verification import predicting
from weights_conversion.verification.conventions import Convention
from weights_conversion.verification.linear import Weights

SENTENCE = "the norm's weights are all ones, as they are before a model is loaded"


def is_unloaded(config: ModelConfig, convention: Convention, weights: Weights, stage: str, layer: int | None) -> bool:
    """Whether the norm that makes a stage holds what it begins with; False for a stage that no norm makes."""
    name = _norm_name(config, convention, stage, layer)
    start = 0 if config.layernorm_zero_centered_gamma else 1
    try:
        return name is not None and bool((weights(name, None) == start).all())
    except ConversionError:  # layers of other kinds have no norm of this name
        return False


def _norm_name(config: ModelConfig, convention: Convention, stage: str, layer: int | None) -> str | None:
    if stage in ("final_norm", "prediction"):
        return predicting.norm_of(convention, config, layer)
    if layer is None:
        return None
    names, delta = convention.names_for(config), config.gated_delta
    further = predicting.names_of(convention.title, config) if layer >= config.num_layers else None
    own = min(layer, config.num_layers - 1)  # a prediction layer is as the last layer is
    linear_layer = delta is not None and own < len(delta.layers) and delta.layers[own]
    before = names.attention_norm if config.mla is None or names.latent is None else names.latent.norm
    before = names.delta.before if linear_layer and names.delta is not None else before
    routed = names.experts is not None and config.moe is not None and config.moe.layers[own]
    mlp_norm = names.experts.norm if routed and names.experts is not None else names.mlp_norm
    behind = {"attention_post_norm": names.after_attention, "mlp_post_norm": names.after_mlp}
    name = ({"attention_norm": before, "mlp_norm": mlp_norm} | behind).get(stage)
    prefix = names.layer.format(layer) if further is None else further.prefix(config, layer) + further.inner
    return prefix + name if name else None
