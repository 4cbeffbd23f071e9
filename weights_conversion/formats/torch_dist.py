"""Megatron-Core's `torch_dist` checkpoints: torch.distributed.checkpoint files, read and written without a process group.

`.metadata` names every stored tensor, the chunks that it was cut into, and for each chunk a run of bytes in a `.distcp`
file. Such an item is a whole torch.save archive. Layers are stacked along a leading axis, so that neither tensor nor
pipeline parallelism shows; the optimizer's entries stand beside the model's and are never read.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weights_conversion import core_args
from weights_conversion.config import ConversionError, ModelConfig, Parallelism
from weights_conversion.dialects import MEGATRON_CORE, Dialect
from weights_conversion.formats import pickles, torch_files
from weights_conversion.mapping import Architecture, ParamMapping
from weights_conversion.placement import Block, Placed, TensorRef, two_dimensional
from weights_conversion.plan import PAGE, instances, megatron_shape

METADATA = ".metadata"
EXTRA_STATES = "__0_0.distcp"  # holds nothing else

# What a checkpoint holds beside its parameters: optimizer, random and fault-tolerance state, Transformer-Engine's state.
_IGNORED = re.compile(r"^(chained_\d+\.)?optimizer\.|^(rng_state|rerun_state_machine_state|common_state)\b|\._extra_state")
_EXTRA_STATE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


# --- reading ----------------------------------------------------------------------------------------------------------


class _Record:
    """Stands for an object of torch.distributed.checkpoint: keeps what it was built from."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update((key, value) for key, value in state.items() if isinstance(key, str))


_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA_GLOBALS = {
    **{
        (f"{_CHECKPOINT}.metadata", name): name
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{
        (f"{_CHECKPOINT}.planner", name): name
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesWriteData", "BytesIOWriteData")
    },
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): "_StorageInfo",
    ("torch.serialization", "_get_layout"): "layout",
    ("pathlib", "PosixPath"): "PosixPath",
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): "Metadata",
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): "SavePlan",
}


@dataclass(frozen=True)
class StoredChunk:
    """A part of a stored tensor: where it begins in it, its sizes, and the item that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A stored tensor, by `.metadata`."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def read_metadata(path: Path) -> tuple[dict[str, Stored], dict[str, StoredChunk]]:
    """The model's tensors, and the byte entries, by key."""
    stubs = {name: type(name, (_Record,), {}) for name in set(_METADATA_GLOBALS.values())}
    further = {key: stubs[name] for key, name in _METADATA_GLOBALS.items()}
    try:
        content = pickles.load(path.read_bytes(), str(path), further)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    try:
        items: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in content.storage_data.items():
            offset = getattr(index, "offset", None)  # left out where there is none
            items[index.fqn, None if offset is None else _numbers(offset)] = info
        tensors, others = {}, {}
        for key, entry in content.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):
                if (key, None) in items:
                    others[key] = _chunk(key, (), (), items[key, None], path)
            elif not _IGNORED.search(key):
                chunks = tuple(
                    _chunk(key, _numbers(chunk.offsets), _numbers(chunk.sizes), items[key, _numbers(chunk.offsets)], path)
                    for chunk in entry.chunks
                )
                tensors[key] = Stored(_dtype(entry.properties), _numbers(entry.size), chunks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path} is not the index of a checkpoint ({type(error).__name__}: {error})") from error
    return tensors, others


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(value) is int and value >= 0 for value in numbers):
        raise ValueError(f"sizes {numbers!r}")
    return numbers


def _dtype(properties: Any) -> torch.dtype:
    dtype = properties.dtype if hasattr(properties, "dtype") else properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {dtype!r}")
    return dtype


def _chunk(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any, path: Path) -> StoredChunk:
    if getattr(info, "transform_descriptors", None):
        raise ConversionError(f"{path}: {key} is compressed ({info.transform_descriptors}), which is not supported")
    name = info.relative_path
    if not isinstance(name, str) or Path(name).name != name:
        raise ConversionError(f"{path} names {name!r}, which is not a file of its own folder")
    start, length = _numbers((info.offset, info.length))
    return StoredChunk(offsets, sizes, name, start, length)


