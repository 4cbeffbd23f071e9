"""Stored tensors by row ranges, put together from ranks without the converter's own tables.

How Megatron cuts a tensor among ranks, and which stage holds which layer, is written down here a second time, so that
a mistake in the mapping or the placement is not made on both sides of the proof.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from weights_conversion.architectures import FAMILIES
from weights_conversion.config import ModelConfig
from weights_conversion.engine.execute import read_rows
from weights_conversion.engine.streams import Scratch, Source
from weights_conversion.errors import ConversionError
from weights_conversion.formats.megatron import RankFiles
from weights_conversion.layouts.placement import Key, Placed, TensorRef
from weights_conversion.layouts.rank_files import Rank
from weights_conversion.mapping.dialects import HF
from weights_conversion.verification import parts
from weights_conversion.verification.adapted import with_deltas
from weights_conversion.verification.conventions import block_of
from weights_conversion.verification.forward import Weights
from weights_conversion.verification.sides import Model
from weights_conversion.verification.whole import huggingface_weights
from weights_conversion.verification.whole_dist import dist_weights

BY_ROWS = ("word_embeddings.weight", "word_embeddings_for_head.weight", "lm_head", "output_layer.weight",
           "query_key_value.weight", "linear_qkv.weight", "linear_qkv.bias", "dense_h_to_4h.weight",
           "linear_fc1.weight", "linear_q_proj.weight", "linear_q_up_proj.weight",
           "linear_kv_up_proj.weight", "eh_proj.weight", "softmax_offset", ".A_log", ".D", ".dt_bias",
           ".mixer.norm.weight")  # fmt: skip
BY_COLUMNS = (".dense.weight", "linear_proj.weight", ".out_proj.weight", "dense_4h_to_h.weight", "linear_fc2.weight")
GATED = ("dense_h_to_4h.weight", "linear_fc1.weight")  # two halves, each cut by itself, where the MLP is gated
TIED_COPY = {"Megatron-LLM": "word_embeddings_for_head.weight", "Megatron-Core": "output_layer.weight"}


@dataclass(frozen=True)
class Part:
    """Rows first..last of a full tensor: `refs` beside each other, from local row `local` on."""

    first: int
    last: int
    refs: tuple[TensorRef, ...]
    local: int


@dataclass(frozen=True)
class RankReader:
    """Weights of a checkpoint of rank files. `order` and `halves` are hypotheses about what its writer did."""

    files: RankFiles
    config: ModelConfig
    source: Source
    order: tuple[int, ...]
    only: str = ""  # the end of the names for which `order` holds; the others are joined rank by rank
    halves: bool = True

    def __call__(self, name: str, rows: slice | None) -> Tensor:
        parts = self._parts(name)
        first, last = (rows.start, rows.stop) if rows is not None else (0, parts[-1].last)
        pieces = []
        for part in parts:
            start, stop = max(first, part.first), min(last, part.last)
            if start < stop:
                local = part.local + start - part.first
                columns = [_read(ref, local, local + stop - start, self.source) for ref in part.refs]
                pieces.append(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _parts(self, name: str) -> list[Part]:
        if (joined := self._joined(name)) is not None:
            return joined
        refs = self._refs(name)
        name = re.sub(r"(\.experts\..*weight)\d+$", r"\1", name)
        height = refs[0].shape[0]
        if name.endswith(BY_COLUMNS):
            return [Part(0, height, tuple(refs), 0)]
        if not name.endswith(BY_ROWS):
            return [Part(0, height, (refs[0],), 0)]
        if name.endswith(GATED) and block_of(self.config).gated and self.halves:
            half, full = height // 2, height // 2 * len(refs)
            return [
                Part(block * full + rank * half, block * full + (rank + 1) * half, (ref,), block * half)
                for block in range(2)
                for rank, ref in enumerate(refs)
            ]
        return [Part(rank * height, (rank + 1) * height, (ref,), 0) for rank, ref in enumerate(refs)]

    def _joined(self, name: str) -> list[Part] | None:
        """Where a tensor of several parts has one of them, of which each rank has its share; None: it is none."""
        part = parts.part_of(name, self.config)
        if part is None:
            return self._fused(name)
        live, first, last = part
        refs = self._refs(live)
        share, local = (last - first) // len(refs), first // len(refs)
        return [Part(rank * share, (rank + 1) * share, (ref,), local) for rank, ref in enumerate(refs)]

    def _fused(self, name: str) -> list[Part] | None:
        """Where a run with --mla-down-proj-fusion has what another has as modules of their own; None: it is none.

        A rank has its rows of q's down projection, and below them its rows of kv's. The norm in front of both is a
        whole copy.
        """
        module, mla = "self_attention.linear_qkv_down_proj.", self.config.mla
        if mla is None or not any(module in stored for stored in self.files.names):
            return None
        if name.endswith(".input_layernorm.weight"):
            ref = self._refs(name.replace("input_layernorm.weight", f"{module}layer_norm_weight"))[0]
            return [Part(0, ref.shape[0], (ref,), 0)]
        match = re.fullmatch(r"(.*)self_attention\.linear_(q|kv)_down_proj\.weight", name)
        if match is None:
            return None
        refs = self._refs(f"{match[1]}{module}weight")
        own = (mla.q_lora_rank or 0) // len(refs)
        height = own if match[2] == "q" else refs[0].shape[0] - own
        local = 0 if match[2] == "q" else own
        return [Part(at * height, (at + 1) * height, (ref,), local) for at, ref in enumerate(refs)]

    def _refs(self, name: str) -> list[TensorRef]:
        """The tensor of every tensor rank, in the order in which they are joined."""
        parallel = self.files.parallel
        stages, chunks = parallel.pipeline, parallel.virtual
        match = re.search(r"(.*\blayers\.)(\d+)(\..*)", name)
        if name.startswith("mtp."):  # the last stage has all prediction layers
            chunk, stage = chunks - 1, stages - 1
        elif match:
            layer = int(match[2])
            if parallel.hybrid:  # attention and the rest of a layer are layers of their own
                layer = 2 * layer + (not match[3].startswith((".self_attention.", ".input_layernorm.")))
            chunk, stage, local = self._dealt[layer]
            name = f"{match[1]}{local}{match[3]}"
        elif "embedding.word_embeddings" in name:
            chunk, stage = 0, 0
        else:
            chunk, stage = chunks - 1, stages - 1
            name = name.replace("decoder.final_layernorm.", "decoder.final_norm.") if parallel.hybrid else name
        key = f"model{chunk}" if chunks > 1 else "model"
        found = []
        holders, name = self._holders(name, stage)
        for rank in holders:
            tensors = self.files.ranks[rank]
            ref = tensors.get(f"{key}.{name}") or tensors.get(f"{key}.{self.files.dialect.other_spelling(name)}")
            if ref is None:
                raise ConversionError(f"rank {rank.tensor} of stage {stage} of {self.files.folder} has no {key}.{name}")
            found.append(ref)
        return found

    def _holders(self, name: str, stage: int) -> tuple[list[Rank], str]:
        """(the ranks that hold the parts of a tensor, in the order in which they are joined; its name there).

        Experts are dealt to the expert ranks in turn, as many to each, and each is cut by tensor rank % ETP.
        """
        ranks = sorted(rank for rank in self.files.ranks if rank.pipeline == stage)
        expert = re.fullmatch(r"(.*\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)", name)
        if expert is None or self.config.moe is None:
            order = self.order if name.endswith(self.only) else range(self.files.parallel.tensor)
            return [next(rank for rank in ranks if rank.tensor == number) for number in order], name
        each = self.config.moe.num_experts // self.files.parallel.expert
        home, local = divmod(int(expert[2]), each)
        cut = self.files.parallel.experts_tensor
        there = [rank for rank in ranks if rank.expert == home]
        return [next(rank for rank in there if rank.tensor % cut == n) for n in range(cut)], f"{expert[1]}{local}"

    @functools.cached_property
    def _dealt(self) -> list[tuple[int, int, int]]:
        """(chunk, stage, local number) of every layer, by what the files of the first tensor rank hold.

        Layers are dealt to the stages in turn, chunk after chunk.
        """
        held: set[tuple[int, int, int]] = set()
        for stage in range(self.files.parallel.pipeline):
            for name in self.files.ranks[Rank(0, stage)]:
                if match := re.match(r"model(\d*)\..*?\blayers\.(\d+)\.", name):
                    held.add((int(match[1] or 0), stage, int(match[2])))
        return sorted(held)


def _read(ref: TensorRef, first: int, last: int, source: Source) -> Tensor:
    if ref.transposed:
        turned = torch.empty(ref.shape[::-1], dtype=ref.dtype)
        source.read(ref, 0, turned)
        return turned.t()[first:last]
    width = prod(ref.shape[1:])
    rows = torch.empty((last - first, *ref.shape[1:]), dtype=ref.dtype)
    source.read(ref, first * width * ref.dtype.itemsize, rows)
    return rows


@dataclass(frozen=True)
class PlacedReader:
    """Weights of Meta's files, simply joined."""

    placed: Mapping[str, Placed]
    vectors: frozenset[str]
    source: Source

    def __call__(self, name: str, rows: slice | None) -> Tensor:
        placed = self.placed.get(name)
        if placed is None:
            raise ConversionError(f"there is no tensor {name}")
        first, last = (rows.start, rows.stop) if rows is not None else (0, placed.rows)
        tensor = read_rows(placed, (first, last), self.source, Scratch()).clone()
        return tensor[:, 0] if name in self.vectors else tensor


