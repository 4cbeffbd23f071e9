"""Finds every parameter of a model in a torch_dist checkpoint, whose tensors are cut into chunks of any shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from weights_conversion.config import ModelConfig
from weights_conversion.errors import ConversionError
from weights_conversion.formats.dist_index import METADATA, Stored, StoredChunk
from weights_conversion.formats.dist_items import Items
from weights_conversion.formats.torch_dist import DistCheckpoint
from weights_conversion.layouts.dist import dist_key
from weights_conversion.layouts.parts import joined_shape, part_of
from weights_conversion.layouts.placement import Block, Located, Placed, TensorRef, two_dimensional
from weights_conversion.mapping.parameters import Architecture, Index, Instance, Part, is_buffer
from weights_conversion.sources import expert_counts, naming


def in_torch_dist(files: DistCheckpoint, architecture: Architecture, config: ModelConfig) -> Located:
    """Places every parameter of `architecture`. Raises ConversionError with all that does not fit."""
    lengths = [stored.size[0] for stored in files.stored.values() if stored.size]
    if config.num_layers > max([len(files.stored), *lengths]):
        raise ConversionError(f"{files.folder} has fewer tensors than the {config.num_layers} layers of its args need")
    expert_counts.check_forms(files.stored.keys(), str(files.folder))
    placed: Located = {}
    with Items(files.folder) as items:
        search = _Search(files, architecture, config, Parts(files.stored, items))
        for instance in architecture.instances(config):
            found = search.find(instance, instance.row.megatron_shape(config, files.vocabulary))
            if found:
                placed[instance.key] = (found,)
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
    """Where a parameter may be: the keys that hold it, the row at which each begins, and the shape of each.

    `lead` are indices along leading axes, whose sizes `shape` begins with. `part`: it is that part of a joined tensor.
    """

    keys: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    lead: Index = ()
    part: Part | None = None


@dataclass(frozen=True)
class _Search:
    """Looks for the parameters of a torch_dist checkpoint one by one; collects what is wrong, missing and used."""

    files: DistCheckpoint
    architecture: Architecture
    config: ModelConfig
    parts: Parts
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @cached_property
    def spellings(self) -> dict[str, tuple[str, ...]]:
        """The names that a row's tensor may have, by the row's own."""
        dialect, found = self.files.dialect, {}
        for row in self.architecture.rows:
            names = *dialect.spellings(row.megatron), *dialect.dist_spellings(row.megatron)
            found[row.megatron] = tuple(dict.fromkeys((*names, dialect.live(row.megatron))))  # as Megatron-FSDP has it
        return found

    def _candidates(self, instance: Instance, shape: tuple[int, ...]) -> list[list[_Candidate]]:
        """Where it is, for each spelling: stacked, in one of its own (layers that differ), or in a GLU's two halves."""
        stored, dialect, row = self.files.stored, self.files.dialect, instance.row
        several = []
        for spelled in self.spellings[row.megatron]:
            found = []
            for stacked in (True, False) if instance.index and not instance.predicts else (False,):
                key, lead = dist_key(instance, spelled, stacked=stacked)
                if key in stored:
                    found.append(self._stacked(instance, key, lead, shape))
            own = [instance.megatron(spelled)]
            if instance.expert is not None:  # by its number in the name, as singletons and Megatron-FSDP have it
                name, end = own[0].rsplit(".", 1)
                before, module = name.rsplit(".", 1)
                kind = end.rstrip("0123456789")
                own += [f"{before}.{inner}.{instance.expert}.{module}.{kind}" for inner in ("experts", "local_experts")]
                own.append(f"{name}.{end}")
            for name in dict.fromkeys(own):
                if instance.expert is not None and name in stored:
                    found.append(_Candidate(((name, 0),), shape))
                if row.shard and row.shard.blocks == 2 and (f"{name}_w" in stored or f"{name}_v" in stored):
                    half = shape[0] // 2
                    found.append(_Candidate(((f"{name}_w", 0), (f"{name}_v", half)), (half, *shape[1:])))
            several.append(found)
        if row.live is not None:  # whole, as Megatron-FSDP has it: one behind the other what each tensor rank holds
            whole = joined_shape(row.live, shape, self.config)
            for name in dict.fromkeys((row.live.name, dialect.other_spelling(row.live.name))):
                keys = (instance.megatron(dialect.live(name)), instance.megatron(name))
                several += [
                    [_Candidate(((key, 0),), whole, part=row.live)] for key in dict.fromkeys(keys) if key in stored
                ]
        return several

    def _stacked(self, instance: Instance, key: str, lead: Index, shape: tuple[int, ...]) -> _Candidate:
        """A tensor with a leading axis for each index in `lead`."""
        experts = self.config.moe.num_experts if self.config.moe is not None else 0
        sizes = (self.config.num_layers, experts)[: len(instance.index)]
        return _Candidate(((key, 0),), (*sizes[len(instance.index) - len(lead) :], *shape), lead)

    def find(self, instance: Instance, shape: tuple[int, ...]) -> Placed | None:
        """The parameter of full `shape`, or None and a problem."""
        stored, where = self.files.stored, self.files.folder.name
        full = instance.megatron()
        found = self._candidates(instance, shape)
        if not any(found):
            key, lead = dist_key(instance, self.spellings[instance.row.megatron][0], stacked=bool(instance.index))
            first = self._stacked(instance, key, lead, shape)
            self.missing.setdefault(key, f"{where} has no tensor {key}, which should have shape {list(first.shape)}")
            return None
        for same in found:
            if len(same) > 1:
                several = ", ".join(candidate.keys[0][0] for candidate in same)
                self.problems.append(f"{where} holds {full} several times: {several}; remove all but one")
                self.used.update(key for candidate in same for key, _ in candidate.keys)
                return None
        # A norm in the spellings of two layer specs is there twice.
        copies = [self._blocks(candidate, shape) for same in found for candidate in same]
        if any(blocks is None for blocks in copies):
            return None
        key, _ = next(candidate for same in found for candidate in same).keys[0]
        rows, columns = two_dimensional(shape)
        return Placed(full, stored[key].dtype, rows, columns, tuple(tuple(blocks) for blocks in copies if blocks))

    def _blocks(self, candidate: _Candidate, shape: tuple[int, ...]) -> list[Block] | None:
        """The blocks of a tensor of `shape` in a place where it is, or None and a problem."""
        stored, where = self.files.stored, self.files.folder.name
        blocks: list[Block] = []
        for key, first in candidate.keys:
            self.used.add(key)
            if key not in stored or stored[key].size != candidate.shape:
                shown = f"shape {list(stored[key].size)}" if key in stored else "no such tensor"
                self.problems.append(f"{where}: {key}: {shown}, the args say {list(candidate.shape)}")
                return None
            blocks += self.parts.blocks(key, candidate.lead, first)
        key, _ = candidate.keys[0]
        whole = two_dimensional(shape if candidate.part is None else candidate.shape)
        if wrong := uncovered(blocks, *whole):
            at = f" at {list(candidate.lead)}" if candidate.lead else ""  # of a layer, of an expert
            said = f"the parts of {key}{at} {wrong} in its shape {list(candidate.shape)}, by {METADATA}"
            self.problems.append(f"{said}; was the copy complete?")
            return None
        if candidate.part is None:
            return blocks
        joined = Placed(key, stored[key].dtype, *whole, (tuple(blocks),))
        ranks = self.files.args.get("tensor_model_parallel_size") or 1
        return list(part_of(joined, candidate.part, self.config, ranks).copies[0])


