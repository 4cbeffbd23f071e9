"""The index of a torch_dist checkpoint: `.metadata`, and the items of the `.distcp` files that it points to.

`.metadata` is a pickle of torch.distributed.checkpoint's classes. It is read with inert stand-ins for them, so that it
can neither import nor call anything, and so that releases of torch and Megatron-Core that name their classes
differently read alike. An item is a whole torch.save archive.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import ConversionError
from weights_conversion.formats import pickles, torch_files
from weights_conversion.placement import Block, TensorRef

METADATA = ".metadata"

# What a checkpoint holds beside its parameters: optimizer, random, fault-tolerance and Transformer-Engine's state.
_IGNORED = re.compile(
    r"^(chained_\d+\.)?optimizer\.|^(rng_state|rerun_state_machine_state|common_state)\b|\._extra_state"
)


class _Record:
    """Stands for an object of torch.distributed.checkpoint: keeps what it was built from."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)


_CHECKPOINT = "torch.distributed.checkpoint"
_CORE = "megatron.core.dist_checkpointing.strategies.torch"
_GLOBALS = {
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
    # up to Megatron-Core 0.15, where the optimizer's state is saved too
    (_CORE, "MCoreMetadata"): "Metadata",
    (_CORE, "MCoreSavePlan"): "SavePlan",
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
    """A stored tensor, by `.metadata`. Its chunks lie within it; whether they cover it is for the reader to see."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


def read_metadata(path: Path) -> tuple[dict[str, Stored], dict[str, StoredChunk]]:
    """The model's tensors, and the items that are no tensors, by key. What belongs to training is left out."""
    stubs = {name: type(name, (_Record,), {}) for name in set(_GLOBALS.values())}
    further = {key: stubs[name] for key, name in _GLOBALS.items()}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    with _without_collector():
        return _index(pickles.load(data, str(path), further), path)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """No search for cycles among hundreds of thousands of objects that all stay: it takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _index(content: Any, path: Path) -> tuple[dict[str, Stored], dict[str, StoredChunk]]:
    try:
        wanted = {key: entry for key, entry in content.state_dict_metadata.items() if _is_model(key, entry)}
        items: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in content.storage_data.items():
            if index.fqn in wanted:
                offset = getattr(index, "offset", None)  # left out where there is none
                items[index.fqn, None if offset is None else _numbers(offset)] = info
        tensors, others = {}, {}
        for key, entry in wanted.items():
            if hasattr(entry, "chunks"):
                tensors[key] = _stored(key, entry, items, path)
            elif (key, None) in items:
                others[key] = _chunk(key, (), (), items[key, None], path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(f"{path} is not the index of a checkpoint ({type(error).__name__}: {error})") from error
    return tensors, others


def _is_model(key: str, entry: Any) -> bool:
    """A parameter, or the common state."""
    return key.startswith("common_state") if not hasattr(entry, "chunks") else not _IGNORED.search(key)


def _stored(key: str, entry: Any, items: Mapping[tuple[str, tuple[int, ...] | None], Any], path: Path) -> Stored:
    size = _numbers(entry.size)
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        if (key, offsets) not in items:
            raise ConversionError(f"{path} has no item for the part of {key} at {list(offsets)}; it is not complete")
        if not len(offsets) == len(sizes) == len(size) or any(
            length < 1 or offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
        ):
            raise ConversionError(
                f"{path} has a part of {key} at {list(offsets)} of shape {list(sizes)}, outside its shape {list(size)}"
            )
        chunks.append(_chunk(key, offsets, sizes, items[key, offsets], path))
    return Stored(_dtype(entry.properties), size, tuple(chunks))


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
        raise ConversionError(
            f"{path}: {key} is compressed ({str(info.transform_descriptors)[:80]}), which is not supported; save it "
            "without a compressing storage writer"
        )
    name = info.relative_path
    if not isinstance(name, str) or Path(name).name != name:
        raise ConversionError(f"{path} names {name!r}, which is not a file of its own folder")
    start, length = _numbers((info.offset, info.length))
    return StoredChunk(offsets, sizes, name, start, length)


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


# --- items ------------------------------------------------------------------------------------------------------------

_CENTRAL, _END = b"PK\x01\x02", b"PK\x05\x06"
_MAX_AROUND = 1 << 16
_MAX_OPEN = 128


@dataclass(frozen=True)
class _Around:
    """The bytes before and behind an item's data, without those that the data decide, and the tensor they describe.

    `holes` are the ranges of `tail` that the data decide: CRCs, and torch's serialization id.
    """

    ref: TensorRef
    head: bytes
    tail: bytes
    holes: tuple[tuple[int, int], ...]

    def plain(self, tail: bytes) -> bytes:
        return _without(tail, self.holes)


class Items:
    """Opens items, without their data.

    The archives that one release of torch writes for tensors of one shape and type are equal around their data, but for
    a few bytes that opening does not look at. So an item whose bytes equal those of an earlier one, which was taken
    apart and checked, needs no second look.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[int, int]] = {}
        self._known: dict[tuple[int, tuple[int, ...], torch.dtype], list[_Around]] = defaultdict(list)

    def __enter__(self) -> Items:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, _size in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def ref(self, key: str, chunk: StoredChunk, dtype: torch.dtype) -> TensorRef:
        """Where a chunk's data stand. What the item holds must be what the index says."""
        descriptor, size = self._open(key, chunk.file)
        if chunk.start + chunk.length > size:
            raise ConversionError(
                f"{self._folder / chunk.file} has {size} bytes, but {METADATA} places a part of {key} up to byte "
                f"{chunk.start + chunk.length}: it is cut off; copy it again"
            )
        name = f"{key} {list(chunk.offsets)}"
        known = self._known[chunk.length, chunk.sizes, dtype]
        for around in known:
            tail_at = chunk.start + chunk.length - len(around.tail)
            if (
                os.pread(descriptor, len(around.head), chunk.start) == around.head
                and around.plain(os.pread(descriptor, len(around.tail), tail_at)) == around.tail
            ):
                return replace(around.ref, file=str(self._folder / chunk.file), name=name,
                               offset=chunk.start + around.ref.offset)  # fmt: skip
        ref, around = self._read(key, chunk, dtype, name, descriptor)
        if around is not None and len(known) < 8:
            known.append(around)
        return ref

    def _open(self, key: str, file: str) -> tuple[int, int]:
        if file not in self._files:
            if len(self._files) >= _MAX_OPEN:  # a training run leaves two files a rank
                os.close(self._files.pop(next(iter(self._files)))[0])
            path = self._folder / file
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ConversionError(
                    f"{path}, which holds a part of {key}, cannot be read ({error.strerror}); copy it again"
                ) from error
            self._files[file] = descriptor, os.fstat(descriptor).st_size
        return self._files[file]

    def _read(
        self, key: str, chunk: StoredChunk, dtype: torch.dtype, name: str, descriptor: int
    ) -> tuple[TensorRef, _Around | None]:
        path = self._folder / chunk.file
        if os.pread(descriptor, 4, chunk.start) != b"PK\x03\x04":
            raise ConversionError(
                f"{path} has no torch.save archive at byte {chunk.start}, where {METADATA} places a part of {key}: the "
                "file is damaged, or in the safetensors format, which is not supported here nor used by Megatron-Core"
            )
        item = torch_files.read_torch_file(path, chunk.start, chunk.length)
        if not isinstance(item.content, pickles.StoredTensor):
            raise ConversionError(f"{path} holds a {type(item.content).__name__} at byte {chunk.start}, not {key}")
        ref = item.ref(item.content, name)
        if ref.shape != chunk.sizes or ref.dtype != dtype:
            raise ConversionError(
                f"{path}: the part of {key} at byte {chunk.start} has shape {list(ref.shape)} and type {ref.dtype}, "
                f"{METADATA} says {list(chunk.sizes)} and {dtype}"
            )
        record = item.records[item.content.storage.key]
        first, last = record.offset, record.offset + record.size
        head_size, tail_size = first - chunk.start, chunk.start + chunk.length - last
        if len(item.records) != 1 or max(head_size, tail_size) > _MAX_AROUND:
            return ref, None
        head, tail = os.pread(descriptor, head_size, chunk.start), os.pread(descriptor, tail_size, last)
        holes = _holes(tail, chunk.length - tail_size, record.name)
        if holes is None:
            return ref, None
        return ref, _Around(replace(ref, offset=ref.offset - chunk.start), head, _without(tail, holes), holes)


