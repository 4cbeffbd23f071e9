"""torch.save files (.pt, .pth, .bin): reading places of tensors, and writing files whose data follow later.

A torch file is a zip archive of stored records: `data.pkl` with the structure, `data/<key>` with each storage.
"""

from __future__ import annotations

import argparse
import errno
import io
import mmap
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from weights_conversion.config import ConversionError
from weights_conversion.formats import pickles
from weights_conversion.placement import PAGE, TensorRef

_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_MAX_DIRECTORY_BYTES = 256 << 20
# A state dict may hold one dict under many names, so that what it takes to walk it is not bounded by the file's size.
_MAX_DEPTH, _MAX_LEAVES, _MAX_NAME = 32, 1_000_000, 1000


@dataclass(frozen=True)
class Record:
    """A stored zip record: first byte, length and CRC-32 (0: not kept) of its data."""

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class TorchFile:
    """What a torch file holds: the pickled object (tensors as pickles.StoredTensor) and where its storages stand."""

    path: Path
    content: Any
    records: Mapping[str, Record] = field(repr=False)

    def ref(self, tensor: pickles.StoredTensor, name: str) -> TensorRef:
        """The place of one of its tensors."""
        record = self.records.get(tensor.storage.key)
        if record is None:
            raise ConversionError(f"{self.path} has no data for {name} (record data/{tensor.storage.key} is missing)")
        stored = tensor.storage.numel * (tensor.storage.dtype.itemsize if tensor.storage.dtype else 1)
        if stored != record.size:
            raise ConversionError(f"{name} in {self.path} has storage of {stored} bytes, but a record of {record.size}")
        contiguous, expected = True, 1
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
            contiguous &= size == 1 or stride == expected
            expected *= size
        if not contiguous:
            raise ConversionError(
                f"{name} in {self.path} is stored with strides {tensor.stride}, which are not contiguous; "
                "save it again after .contiguous()"
            )
        end = (tensor.offset + prod(tensor.shape)) * tensor.dtype.itemsize
        if end > record.size:
            raise ConversionError(f"{name} in {self.path} needs {end} bytes of a storage that has {record.size}")
        start = record.offset + tensor.offset * tensor.dtype.itemsize
        return TensorRef(str(self.path), name, tensor.dtype, tensor.shape, start)