class Parts:
    """The chunks of stored tensors as blocks, found by layer."""

    def __init__(self, stored: Mapping[str, Stored], items: Items) -> None:
        self._stored, self._items = stored, items
        self._by_lead: dict[tuple[str, int], dict[Index, list[StoredChunk]]] = {}
        self._refs: dict[int, TensorRef] = {}  # by the chunk's identity: a hash of all its numbers takes longer

    def blocks(self, key: str, lead: Index, first: int) -> Iterator[Block]:
        """Chunks of `key` (those that hold index `lead`), as blocks of a tensor whose row `first` is their first."""
        stored, depth = self._stored[key], len(lead)
        for chunk in self._at(key, depth).get(lead, ()):
            number = 0  # of the matrix within the chunk
            for index, offset, size in zip(lead, chunk.offsets, chunk.sizes, strict=False):
                number = number * size + index - offset
            offsets, sizes = chunk.offsets[depth:], chunk.sizes[depth:]
            height, width = two_dimensional(sizes)
            row, column = offsets[0], 0
            for offset, size in zip(offsets[1:], stored.size[depth + 1 :], strict=True):
                column = column * size + offset
            ref = self._refs.get(id(chunk))
            if ref is None:
                ref = self._refs[id(chunk)] = self._items.ref(key, chunk, stored.dtype)
            rows = (first + row, first + row + height)
            start = chunk.first + number * height * width
            yield Block(ref, start, rows, (column, column + width))

    def _at(self, key: str, depth: int) -> dict[Index, list[StoredChunk]]:
        """The chunks of `key` by the indices of its first `depth` axes that they hold."""
        if (key, depth) not in self._by_lead:
            self._items.expect(key, self._stored[key].chunks, self._stored[key].dtype)
            found = self._by_lead[key, depth] = defaultdict(list)
            for chunk in self._stored[key].chunks:
                spans = [range(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True)]
                for lead in product(*spans[:depth]):
                    found[lead].append(chunk)
        return self._by_lead[key, depth]


def uncovered(blocks: Iterable[Block], rows: int, columns: int) -> str | None:
    """What is wrong with `blocks` as a partition of `rows` x `columns`, if anything."""
    area, active = 0, []
    for block in sorted(blocks, key=lambda block: block.rows):
        active = [other for other in active if other.rows[1] > block.rows[0]]
        if any(other.columns[0] < block.columns[1] and block.columns[0] < other.columns[1] for other in active):
            return "overlap"
        active.append(block)
        area += (block.rows[1] - block.rows[0]) * (block.columns[1] - block.columns[0])
    return None if area == rows * columns else "leave a hole"