@dataclass(frozen=True)
class DistCheckpoint:
    """A torch_dist checkpoint. `args` are in Megatron-LLM's names (core_args.normalise)."""

    folder: Path
    iteration: int | str
    args: Mapping[str, Any]
    stored: Mapping[str, Stored] = field(repr=False)
    dialect: Dialect = MEGATRON_CORE
    parallel: Parallelism = Parallelism()

    @property
    def vocabulary(self) -> int:
        stored = self.stored.get("embedding.word_embeddings.weight")
        if stored is None:
            raise ConversionError(f"{self.folder} has no embedding.word_embeddings.weight")
        return stored.size[0]

    def has_head(self) -> bool:
        return "output_layer.weight" in self.stored

    def sources(self, architecture: Architecture, config: ModelConfig) -> dict[tuple[str, int | None], tuple[Placed, ...]]:
        """Places every parameter; missing, misshapen and unexpected tensors are errors."""
        problems: list[str] = []
        used: set[str] = set()
        placed: dict[tuple[str, int | None], tuple[Placed, ...]] = {}
        for row, layer in instances(architecture.parameters(config), config.num_layers):
            shape = megatron_shape(row, config, self.vocabulary)
            found = self._find(row, layer, shape, config.num_layers, used, problems)
            if found:
                placed[row.megatron, layer] = (found,)
        problems += [
            f"{self.folder.name} has a tensor {key} that a {config.family} model does not have"
            for key in sorted(set(self.stored) - used)
        ]
        if problems:
            raise ConversionError(*problems)
        return placed

    def _find(
        self, row: ParamMapping, layer: int | None, shape: Sequence[int], layers: int, used: set[str], problems: list[str]
    ) -> Placed | None:
        """A parameter: in a stacked tensor, in one of its own (layers that differ), or in a GLU's two halves."""
        name = MEGATRON_CORE.spell(row.megatron)
        rows, columns = two_dimensional(shape)
        full = row.megatron if layer is None else row.megatron.format(layer)
        if layer is None:
            tries = [(name, tuple(shape), ((name, 0),))]
        else:
            own = name.format(layer)
            stacked = name.replace("layers.{}.", "layers.")
            halves = ((f"{own}_w", 0), (f"{own}_v", rows // 2))
            tries = [(stacked, (layers, *shape), ((stacked, 0),)), (own, tuple(shape), ((own, 0),))]
            if f"{own}_w" in self.stored:
                tries.append((f"{own}_w", (rows // 2, *shape[1:]), halves))
        for key, expected, parts in tries:
            stored = self.stored.get(key)
            if stored is None:
                continue
            if any(part not in self.stored for part, _ in parts):
                continue
            used.update(part for part, _ in parts)
            if stored.size != expected:
                problems.append(f"{key} has shape {list(stored.size)}, the args say {list(expected)}")
                return None
            blocks: list[Block] = []
            for part, first in parts:
                blocks += self._blocks(part, layer if len(expected) > len(shape) else None, first)
            if sum((b.rows[1] - b.rows[0]) * (b.columns[1] - b.columns[0]) for b in blocks) != rows * columns:
                problems.append(f"the chunks of {key} do not cover its shape {list(stored.size)}")
                return None
            return Placed(full, stored.dtype, rows, columns, (tuple(blocks),))
        problems.append(f"{self.folder.name} has no tensor {tries[0][0]}, which should have shape {list(tries[0][1])}")
        return None

    def _blocks(self, key: str, layer: int | None, first: int) -> Iterator[Block]:
        """Chunks of `key` (those that hold stacked `layer`), as blocks of a tensor in which they begin at row `first`."""
        for chunk in self.stored[key].chunks:
            offsets, sizes, start = chunk.offsets, chunk.sizes, 0
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + sizes[0]:
                    continue
                height, width = two_dimensional(sizes[1:])
                start = (layer - offsets[0]) * height * width
                offsets, sizes = offsets[1:], sizes[1:]
            height, width = two_dimensional(sizes)
            row, column = (offsets[0], 0) if len(offsets) == 1 else offsets
            ref = self._ref(key, chunk)
            yield Block(ref, start, (first + row, first + row + height), (column, column + width))

    def _ref(self, key: str, chunk: StoredChunk) -> TensorRef:
        path = self.folder / chunk.file
        if not path.is_file():
            raise ConversionError(f"{self.folder} lacks {chunk.file}, which holds a part of {key}; copy it again")
        item = torch_files.read_torch_file(path, chunk.start, chunk.length)
        if not isinstance(item.content, pickles.StoredTensor):
            raise ConversionError(f"{path} holds a {type(item.content).__name__} at byte {chunk.start}, not {key}")
        ref = item.ref(item.content, f"{key} {list(chunk.offsets)}")
        if ref.shape != chunk.sizes or ref.dtype != self.stored[key].dtype:
            raise ConversionError(f"{path}: the part of {key} at byte {chunk.start} has shape {list(ref.shape)}, "
                                  f"{METADATA} says {list(chunk.sizes)}")  # fmt: skip
        return ref


def open_dist(folder: Path, iteration: int | str) -> DistCheckpoint:
    """Opens a torch_dist checkpoint: its index and args, no tensors."""
    tensors, others = read_metadata(folder / METADATA)
    common = _common(folder, others)
    args = common.get("args")
    if args is not None and not hasattr(args, "__dict__"):
        raise ConversionError(f"{folder / 'common.pt'} holds args that are a {type(args).__name__}")
    stated = dict(vars(args)) if args is not None else core_args.from_run_config(folder)
    stated = core_args.normalise(stated, folder)
    missing = sorted({c.file for s in tensors.values() for c in s.chunks if not (folder / c.file).is_file()})
    if missing:
        raise ConversionError(f"{folder} lacks {', '.join(missing)}, which {METADATA} names; copy the missing files")
    return DistCheckpoint(folder, iteration, stated, tensors)


def _common(folder: Path, others: Mapping[str, StoredChunk]) -> dict[str, Any]:
    """The common state: common.pt, or the entry that newer releases put among the tensors."""
    path = folder / "common.pt"
    if path.is_file():
        content = torch_files.read_torch_file(path, further=core_args.COMMON_GLOBALS).content
    else:
        entry = next((item for key, item in others.items() if key.startswith("common_state")), None)
        if entry is None:
            if (folder / "run_config.yaml").is_file():
                return {}
            raise ConversionError(
                f"{folder} has neither common.pt nor run_config.yaml, so nothing says what model it is; copy them from "
                "where the checkpoint was saved"
            )
        item = torch_files.read_torch_file(
            folder / entry.file, entry.start, entry.length, further=core_args.COMMON_GLOBALS
        )
        content = item.content
    if not isinstance(content, dict):
        raise ConversionError(f"the common state of {folder} is a {type(content).__name__}, not a dict")
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
    return {"common.pt": buffer.getvalue(), "metadata.json": json.dumps(kinds).encode()}
