"""Megatron-Core's `torch_dist` checkpoints: torch.distributed.checkpoint's files, without a process group.

`.metadata` names every stored tensor, the chunks that it was cut into, and for each chunk a run of bytes in a `.distcp`
file. Such an item is a whole torch.save archive. Layers are stacked along a leading axis, so that neither tensor nor
pipeline parallelism shows; the optimizer's entries stand beside the model's and are never read.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weights_conversion import core_args
from weights_conversion.config import ConversionError, ModelConfig, Parallelism
from weights_conversion.dialects import MEGATRON_CORE, Dialect
from weights_conversion.formats import torch_files
from weights_conversion.formats.dist_index import METADATA, Items, Stored, StoredChunk, read_metadata, uncovered
from weights_conversion.formats.megatron import plain_args
from weights_conversion.mapping import Architecture, ParamMapping
from weights_conversion.placement import PAGE, Block, Placed, TensorRef, two_dimensional
from weights_conversion.plan import instances, megatron_shape

COMMON = "common.pt"
EXTRA_STATES = "__0_0.distcp"  # holds nothing else
_EMBEDDING = "embedding.word_embeddings.weight"
_EXTRA_STATE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistCheckpoint:
    """A torch_dist checkpoint. `args` are in Megatron-LLM's names (core_args.normalise)."""

    folder: Path
    iteration: int | str
    args: Mapping[str, Any]
    stored: Mapping[str, Stored] = field(repr=False)
    dialect: Dialect = MEGATRON_CORE
    parallel: Parallelism = field(default_factory=Parallelism)

    @property
    def vocabulary(self) -> int:
        stored = self.stored.get(_EMBEDDING)
        if stored is None or len(stored.size) != 2:
            raise ConversionError(
                f"{self.folder} has no {_EMBEDDING} of Megatron-Core's torch_dist format; it has "
                f"{', '.join(sorted(self.stored)[:4]) or 'no parameter'}{' ...' * (len(self.stored) > 4)}"
            )
        return stored.size[0]

    def has_head(self) -> bool:
        return "output_layer.weight" in self.stored

    def sources(
        self, architecture: Architecture, config: ModelConfig
    ) -> dict[tuple[str, int | None], tuple[Placed, ...]]:
        """Places every parameter; missing, misshapen and unexpected tensors are errors."""
        problems = core_args.foreign_tensors(self.stored, self.folder)
        problems += core_args.foreign_to_family(self.args, config.family, self.folder)
        lengths = [stored.size[0] for stored in self.stored.values() if stored.size]
        if config.num_layers > max([len(self.stored), *lengths]):
            problems.append(f"{self.folder} has fewer tensors than the {config.num_layers} layers of its args need")
        if problems:
            raise ConversionError(*problems)
        used: set[str] = set()
        placed: dict[tuple[str, int | None], tuple[Placed, ...]] = {}
        with Items(self.folder) as items:
            parts = _Parts(self.stored, items)
            for row, layer in instances(architecture.parameters(config), config.num_layers):
                shape = megatron_shape(row, config, self.vocabulary)
                found = self._find(row, layer, shape, config.num_layers, parts, used, problems)
                if found:
                    placed[row.megatron, layer] = (found,)
        problems += [
            f"{self.folder.name} has a tensor {key} that a {config.family} model does not have"
            for key in sorted(set(self.stored) - used)
        ]
        if problems:
            raise ConversionError(*dict.fromkeys(problems))
        return placed

    def _find(
        self, row: ParamMapping, layer: int | None, shape: Sequence[int], layers: int, parts: _Parts, used: set[str],
        problems: list[str],
    ) -> Placed | None:  # fmt: skip
        """A parameter: in a stacked tensor, in one of its own (layers that differ), or in a GLU's two halves."""
        name = MEGATRON_CORE.spell(row.megatron)
        rows, columns = two_dimensional(shape)
        full = row.megatron if layer is None else row.megatron.format(layer)
        # where it may be: the keys that hold it, each with the row at which it begins, and the shape of each
        tries: list[tuple[tuple[tuple[str, int], ...], tuple[int, ...]]] = [(((name, 0),), tuple(shape))]
        if layer is not None:
            own = name.format(layer)
            halves = ((f"{own}_w", 0), (f"{own}_v", rows // 2))
            tries = [(((name.replace("layers.{}.", "layers."), 0),), (layers, *shape)), (((own, 0),), tuple(shape))]
            if row.shard and row.shard.blocks == 2:
                tries.append((halves, (rows // 2, *shape[1:])))
        found = [(keys, expected) for keys, expected in tries if any(key in self.stored for key, _ in keys)]
        if len(found) != 1:
            stored = ", ".join(keys[0][0] for keys, _ in found)
            problems.append(
                f"{self.folder.name} holds {full} several times: {stored}" if found else
                f"{self.folder.name} has no tensor {tries[0][0][0][0]}, which should have shape {list(tries[0][1])}"
            )  # fmt: skip
            return None
        ((keys, expected),) = found
        blocks: list[Block] = []
        for key, first in keys:
            stored = self.stored.get(key)
            used.add(key)
            if stored is None or stored.size != expected:
                shown = f"shape {list(stored.size)}" if stored else "no such tensor"
                problems.append(f"{self.folder.name}: {key}: {shown}, the args say {list(expected)}")
                return None
            blocks += parts.blocks(key, layer if len(expected) > len(shape) else None, first)
        if wrong := uncovered(blocks, rows, columns):
            problems.append(f"the parts of {keys[0][0]} {wrong} in its shape {list(expected)}, by {METADATA}")
            return None
        return Placed(full, self.stored[keys[0][0]].dtype, rows, columns, (tuple(blocks),))


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
            offsets, sizes, start = chunk.offsets, chunk.sizes, 0
            if layer is not None:
                height, width = two_dimensional(sizes[1:])
                start = (layer - offsets[0]) * height * width
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


def open_dist(folder: Path, iteration: int | str) -> DistCheckpoint:
    """Opens a torch_dist checkpoint: its index and args, no tensors."""
    stored, others = read_metadata(folder / METADATA)
    common = _common(folder, others)
    args, said_by = common.get("args"), folder / COMMON
    if args is None:
        stated, said_by = core_args.without_args(folder)
        args = argparse.Namespace(**stated)
    plain = plain_args(args, said_by)
    if lost := core_args.unreadable(vars(args), plain, folder):
        raise ConversionError(*lost)
    args = core_args.normalise(plain, folder)
    files = {chunk.file for tensor in stored.values() for chunk in tensor.chunks}
    missing = sorted(name for name in files if not (folder / name).is_file())
    if missing:
        shown = ", ".join(missing[:8]) + f" and {len(missing) - 8} more" * (len(missing) > 8)
        raise ConversionError(f"{folder} lacks {shown}, which {METADATA} names; copy the missing files")
    return DistCheckpoint(folder, iteration, args, stored)


def _common(folder: Path, others: Mapping[str, StoredChunk]) -> Mapping[str, Any]:
    """The common state: common.pt, or the entry that newer releases put among the tensors."""
    path, entry = folder / COMMON, next((item for _, item in sorted(others.items())), None)
    if path.is_file():
        content = torch_files.read_torch_file(path, further=core_args.COMMON_GLOBALS).content
    elif entry is not None:
        path = folder / entry.file
        if not path.is_file():
            raise ConversionError(f"{folder} lacks {entry.file}, which holds the common state; copy it again")
        content = torch_files.read_torch_file(path, entry.start, entry.length, core_args.COMMON_GLOBALS).content
        if isinstance(content, list) and len(content) == 1:
            (content,) = content
    elif (folder / core_args.RUN_CONFIG).is_file():
        return {}
    else:
        raise ConversionError(
            f"{folder} has neither {COMMON} nor {core_args.RUN_CONFIG}, so nothing says what model it is; copy them "
            "from where the checkpoint was saved"
        )
    if not isinstance(content, dict):
        raise ConversionError(f"the common state in {path} is a {type(content).__name__}, not a dict")
    return content


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One archive of a .distcp file: its place, the bytes before and behind its data, and where those begin."""

    ref: TensorRef
    start: int
    head: bytes = field(repr=False)
    tail: bytes = field(repr=False)

    @property
    def data(self) -> int:
        return self.start + len(self.head)

    @property
    def length(self) -> int:
        return len(self.head) + self.ref.nbytes + len(self.tail)


@dataclass(frozen=True)
class DistFileTarget:
    """A .distcp file to be written."""

    file: str
    refs: tuple[TensorRef, ...]

    def items(self) -> list[Item]:
        """Every item on a page of its own, so that its data begin on one."""
        items, position = [], 0
        for ref in self.refs:
            head, tail = archive_around(ref.shape, ref.dtype)
            items.append(Item(ref, position, head, tail))
            position += -(-items[-1].length // PAGE) * PAGE
        return items

    def create(self, root: Path, resume: bool = False) -> dict[TensorRef, int]:
        """Writes everything but the data, at its final size; returns the first byte of each tensor's data."""
        items = self.items()
        if not resume:
            path = root / self.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for item in items:
                    file.seek(item.start)
                    file.write(item.head)
                    file.seek(item.data + item.ref.nbytes)
                    file.write(item.tail)
        return {item.ref: item.data for item in items}

    def finish(self, root: Path, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None:
        """Puts the CRC-32 of each item's data where its archive keeps it."""
        with (root / self.file).open("r+b") as file:
            for item in self.items():
                torch_files.patch_crcs(file, item.start, item.length, {item.data: (item.ref.nbytes, crcs[item.ref])})


_ARCHIVES: dict[tuple[tuple[int, ...], torch.dtype], tuple[bytes, bytes]] = {}


def archive_around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save writes before and behind the data of one tensor; equal for all of one shape and type."""
    if (shape, dtype) not in _ARCHIVES:
        ref = TensorRef("archive.pt", "tensor", dtype, shape)
        with tempfile.TemporaryDirectory() as folder:
            offset = torch_files.write_without_data(Path(folder) / ref.file, ref)[ref]
            with (Path(folder) / ref.file).open("rb") as file:
                head = file.read(offset)
                file.seek(offset + ref.nbytes)
                _ARCHIVES[shape, dtype] = head, file.read()
    return _ARCHIVES[shape, dtype]


def metadata(targets: Sequence[DistFileTarget], extra: Mapping[str, tuple[str, int, int]]) -> bytes:
    """The pickled index. `extra` are the byte entries: key -> (file, offset, length)."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks: dict[str, list[ChunkStorageMetadata]] = {}
    dtypes: dict[str, torch.dtype] = {}
    storage = {}
    for target in targets:
        for item in target.items():
            key, where = item.ref.name.split("@")
            starts = [int(number) for number in where.split(",")]
            offsets = torch.Size([*starts, *[0] * (len(item.ref.shape) - len(starts))])
            chunks.setdefault(key, []).append(ChunkStorageMetadata(offsets, torch.Size(item.ref.shape)))
            dtypes[key] = item.ref.dtype
            storage[MetadataIndex(key, offsets)] = _StorageInfo(Path(target.file).name, item.start, item.length)
    entries: dict[str, Any] = {}
    for key, parts in chunks.items():
        size = [max(c.offsets[axis] + c.sizes[axis] for c in parts) for axis in range(len(parts[0].sizes))]
        properties = TensorProperties(dtype=dtypes[key])
        ordered = sorted(parts, key=lambda chunk: tuple(chunk.offsets))
        entries[key] = TensorStorageMetadata(properties, torch.Size(size), ordered)
    for key, (file, offset, length) in extra.items():
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(file, offset, length)
    return pickle.dumps(Metadata(entries, None, storage), protocol=4)


def extra_states(layers: int) -> tuple[bytes, dict[str, tuple[str, int, int]]]:
    """Empty Transformer-Engine states, which a load under the default strictness demands: a file, and its entries."""
    buffer = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8)], buffer)
    state = buffer.getvalue()
    names = [f"decoder.layers.{m}._extra_state/shard_{i}_{layers}" for m in _EXTRA_STATE_MODULES for i in range(layers)]
    names.append("decoder.final_layernorm._extra_state/shard_0_1")
    entries = {name: (EXTRA_STATES, index * len(state), len(state)) for index, name in enumerate(names)}
    return state * len(names), entries


def small_files(args: Mapping[str, Any], iteration: int) -> dict[str, bytes]:
    """common.pt and metadata.json."""
    buffer = io.BytesIO()
    common = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "content_metadata": {"singleton_local_shards": False},
    }
    torch.save(common, buffer)
    kinds = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    return {COMMON: buffer.getvalue(), "metadata.json": json.dumps(kinds).encode()}