def weights_of(
    model: Model, source: Source, order: Sequence[int] | None = None, only: str = "", halves: bool = True
) -> Weights:
    """`forward.Weights` of one side; `order` of its tensor ranks, where they are to be joined in another one."""
    return with_deltas(_stored(model, source, order, only, halves), model, source)


def _stored(model: Model, source: Source, order: Sequence[int] | None, only: str, halves: bool) -> Weights:
    files = model.files
    if files is not None and files.format == "torch":
        order = order or range(files.parallel.tensor)
        return RankReader(files, model.config, source, tuple(order), only, halves)
    if files is not None:
        ranks = files.args.get("tensor_model_parallel_size") or 1
        return dist_weights(files.folder, model.config.num_layers, model.weights, model.config, ranks)
    if model.dialect.name == HF.name:
        return huggingface_weights(model.path)
    placed: dict[str, Placed] = {}
    vectors = set()
    for instance in FAMILIES[model.config.family].instances(model.config):
        for name, tensor in zip(instance.row.hf, model.placed[instance.key], strict=True):
            spelled = instance.hf(model.dialect.spell(name))
            placed[spelled] = tensor
            if len(instance.row.shape) == 1:
                vectors.add(spelled)
    return PlacedReader(placed, frozenset(vectors), source)


def head_of(model: Model) -> str | None:
    """The last stage's copy of a tied embedding, by its stored name, where there is one."""
    tied = model.config.tie_word_embeddings
    if tied and model.files is not None and model.files.parallel.pipeline > 1:
        return TIED_COPY[model.kind]
    return None