class _Window(io.RawIOBase):
    """Bytes start..start+size of an open file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self._size - self._position), 0)
        self._file.seek(self._start + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_torch_file(
    path: Path, start: int = 0, length: int | None = None, further: Mapping[tuple[str, str], Any] = MappingProxyType({})
) -> TorchFile:
    """Opens a torch file without reading its tensors. It may be a part of a larger file, from byte `start` on.

    `further` are stand-ins for globals that only this kind of file may name.
    """
    try:
        size = path.stat().st_size - start if length is None else length
        if start < 0 or size < 0 or start + size > path.stat().st_size:
            raise ConversionError(f"{path} ends before byte {start + size}, which its index names; it is cut off")
        with path.open("rb") as whole, io.BufferedReader(_Window(whole, start, size)) as file:
            records = {record.name: record for record in _directory(file, size, path)}
            pickled = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickled) != 1:
                raise ConversionError(f"{path} is not a torch.save file (its archive has {len(pickled)} data.pkl)")
            prefix = pickled[0].removesuffix("data.pkl")
            stray = next((name for name in records if not name.startswith(prefix) or ".." in name.split("/")), None)
            if stray is not None:
                raise ConversionError(f"{path} is not a torch.save file: {stray!r} is not in its folder {prefix}")
            order = records.get(prefix + "byteorder")
            if order is not None and _content(file, order, path) != b"little":
                raise ConversionError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
            content = pickles.load(_content(file, records[pickled[0]], path), str(path), further)
    except (struct.error, OverflowError) as error:
        raise ConversionError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    data = prefix + "data/"
    placed = {
        name.removeprefix(data): Record(name, record.offset + start, record.size, record.crc)
        for name, record in records.items()
        if name.startswith(data)
    }
    return TorchFile(path, content, placed)


def _content(file: BinaryIO, record: Record, path: Path) -> bytes:
    """A small record, checked against its CRC (0 where torch was told to keep none)."""
    if record.size > pickles.MAX_PICKLE_BYTES:
        raise ConversionError(f"{path} claims a {record.name} of {record.size} bytes, more than any checkpoint has")
    file.seek(record.offset)
    content = file.read(record.size)
    if record.crc not in (0, zlib.crc32(content)):
        raise ConversionError(f"{path} is damaged: {record.name} does not have the archive's CRC-32; copy it again")
    return content


def _directory(file: BinaryIO, size: int, path: Path) -> list[Record]:
    """The records of a zip archive of `size` bytes: stored, named once, and none in another's bytes.

    Nothing is read, and no memory taken, on the word of a size that the file does not have.
    """

    def damaged(why: str) -> ConversionError:
        return ConversionError(
            f"{path} is not a complete torch.save file: {why}; it is cut off, damaged, still being copied, or in the "
            "format of torch before 1.6 (then load it with torch and save it again)"
        )

    tail_at = max(size - (22 + 0xFFFF), 0)
    file.seek(tail_at)
    tail = file.read(size - tail_at)
    end = tail.rfind(_END)
    if end < 0 or end + 22 > len(tail):
        raise damaged("the archive's end is missing")
    fields = struct.unpack_from("<HHHHII", tail, end + 4)
    limit, wide = tail_at + end, end >= 20 and tail[end - 20 : end - 16] == _LOCATOR
    if wide:  # torch always writes it, and reads it before the other
        part, limit, parts = struct.unpack_from("<IQI", tail, end - 16)
        file.seek(min(limit, size))
        header = file.read(56)
        if limit + 56 > tail_at + end - 20 or len(header) != 56 or header[:4] != _END64:
            raise damaged("its 64-bit directory is missing")
        narrow, fields = fields, struct.unpack_from("<IIQQQQ", header, 16)
        for short, full, most in zip(narrow, fields, (*[0xFFFF] * 4, *[0xFFFFFFFF] * 2), strict=True):
            if short not in (full, most):
                raise damaged("its two directories disagree")
        if part or parts > 1:
            raise damaged("it claims to be one of several files")
    disk, first_disk, here, count, length, first = fields
    if disk or first_disk or here != count:
        raise damaged("it claims to be one of several files")
    if not wide and (count == 0xFFFF or 0xFFFFFFFF in (length, first)):
        raise damaged("its 64-bit directory is missing")
    if first + length > limit or length > _MAX_DIRECTORY_BYTES or count * 46 > length:
        raise damaged(f"its directory claims {count} records in {length} bytes")
    file.seek(first)
    entries, position, found = file.read(length), 0, []
    for _ in range(count):
        if entries[position : position + 4] != _CENTRAL or position + 46 > length:
            raise damaged("its directory is cut off")
        fields = struct.unpack_from("<HH4xIIIHHHH", entries, position + 8)
        flags, method, crc, stored, plain, name, extra, note, disk = fields
        if stored == 0xFFFFFFFF or plain == 0xFFFFFFFF:
            stored, plain = _sizes64(entries, position, name, extra, stored, plain)
        header_at = _header_offset(entries, position, name, extra)
        label = entries[position + 46 : position + 46 + name].decode("utf-8", "replace")
        if method or flags & 1 or stored != plain:
            raise damaged(f"record {label} is compressed, which torch.save never does")
        if disk:
            raise damaged(f"record {label} claims to be in another of several files")
        if entries[position + 38] & 0x10:  # torch would take it for empty, and leave the tensor uninitialised
            raise damaged(f"record {label} is marked as a folder")
        file.seek(min(header_at, size))
        header = file.read(30)
        if len(header) != 30 or header[:4] != _LOCAL:
            raise damaged(f"record {label} does not begin where the directory says")
        local_name, local_extra = struct.unpack_from("<HH", header, 26)
        found.append(Record(label, header_at + 30 + local_name + local_extra, plain, crc))
        position += 46 + name + extra + note
    if len({record.name for record in found}) != len(found):
        raise damaged("it names a record twice")
    previous = 0
    for record in sorted(found, key=lambda record: record.offset):
        if record.offset < previous or record.offset + record.size > first:
            raise damaged(f"record {record.name} reaches into others, or beyond the end")
        previous = record.offset + record.size
    return found


def flatten(tree: Mapping[Any, Any], where: Path) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts, their keys joined by dots, as far as a checkpoint can have them."""
    seen, waiting = 0, [("", 0, tree)]
    while waiting:
        prefix, depth, part = waiting.pop()
        inner = []
        for key, value in part.items():
            name = f"{prefix}{key}"
            seen += 1
            if depth >= _MAX_DEPTH or seen > _MAX_LEAVES or len(name) > _MAX_NAME:
                raise ConversionError(f"{where} is nested too deeply, or names too much, to be a checkpoint")
            if isinstance(value, dict):
                inner.append((f"{name}.", depth + 1, value))
            else:
                yield name, value
        waiting += reversed(inner)


