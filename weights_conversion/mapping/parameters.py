"""The declarative core: a row per parameter, which both directions and every layout are read from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from weights_conversion.config import ModelConfig
from weights_conversion.mapping.joining import Packed, Part
from weights_conversion.mapping.ops import Copy, FuseGLU, FuseQKV, Op

COPY = Copy()
# Buffers that a module computes when it is built, whatever their rank: rotary tables (transformers, Meta and the code
# that came with repositories) and causal masks. No family has a parameter of such a name.
_BUFFER = re.compile(
    r"(.*\.)?("
    r"(inv_freq|original_inv_freq|_?cos_cached|_?sin_cached|cos_sin_cache|freqs_cis|masked_bias|causal_mask|position_ids)"
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


class Role(Enum):
    """What a layout must know of a tensor beside its shape: both tables are padded, and a tied one has copies."""

    PLAIN = "plain"
    EMBEDDING = "embedding"
    HEAD = "head"


Index = tuple[int, ...]  # (), (layer,) or (layer, expert)


def named(template: str, index: Index) -> str:
    """`template` with the numbers of a layer and an expert in it."""
    if not index:
        return template
    return template.format(layer=index[0], expert=index[-1])


@dataclass(frozen=True)
class ParamMapping:
    """One parameter of the architecture; names are whole, so that they can be grepped.

    `megatron` is its name in a Megatron-Core model with Transformer Engine; a Dialect respells it. "{layer}" and
    "{expert}" stand for numbers: a row of an expert is one row for all experts. `shape` names the axes
    (ModelConfig.axes) of the full, unpadded Megatron tensor; the HF shapes follow from `op`. `needs` are features of a
    layer (ModelConfig.layer_features), all of which it must have; `dtype` is one that it keeps whatever the model's is.

    torch_dist has what `megatron` names as a tensor of its own, while rank files may have it joined with others, as
    `live` says; so may HF, as `within` says, and then `hf` names it for people, as NAME[part].
    """

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    shard: Shard | None = REPLICATED
    op: Op = COPY
    needs: tuple[str, ...] = ()
    role: Role = Role.PLAIN
    dtype: str | None = None
    packed: tuple[Packed, ...] = ()  # one for each name in `hf`, where experts may be packed
    live: Part | None = None
    centred: bool = False  # Megatron has what HF has minus one
    hf_dtype: str | None = None  # that hub files have it in, whatever the model's is
    within: tuple[Part, ...] = ()  # one for each name in `hf`
    beside_packed: str | None = None  # its name in files whose experts are packed, where that is another

    @property
    def module(self) -> str:
        """The module that holds the parameter in a model that runs; or those whose names its state is saved under."""
        name = self.megatron if self.live is None or self.live.saved_apart else self.live.name
        return name.rpartition(".")[0]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron

    @property
    def pads_vocabulary(self) -> bool:
        return self.shape[0] == "vocab"

    def megatron_shape(self, config: ModelConfig, vocabulary: int | None = None) -> tuple[int, ...]:
        """Shape of the full Megatron tensor; with `vocabulary`, the padded number of rows where there is padding."""
        axes = config.axes
        shape = tuple(axes[axis] for axis in self.shape)
        return shape if vocabulary is None or not self.pads_vocabulary else (vocabulary, *shape[1:])

    def hf_shapes(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """Of what each name in `hf` is (a part alone where it is one)."""
        rows, *rest = self.megatron_shape(config)
        ranges = self.op.hf_rows(0, self.op.units(rows, config), config)
        return tuple((stop, *rest) for _, stop in ranges)


# ---- Helpers that name the parts of a row


def same(
    megatron: str, hf: str, shape: tuple[str, ...], shard: Shard | None = REPLICATED, *needs: str,
    op: Op = COPY, role: Role = Role.PLAIN, dtype: str | None = None, packed: tuple[Packed, ...] = (),
    centred: bool = False, hf_dtype: str | None = None,
) -> ParamMapping:  # fmt: skip
    """A parameter that is one tensor on both sides."""
    return ParamMapping(
        megatron, (hf,), shape, shard, op, needs, role, dtype, packed, centred=centred, hf_dtype=hf_dtype
    )


def joined(
    live: str, *needs: str, parts: Mapping[str, str], hf: Mapping[str, tuple[str, ...]], rest: tuple[str, ...],
    torch_dist: str | None = None, groups: str = "one",
) -> tuple[ParamMapping, ...]:  # fmt: skip
    """A row for each of `parts` (name -> axis of its rows), which a rank holds joined in that order as `live`.

    torch_dist calls them `torch_dist` (by default `live`) and their names; `hf`: name of a tensor -> the parts that it
    joins, in its own order, `groups` times; of one part alone: it is that part. `rest` are the axes behind the first.
    """
    where, rows = {part: (name, order) for name, order in hf.items() for part in order}, []
    for at, (part, axis) in enumerate(parts.items()):
        name, order = where[part]
        within = (Part(name, order.index(part), tuple(parts[each] for each in order), groups),)
        within, hf_name = ((), name) if order == (part,) else (within, f"{name}[{part}]")
        rows.append(
            ParamMapping(
                f"{torch_dist or live}.{part}", (hf_name,), (axis, *rest), COLUMN, COPY, needs,
                live=Part(live, at, tuple(parts.values())), within=within,
            )
        )  # fmt: skip
    return tuple(rows)


def qkv(megatron: str, *needs: str, q: str, k: str, v: str, shape: tuple[str, ...] = ("qkv", "hidden")) -> ParamMapping:
    """Queries, keys and values, fused group by group."""
    return ParamMapping(megatron, (q, k, v), shape, COLUMN, FuseQKV(), needs)


def glu(
    megatron: str, *needs: str, gate: str, up: str, rows: str = "glu", packed: tuple[Packed, ...] = ()
) -> ParamMapping:
    """Gate and up, one above the other; `rows` is the axis of both."""
    return ParamMapping(megatron, (gate, up), (rows, "hidden"), GLU, FuseGLU(), needs, packed=packed)


MTP = "mtp.layers.{layer}."  # prediction layers, which Megatron-Core counts by themselves


@dataclass(frozen=True, slots=True)
class Instance:
    """A row at one index; the only place that makes a name of it. Hugging Face's layer numbers are `offset` greater."""

    row: ParamMapping
    index: Index = ()
    offset: int = 0

    @property
    def key(self) -> tuple[str, Index]:
        return self.row.megatron, self.index

    @property
    def layer(self) -> int | None:
        return self.index[0] if self.index else None

    @property
    def predicts(self) -> bool:
        """Whether it is part of a multi-token prediction layer."""
        return self.row.megatron.startswith(MTP)

    @property
    def expert(self) -> int | None:
        return self.index[1] if len(self.index) > 1 else None

    def megatron(self, spelled: str | None = None, index: Index | None = None) -> str:
        """The parameter's name; `spelled` as a dialect has it, `index` as a rank counts it."""
        return named(self.row.megatron if spelled is None else spelled, self.index if index is None else index)

    def hf(self, spelled: str) -> str:
        """A name of Hugging Face's or Meta's, with its numbers in it; below mtp., layers are counted by themselves."""
        if not self.index:
            return spelled
        offset = 0 if spelled.startswith("mtp.") else self.offset
        return named(spelled, (self.index[0] + offset, *self.index[1:]))

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(self.hf(template) for template in self.row.hf)