def keys_of(model: Model) -> dict[str, Key]:
    """Stored name -> the parameter that it is (a part of)."""
    config, dialect = model.config, model.dialect
    found: dict[str, Key] = {}
    for instance in FAMILIES[config.family].instances(config):
        if dialect.megatron:
            spelled = dialect.live(instance.row.megatron) if instance.predicts else dialect.spell(instance.row.megatron)
            found[dialect.rank_name(instance.megatron(spelled))] = instance.key
        else:
            found |= {instance.hf(dialect.spell(name)): instance.key for name in instance.row.hf}
    return found


def rounded(weights: Weights, model: Model, other: Model) -> Weights:
    """`weights` rounded to the other side's dtype where that is coarser, so that a recast leaves the sides equal.

    What the other side stores minus one, or plus one, is rounded as it stands there.
    """
    keys = {_asked(name): key for name, key in keys_of(model).items()}
    if (head := head_of(model)) is not None:  # a copy, and no row
        keys[head] = next(key for name, key in keys.items() if "word_embeddings.weight" in name)
    centred = {each.key for each in FAMILIES[model.config.family].instances(model.config) if each.row.centred}
    by = 0.0 if model.dialect.megatron == other.dialect.megatron else -1.0 if other.dialect.megatron else 1.0

    def read(name: str, rows: slice | None) -> Tensor:
        tensor = weights(name, rows)
        key = keys.get(_PACKED.sub(r".experts.\2.\1", name))
        there = other.placed.get(key) if key else None
        if not there:
            return tensor
        coarser = torch.finfo(there[0].dtype).eps / torch.finfo(tensor.dtype).eps
        if by and key in centred and coarser >= 1:  # in one type too: a sum with 1 is rounded
            return (tensor.float() + by).to(there[0].dtype).float() - by
        return tensor.to(there[0].dtype) if coarser > 1 else tensor

    return read


# An expert of a packed tensor, as the forward pass asks for it
_PACKED = re.compile(r"\.experts\.((?:gate_up|down)_proj(?:_bias)?)\.(\d+)(?:\.\w+)?$")


def _asked(name: str) -> str:
    """A row's name as the forward pass asks for it: the text model's, and of a tensor of several parts the whole's."""
    return name.replace("model.language_model.", "model.", 1).partition("[")[0]
