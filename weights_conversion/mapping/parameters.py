"""The declarative core: a row per parameter, which both directions and every layout are read from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from weights_conversion.config import ModelConfig
from weights_conversion.mapping.ops import Copy, Op

COPY = Copy()
# Buffers that a module computes when it is built, whatever their rank: rotary tables (transformers, Meta and the code
# that came with repositories) and causal masks. No family has a parameter of such a name.
_BUFFER = re.compile(
    r"(.*\.)?("
    r"(inv_freq|original_inv_freq|cos_cached|sin_cached|cos_sin_cache|freqs_cis|masked_bias|causal_mask|position_ids)"
    r"|(rope|rotary|rotary_emb|rotary_pos_emb|maybe_rotary)\.(freqs|cos|sin|cos_cache|sin_cache|scale)"
    r"|(attn|self_attn|attention|self_attention)\.bias"
    r")"
)


def is_buffer(name: str) -> bool:
    """Whether a source's tensor is computed, not learnt: it is left out without an error."""
    return _BUFFER.fullmatch(name) is not None


@dataclass(frozen=True)
class Shard:
    """How tensor parallelism cuts a full Megatron tensor along `dim`.

    With `blocks` > 1 the tensor is that many equal blocks one above the other, each cut by itself, and a rank holds
    its slice of every block (GLU: rank r holds [up_r ; gate_r]).
    """

    dim: int
    blocks: int = 1


COLUMN, ROW, GLU, REPLICATED = Shard(0), Shard(1), Shard(0, blocks=2), None


@dataclass(frozen=True)
class ParamMapping:
    """One parameter of the architecture. "{}" in a name is the layer; names are whole, so that they can be grepped.

    `megatron` is Megatron-LLM's training spelling below `language_model`; a Dialect respells it. `shape` names the
    axes (ModelConfig.axes) of the full, unpadded Megatron tensor; the HF shapes follow from `op`. `needs` names the
    ModelConfig field of models that have it; None: all of the family do.
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    shard: Shard | None = REPLICATED
    op: Op = COPY
    needs: str | None = None

    @property
    def per_layer(self) -> bool:
        return "{}" in self.megatron

    @property
    def pads_vocabulary(self) -> bool:
        return self.shape[0] == "vocab"

    def megatron_shape(self, config: ModelConfig, vocabulary: int | None = None) -> tuple[int, ...]:
        """Shape of the full Megatron tensor; with `vocabulary`, the padded number of rows where there is padding."""
        shape = tuple(config.axes[axis] for axis in self.shape)
        return shape if vocabulary is None or not self.pads_vocabulary else (vocabulary, *shape[1:])

    def hf_shapes(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        rows, *rest = self.megatron_shape(config)
        ranges = self.op.hf_rows(0, self.op.units(rows, config), config)
        return tuple((stop, *rest) for _, stop in ranges)


@dataclass(frozen=True)
class Architecture:
    """A family: its parameters, some of which depend on the config.

    `tied_head` is the HF name that a source with tied embeddings may hold as a copy of the embedding.
    """

    family: str
    parameters: Callable[[ModelConfig], tuple[ParamMapping, ...]]
    tied_head: str | None = None

    def instances(self, config: ModelConfig) -> Iterator[tuple[ParamMapping, int | None]]:
        """Every parameter with its layer, in model order: embedding, layer by layer, final norm, head."""
        rows = self.parameters(config)
        per_layer = [row for row in rows if row.per_layer]
        first = rows.index(per_layer[0])
        yield from ((row, None) for row in rows[:first] if not row.per_layer)
        yield from ((row, layer) for layer in range(config.num_layers) for row in per_layer)
        yield from ((row, None) for row in rows[first:] if not row.per_layer)
