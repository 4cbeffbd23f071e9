"""Rows of multi-token prediction: a layer behind the last one, with projections and norms of its own.

Hugging Face numbers it as one more layer. Its copies of the embedding and the head are the model's own tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from weights_conversion.mapping.parameters import COLUMN, MTP, ParamMapping, same

COPIES = {
    "embedding.word_embeddings.weight": "model.layers.{layer}.embed_tokens.weight",
    "output_layer.weight": "model.layers.{layer}.shared_head.head.weight",
}
_AROUND = (
    same(f"{MTP}enorm.weight", "model.layers.{layer}.enorm.weight", ("hidden",)),
    same(f"{MTP}hnorm.weight", "model.layers.{layer}.hnorm.weight", ("hidden",)),
    same(f"{MTP}eh_proj.weight", "model.layers.{layer}.eh_proj.weight", ("hidden", "two_hidden"), COLUMN),
)
_LAST = same(f"{MTP}final_layernorm.weight", "model.layers.{layer}.shared_head.norm.weight", ("hidden",))


def predicting(layer: Iterable[ParamMapping]) -> tuple[ParamMapping, ...]:
    """The rows of a prediction layer whose inner layer has the rows `layer`."""
    inner = (
        replace(row, megatron=row.megatron.replace("decoder.layers.{layer}.", f"{MTP}transformer_layer."))
        for row in layer
    )
    return (*_AROUND, *inner, _LAST)