@dataclass(frozen=True)
class Architecture:
    """A family: its parameters, some of which depend on the config.

    `tied_head` is the HF name that a source with tied embeddings may hold as a copy of the embedding, and that an
    export must hold where `writes_tied_head` says that transformers does not tie them itself. `mtp_copies` are HF names
    of the copies that a prediction layer has of a row's tensor, by the row's name in Megatron.
    """

    family: str
    rows: tuple[ParamMapping, ...]
    tied_head: str | None = None
    writes_tied_head: bool = False
    mtp_copies: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def embedding(self) -> Instance:
        return Instance(next(row for row in self.rows if row.role is Role.EMBEDDING))

    def parameters(self, config: ModelConfig) -> tuple[ParamMapping, ...]:
        """The rows that a model of `config` has, in some layer or beside the layers."""
        features = {config.layer_features(layer) for layer in range(config.num_layers)}
        return tuple(row for row in self.rows if any(there.issuperset(row.needs) for there in features))

    def instances(self, config: ModelConfig) -> Iterator[Instance]:
        """Every parameter at each of its indices, in model order: embedding, layer by layer, final norm, head."""
        rows = self.parameters(config)
        first = next(at for at, row in enumerate(rows) if row.per_layer)
        predicting = [row for row in rows if row.megatron.startswith(MTP)]
        layers = [row for row in rows if row.per_layer and not row.megatron.startswith(MTP)]
        yield from (Instance(row) for row in rows[:first] if not row.per_layer)
        for layer in range(config.num_layers):
            yield from _at_layer(layers, config, layer, config.layer_features(layer))
        for layer in range(config.mtp_num_layers):  # each is as the last layer is
            features = config.layer_features(config.num_layers - 1)
            yield from _at_layer(predicting, config, layer, features, config.num_layers)
        yield from (Instance(row) for row in rows[first:] if not row.per_layer)

    def copies(self, instance: Instance, config: ModelConfig) -> tuple[str, ...]:
        """HF names of the copies of a tensor that prediction layers have, or a tied head."""
        tied = config.tie_word_embeddings and instance.row.role is Role.EMBEDDING  # it is the head too
        if not tied and instance.row.megatron not in self.mtp_copies:
            return ()
        rows = [instance.row, *(row for row in self.rows if tied and row.role is Role.HEAD)]
        numbers = range(config.num_layers, config.num_layers + config.mtp_num_layers)
        templates = [self.mtp_copies[row.megatron] for row in rows if row.megatron in self.mtp_copies]
        copies = tuple(named(template, (number,)) for template in templates for number in numbers)
        return (*copies, self.tied_head) if tied and self.writes_tied_head and self.tied_head is not None else copies


def _at_layer(
    rows: Sequence[ParamMapping], config: ModelConfig, layer: int, features: frozenset[str], offset: int = 0
) -> Iterator[Instance]:
    here = [row for row in rows if features.issuperset(row.needs)]
    yield from (Instance(row, (layer,), offset) for row in here if not row.per_expert)
    experts = [row for row in here if row.per_expert]
    number = config.moe.num_experts if config.moe is not None and experts else 0
    yield from (Instance(row, (layer, expert), offset) for expert in range(number) for row in experts)