def tensors(file: TorchFile, tree: Any) -> dict[str, TensorRef]:
    """The tensors in (a part of) a file's content, by dotted name."""
    if not isinstance(tree, dict):
        raise ConversionError(f"{file.path} holds a {type(tree).__name__} where a dict of tensors was expected")
    found: dict[str, TensorRef] = {}
    for name, leaf in flatten(tree, file.path):
        if isinstance(leaf, pickles.StoredTensor):
            if name in found:
                raise ConversionError(f"{file.path} holds {name} twice")
            found[name] = file.ref(leaf, name)
    return found


@dataclass(frozen=True)
class TorchFileTarget:
    """A torch file to be written: `content` with a TensorRef wherever a tensor belongs."""

    file: str
    content: Mapping[str, Any] = field(hash=False)
    refs: tuple[TensorRef, ...] = ()

    def create(self, root: Path, resume: bool = False) -> dict[TensorRef, int]:
        """Writes everything but the data, at its final size; returns the first byte of each tensor's data.

        With `resume` the file is there already, with some of its data, and is left as it is.
        """
        path = root / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_without_data(path, self.content, resume)

    def finish(self, root: Path, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None:
        """Puts the CRC-32 of each tensor's data where the archive keeps it."""
        path = root / self.file
        at = {offsets[ref]: (ref.nbytes, crcs[ref]) for ref in self.refs}
        with path.open("r+b") as file:
            patch_crcs(file, 0, path.stat().st_size, at)


class _Blank:
    """Tensors whose data nobody will touch, all in one read-only mapping, which costs no memory.

    (Under FakeTensorMode torch.save does the same, after a second spent on importing what fake tensors need.)
    """

    def __init__(self) -> None:
        self._regions: dict[torch.dtype, list[mmap.mmap]] = {}

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        regions = self._regions.setdefault(ref.dtype, [])  # torch.save wants one type of data at an address
        if not regions or len(regions[-1]) < ref.nbytes:
            regions.append(mmap.mmap(-1, ref.nbytes, prot=mmap.PROT_READ))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            return torch.frombuffer(regions[-1], dtype=ref.dtype, count=prod(ref.shape)).view(ref.shape)


def write_without_data(path: Path, content: Any, resume: bool = False) -> dict[TensorRef, int]:
    """torch.save with holes for the data of every TensorRef in `content`; returns where each one's data begin."""
    from torch.serialization import skip_data
    from torch.utils.serialization import config

    order: list[TensorRef] = []
    blank = _Blank()

    def stand_in(tree: Any) -> Any:
        if isinstance(tree, TensorRef):
            order.append(tree)
            return blank.tensor(tree)
        return {key: stand_in(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree

    stood_in = stand_in(content)
    if not resume:
        try:
            with config.patch({"save.storage_alignment": PAGE}), skip_data():  # pyright: ignore[reportAttributeAccessIssue]
                torch.save(stood_in, path)
        except RuntimeError as error:  # torch does not say which error it was
            raise OSError(errno.EIO, f"torch cannot write it (no space left?): {error}", str(path)) from error
    written = read_torch_file(path)
    offsets = {}
    for number, ref in enumerate(order):
        record = written.records[str(number)]
        if record.size != ref.nbytes:
            raise RuntimeError(f"{path}: storage {number} has {record.size} bytes, {ref.name} has {ref.nbytes}")
        offsets[ref] = record.offset
    return offsets


def patch_crcs(file: BinaryIO, start: int, length: int, at: Mapping[int, tuple[int, int]]) -> None:
    """Writes CRC-32s into the archive in bytes start..start+length of `file`: behind the data and in the directory.

    `at` maps the first byte of a record's data (in `file`) to its size and CRC.
    """
    with io.BufferedReader(_Window(file, start, length)) as window, zipfile.ZipFile(window) as archive:
        directory = start + archive.start_dir
    file.seek(directory)
    entries = file.read(start + length - directory)
    position = 0
    while entries[position : position + 4] == _CENTRAL:
        name, extra, comment = struct.unpack_from("<HHH", entries, position + 28)
        header = start + _header_offset(entries, position, name, extra)
        file.seek(header + 26)
        local_name, local_extra = struct.unpack("<HH", file.read(4))
        data = header + 30 + local_name + local_extra
        if data in at:
            size, crc = at[data]
            file.seek(directory + position + 16)
            file.write(struct.pack("<I", crc))
            file.seek(data + size)
            if file.read(4) != _DESCRIPTOR:
                raise RuntimeError(f"no data descriptor behind byte {data + size}")
            file.write(struct.pack("<I", crc))
        position += 46 + name + extra + comment


def _header_offset(entries: bytes, position: int, name: int, extra: int) -> int:
    """Where a record's local header stands, from its directory entry: 32 bits, or 64 in the zip64 extra field."""
    (offset,) = struct.unpack_from("<I", entries, position + 42)
    if offset != 0xFFFFFFFF:
        return offset
    stored, plain = struct.unpack_from("<II", entries, position + 20)
    wide = _zip64(entries, position, name, extra)
    return struct.unpack_from("<Q", wide, 8 * ((stored == 0xFFFFFFFF) + (plain == 0xFFFFFFFF)))[0]


def _sizes64(entries: bytes, position: int, name: int, extra: int, stored: int, plain: int) -> tuple[int, int]:
    """(stored, plain) size of a record, each from the zip64 extra field where 32 bits do not hold it."""
    wide, at = _zip64(entries, position, name, extra), 0
    if plain == 0xFFFFFFFF:
        (plain,) = struct.unpack_from("<Q", wide, at)
        at += 8
    if stored == 0xFFFFFFFF:
        (stored,) = struct.unpack_from("<Q", wide, at)
    return stored, plain


def _zip64(entries: bytes, position: int, name: int, extra: int) -> bytes:
    """The content of a directory entry's zip64 extra field; empty where there is none."""
    field_at, end = position + 46 + name, position + 46 + name + extra
    while field_at + 4 <= end:
        kind, size = struct.unpack_from("<HH", entries, field_at)
        if kind == 1:
            return entries[field_at + 4 : field_at + 4 + size]
        field_at += 4 + size
    return b""


def rank_content(
    refs: Sequence[TensorRef], args: Mapping[str, Any], iteration: int | str, *, flat: bool
) -> dict[str, Any]:
    """The content of a rank file in the spelling of training. `flat`: Megatron-Core's state dict, not nested."""
    content: dict[str, Any] = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": iteration}
    for ref in refs:
        chunk, name = ref.name.split(".", 1)
        model = content.setdefault(chunk, {})
        if flat:
            model[name] = ref
            continue
        for prefix in ("language_model", "embedding", "word_embeddings", "encoder", "word_embeddings_for_head"):
            if name.startswith(prefix + "."):
                model, name = model.setdefault(prefix, {}), name.removeprefix(prefix + ".")
        model[name] = ref
    return content
