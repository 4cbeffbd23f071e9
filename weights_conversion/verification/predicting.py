"""Stored names of layers that predict further tokens, written down a second time, as those of conventions.py are."""

from __future__ import annotations

from dataclasses import dataclass

from weights_conversion.config import ModelConfig
from weights_conversion.verification.conventions import Convention

# Families whose prediction layers are like their last layer, with two norms and a projection in front of it.
_FAMILIES = frozenset({"deepseek-v3", "glm4-moe", "glm4-moe-lite", "qwen3-next", "qwen3.5", "qwen3.5-moe"})


@dataclass(frozen=True)
class PredictionNames:
    """`{}` in `layer` is the layer's number: counted on behind the last layer, or (`apart`) from 0.

    `inner` stands in front of the names of the layer inside; `joined` takes the embedding and the hidden state.
    """

    layer: str
    embedding_norm: str
    hidden_norm: str
    joined: str
    norm: str
    inner: str = ""
    apart: bool = False

    def prefix(self, config: ModelConfig, index: int) -> str:
        """Of layer `index`, counted on behind the last one."""
        return self.layer.format(index - config.num_layers if self.apart else index)


_NAMES = {
    "Hugging Face": PredictionNames(
        "model.layers.{}.", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"
    ),
    "Megatron-Core": PredictionNames(
        "mtp.layers.{}.", "enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight",
        "mtp_model_layer.", apart=True,
    ),
}  # fmt: skip


# Of families that have them beside the model, with one projection for all of them.
_BESIDE = PredictionNames(
    "mtp.", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight", "norm.weight", "layers.0."
)


def names_of(title: str, config: ModelConfig) -> PredictionNames | None:
    """Names by the convention's `title`; None: there are no such layers, or they are not run."""
    if title == "Hugging Face" and config.mtp_num_layers and config.gated_delta is not None:
        return _BESIDE
    return _NAMES.get(title) if config.mtp_num_layers and config.family in _FAMILIES else None


def numbers(title: str, config: ModelConfig) -> range:
    """The prediction layers that are run, counted on behind the last layer."""
    count = config.mtp_num_layers if names_of(title, config) is not None else 0
    return range(config.num_layers, config.num_layers + count)


def norm_of(convention: Convention, config: ModelConfig, index: int | None) -> str:
    """The stored name of the norm behind prediction layer `index`, or (None) behind the model's own layers."""
    names = names_of(convention.title, config)
    if index is None or names is None:
        return convention.names_for(config).final_norm
    return names.prefix(config, index) + names.norm
