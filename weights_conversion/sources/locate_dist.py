"""Finds every parameter of a model in a torch_dist checkpoint, whose tensors are cut into chunks of any shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.formats.dist_index import METADATA, Stored, StoredChunk
from weights_conversion.formats.dist_items import Items
from weights_conversion.formats.torch_dist import DistCheckpoint
from weights_conversion.layouts.placement import Block, Located, Placed, TensorRef, two_dimensional
from weights_conversion.mapping.parameters import Architecture, ParamMapping, is_buffer
from weights_conversion.sources import naming


def in_torch_dist(files: DistCheckpoint, architecture: Architecture, config: ModelConfig) -> Located:
    """Places every parameter of `architecture`. Raises ConversionError with all that does not fit."""
    lengths = [stored.size[0] for stored in files.stored.values() if stored.size]
    if config.num_layers > max([len(files.stored), *lengths]):
        raise ConversionError(f"{files.folder} has fewer tensors than the {config.num_layers} layers of its args need")
    placed: Located = {}
    with Items(files.folder) as items:
        search = _Search(files, config.num_layers, _Parts(files.stored, items))
        for row, layer in architecture.instances(config):
            found = search.find(row, layer, row.megatron_shape(config, files.vocabulary))
            if found:
                placed[row.megatron, layer] = (found,)
    unexpected = {
        key: f"{files.folder.name} has a tensor {key} that a {config.family} model does not have"
        for key in sorted(files.names - search.used)
        if not is_buffer(key)
    }
    problems = naming.grouped((problem, problem) for problem in dict.fromkeys(search.problems))
    if problems := problems + naming.mismatch(str(files.folder), search.missing, unexpected):
        raise ConversionError(*problems)
    return placed


@dataclass(frozen=True)
class _Candidate:
    """Where a parameter may be: the keys that hold it, the row at which each begins, and the shape of each."""

    keys: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    stacked: bool = False


@dataclass(frozen=True)
class _Search:
    """Looks for the parameters of a torch_dist checkpoint one by one; collects what is wrong, missing and used."""

    files: DistCheckpoint
    layers: int
    parts: _Parts
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def _candidates(self, row: ParamMapping, layer: int | None, shape: tuple[int, ...]) -> list[_Candidate]:
        """In a stacked tensor, in one of its own (layers that differ), or in a GLU's two halves."""
        name = self.files.dialect.spell(row.megatron)
        if layer is None:
            return [_Candidate(((name, 0),), shape)]
        own = name.format(layer)
        stacked = _Candidate(((name.replace("layers.{}.", "layers."), 0),), (self.layers, *shape), stacked=True)
        candidates = [stacked, _Candidate(((own, 0),), shape)]
        if row.shard and row.shard.blocks == 2:
            half = shape[0] // 2
            candidates.append(_Candidate(((f"{own}_w", 0), (f"{own}_v", half)), (half, *shape[1:])))
        return candidates

    def find(self, row: ParamMapping, layer: int | None, shape: tuple[int, ...]) -> Placed | None:
        """The parameter of full `shape`, or None and a problem."""
        stored, where = self.files.stored, self.files.folder.name
        full = row.megatron if layer is None else row.megatron.format(layer)
        candidates = self._candidates(row, layer, shape)
        found = [candidate for candidate in candidates if any(key in stored for key, _ in candidate.keys)]
        if not found:
            ((key, _),) = candidates[0].keys
            said = f"{where} has no tensor {key}, which should have shape {list(candidates[0].shape)}"
            self.missing.setdefault(key, said)
            return None
        if len(found) > 1:
            several = ", ".join(candidate.keys[0][0] for candidate in found)
            self.problems.append(f"{where} holds {full} several times: {several}")
            return None
        (candidate,) = found
        blocks: list[Block] = []
        for key, first in candidate.keys:
            self.used.add(key)
            if key not in stored or stored[key].size != candidate.shape:
                shown = f"shape {list(stored[key].size)}" if key in stored else "no such tensor"
                self.problems.append(f"{where}: {key}: {shown}, the args say {list(candidate.shape)}")
                return None
            blocks += self.parts.blocks(key, layer if candidate.stacked else None, first)
        key, _ = candidate.keys[0]
        rows, columns = two_dimensional(shape)
        if wrong := _uncovered(blocks, rows, columns):
            self.problems.append(f"the parts of {key} {wrong} in its shape {list(candidate.shape)}, by {METADATA}")
            return None
        return Placed(full, stored[key].dtype, rows, columns, (tuple(blocks),))


class _Parts:
    """The chunks of stored tensors as blocks, found by layer."""

    def __init__(self, stored: Mapping[str, Stored], items: Items) -> None:
        self._stored, self._items = stored, items
        self._by_layer: dict[str, dict[int, list[StoredChunk]]] = {}
        self._refs: dict[StoredChunk, TensorRef] = {}

    def blocks(self, key: str, layer: int | None, first: int) -> Iterator[Block]:
        """Chunks of `key` (those that hold stacked `layer`), as blocks of a tensor whose row `first` is their first."""
        stored = self._stored[key]
        for chunk in stored.chunks if layer is None else self._stacked(key).get(layer, ()):
            offsets, sizes, start = chunk.offsets, chunk.sizes, chunk.first
            if layer is not None:
                height, width = two_dimensional(sizes[1:])
                start += (layer - offsets[0]) * height * width
                offsets, sizes = offsets[1:], sizes[1:]
            height, width = two_dimensional(sizes)
            row, column = (offsets[0], 0) if len(offsets) == 1 else offsets
            if chunk not in self._refs:
                self._refs[chunk] = self._items.ref(key, chunk, stored.dtype)
            yield Block(self._refs[chunk], start, (first + row, first + row + height), (column, column + width))

    def _stacked(self, key: str) -> dict[int, list[StoredChunk]]:
        if key not in self._by_layer:
            self._by_layer[key] = defaultdict(list)
            for chunk in self._stored[key].chunks:
                for layer in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                    self._by_layer[key][layer].append(chunk)
        return self._by_layer[key]


def _uncovered(blocks: Iterable[Block], rows: int, columns: int) -> str | None:
    """What is wrong with `blocks` as a partition of `rows` x `columns`, if anything."""
    area, active = 0, []
    for block in sorted(blocks, key=lambda block: block.rows):
        active = [other for other in active if other.rows[1] > block.rows[0]]
        if any(other.columns[0] < block.columns[1] and block.columns[0] < other.columns[1] for other in active):
            return "overlap"
        active.append(block)
        area += (block.rows[1] - block.rows[0]) * (block.columns[1] - block.columns[0])
    return None if area == rows * columns else "leave a hole"
