"""The items of `.distcp` files: whole torch.save archives, opened one after another without reading their data."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats import archives, torch_files
from weights_conversion.formats.dist_index import METADATA, StoredChunk
from weights_conversion.formats.stand_ins import StoredTensor
from weights_conversion.layouts.placement import TensorRef

_MAX_AROUND = 1 << 16
_MANY = 8  # items of a tensor: one more look at the first is little then
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
        self._files: dict[str, tuple[int, int, str]] = {}  # descriptor, bytes, path
        self._known: dict[tuple[int, tuple[int, ...], torch.dtype], list[_Around]] = defaultdict(list)

    def __enter__(self) -> Items:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor, _, _ in self._files.values():
            fileio.close_quietly(descriptor)
        self._files.clear()

    def ref(self, key: str, chunk: StoredChunk, dtype: torch.dtype) -> TensorRef:
        """Where a chunk's data stand. What the item holds must be what the index says."""
        descriptor, size, path = self._open(key, chunk.file)
        end = chunk.start + chunk.length
        if end > size:
            raise ConversionError(
                f"{path} has {size} bytes, but {METADATA} places a part of {key} up to byte {end}: it is cut off; copy "
                "it again"
            )
        name = f"{key} {list(chunk.offsets)}"
        known = self._known[chunk.length, chunk.item_sizes, dtype]
        for around in known:
            tail_at = end - len(around.tail)
            if (
                fileio.read_at(descriptor, len(around.head), chunk.start, path) == around.head
                and around.plain(fileio.read_at(descriptor, len(around.tail), tail_at, path)) == around.tail
            ):
                # Without the CRC, which is of the item's own data: two items with one pickle need not be equal.
                ref = around.ref
                return TensorRef(path, name, ref.dtype, ref.shape, chunk.start + ref.offset)
        ref, around = self._read(key, chunk, dtype, name, descriptor)
        if around is not None and len(known) < 8:
            known.append(around)
        return ref

    def expect(self, key: str, chunks: Sequence[StoredChunk], dtype: torch.dtype) -> None:
        """Asks for what is read of a tensor's items, where they are many, before they are opened one by one."""
        if len(chunks) < _MANY:
            return
        self.ref(key, chunks[0], dtype)  # which shows how much that is of each
        for file, there in groupby(sorted(chunks, key=attrgetter("file", "start")), key=attrgetter("file")):
            descriptor, *_ = self._open(key, file)
            pieces = (piece for chunk in there for piece in self._around(chunk, dtype))
            fileio.advise(descriptor, "POSIX_FADV_WILLNEED", *pieces)

    def _around(self, chunk: StoredChunk, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        """The first byte, and bytes, of what is read of an item if it is as one of its shape was."""
        for around in self._known[chunk.length, chunk.item_sizes, dtype][:1]:
            yield chunk.start, len(around.head)
            yield chunk.start + chunk.length - len(around.tail), len(around.tail)

    def _open(self, key: str, file: str) -> tuple[int, int, str]:
        if file not in self._files:
            if len(self._files) >= _MAX_OPEN:  # a training run leaves two files a rank
                fileio.close_quietly(self._files.pop(next(iter(self._files)))[0])
            path = self._folder / file
            try:
                descriptor = fileio.open_descriptor(path)
            except OSError as error:
                raise ConversionError(
                    f"{path}, which holds a part of {key}, cannot be read ({error.strerror}); copy it again"
                ) from error
            # A little of each item is read, here and there: reading on behind it would read a tenth of the file.
            fileio.advise(descriptor, "POSIX_FADV_RANDOM", (0, 0))
            with fileio.named("opening", path):
                self._files[file] = descriptor, os.fstat(descriptor).st_size, str(path)
        return self._files[file]

    def _read(
        self, key: str, chunk: StoredChunk, dtype: torch.dtype, name: str, descriptor: int
    ) -> tuple[TensorRef, _Around | None]:
        path = self._folder / chunk.file
        if fileio.read_at(descriptor, 4, chunk.start, path) != archives.LOCAL:
            raise ConversionError(
                f"{path} has no torch.save archive at byte {chunk.start}, where {METADATA} places a part of {key}: the "
                "file is damaged, or in the safetensors format, which is not supported here nor used by Megatron-Core"
            )
        item = torch_files.read_torch_file(path, chunk.start, chunk.length)
        if not isinstance(item.content, StoredTensor):
            raise ConversionError(f"{path} holds a {type(item.content).__name__} at byte {chunk.start}, not {key}")
        ref = item.ref(item.content, name)
        if ref.shape != chunk.item_sizes or ref.dtype != dtype:
            raise ConversionError(
                f"{path}: the part of {key} at byte {chunk.start} has shape {list(ref.shape)} and type {ref.dtype}, "
                f"{METADATA} says {list(chunk.item_sizes)} and {dtype}"
            )
        record = item.records[item.content.storage.key]
        first, last = record.offset, record.offset + record.size
        head_size, tail_size = first - chunk.start, chunk.start + chunk.length - last
        if len(item.records) != 1 or max(head_size, tail_size) > _MAX_AROUND:
            return ref, None
        head = fileio.read_at(descriptor, head_size, chunk.start, path)
        tail = fileio.read_at(descriptor, tail_size, last, path)
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
    end = tail.rfind(archives.END)
    if end < 0:
        return None
    count, _, first = struct.unpack_from("<HII", tail, end + 10)
    if first == 0xFFFFFFFF or first < tail_at:
        return None
    holes, position = [], first - tail_at
    for _ in range(count):
        if tail[position : position + 4] != archives.CENTRAL:
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