def _without(tail: bytes, holes: Iterable[tuple[int, int]]) -> bytes:
    plain = bytearray(tail)
    for start, stop in holes:
        plain[start:stop] = bytes(len(plain[start:stop]))
    return bytes(plain)


def _holes(tail: bytes, tail_at: int, data: str) -> tuple[tuple[int, int], ...] | None:
    """The ranges of an archive's `tail` (its bytes from `tail_at` on) that the data in record `data` decide.

    None where the archive is not laid out as torch lays out small ones.
    """
    end = tail.rfind(_END)
    if end < 0:
        return None
    count, _, first = struct.unpack_from("<HII", tail, end + 10)
    if first == 0xFFFFFFFF or first < tail_at:
        return None
    holes, position = [], first - tail_at
    for _ in range(count):
        if tail[position : position + 4] != _CENTRAL:
            return None
        (size,) = struct.unpack_from("<I", tail, position + 24)
        name_size, extra, note = struct.unpack_from("<HHH", tail, position + 28)
        (header,) = struct.unpack_from("<I", tail, position + 42)
        name = tail[position + 46 : position + 46 + name_size].decode("utf-8", "replace")
        if name == data:
            holes += [(4, 8), (position + 16, position + 20)]  # the CRC in the descriptor, and in the directory
        elif name.endswith("/.data/serialization_id"):
            start = header - tail_at
            if start < 0 or start + 30 > len(tail):
                return None
            start += 30 + sum(struct.unpack_from("<HH", tail, start + 26))
            holes += [(start, start + size), (start + size + 4, start + size + 8), (position + 16, position + 20)]
        position += 46 + name_size + extra + note
    return tuple(holes)
