"""torch.save files (.pt, .pth, .bin): reading places of tensors, and writing files whose data follow later.

A torch file is a zip archive of stored records: `data.pkl` with the structure, `data/<key>` with each storage.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.formats import legacy, pickles
from weights_conversion.formats.archives import LOCAL, Record, Window, directory, patch_crcs
from weights_conversion.formats.stand_ins import StoredTensor
from weights_conversion.layouts.placement import PAGE, TensorRef
from weights_conversion.output import descriptors

# A state dict may hold one dict under many names, so that what it takes to walk it is not bounded by the file's size.
_MAX_DEPTH, _MAX_LEAVES, _MAX_NAME = 32, 1_000_000, 1000


@dataclass(frozen=True)
class TorchFile:
    """What a torch file holds: the pickled object (tensors as StoredTensor) and where its storages stand."""

    path: Path
    content: Any
    records: Mapping[str, Record] = field(repr=False)

    def ref(self, tensor: StoredTensor, name: str) -> TensorRef:
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
        kept = record.crc if record.crc and (start, end) == (record.offset, record.size) else None
        return TensorRef(str(self.path), name, tensor.dtype, tensor.shape, start, crc=kept)


def read_torch_file(
    path: Path, start: int = 0, length: int | None = None, *, training: bool = False, noted: bool = True
) -> TorchFile:
    """Opens a torch file without reading its tensors. It may be a part of a larger file, from byte `start` on.

    `training`: it is a checkpoint's, whose args and states may be of any class (pickles.load); `noted` False: it is no
    source's.
    """
    try:
        with fileio.open_file(path, noted=noted) as whole, fileio.named("reading", path):
            there = os.fstat(whole.fileno()).st_size
            size = there - start if length is None else length
            if start < 0 or size < 0 or start + size > there:
                raise ConversionError(f"{path} ends before byte {start + size}, which its index names; it is cut off")
            file = io.BufferedReader(Window(whole, start, size))
            head = file.read(512)
            if length is None and not head.startswith(LOCAL):
                if head.startswith(legacy.HEAD):
                    return TorchFile(path, *legacy.read(whole, path, training))
                legacy.refuse_others(head, path)
            records = {record.name: record for record in directory(file, size, path)}
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
            content = pickles.load(_content(file, records[pickled[0]], path), str(path), training=training)
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
        if isinstance(leaf, StoredTensor):
            if name in found:
                raise ConversionError(f"{file.path} holds {name} twice")
            name = sys.intern(name)  # the same on many ranks
            found[name] = file.ref(leaf, name)
    return found


@dataclass(frozen=True)
class TorchFileTarget:
    """A torch file to be written: `content` with a TensorRef wherever a tensor belongs."""

    file: str
    content: Mapping[str, Any] = field(hash=False)
    refs: tuple[TensorRef, ...] = ()

    def create(self, file: BinaryIO) -> dict[TensorRef, int]:
        """Writes everything but the data, at its final size; returns the first byte of each tensor's data."""
        with _draft_of(file) as draft, _path_of(draft, self.file) as path:
            return write_without_data(path, self.content)

    def find(self, file: BinaryIO) -> dict[TensorRef, int]:
        """What `create` returned, of a file that is there."""
        with _path_of(file, self.file) as path:
            return find_data(path, self.content)

    def finish(self, file: BinaryIO, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None:
        """Puts the CRC-32 of each tensor's data where the archive keeps it."""
        at = {offsets[ref]: (ref.nbytes, crcs[ref]) for ref in self.refs}
        patch_crcs(file, 0, os.fstat(file.fileno()).st_size, at)


@contextmanager
def _draft_of(file: BinaryIO) -> Iterator[BinaryIO]:
    """A file in memory, whose written parts (its holes stay holes) go into the empty `file` at the end.

    torch.save truncates a file that is there, even an empty one, and ext4 allocates such a file when it is closed, in
    windows of 8 MB around every record's head: the data would lie in hundreds of pieces, whose writes wait for each
    other (a tenth of an import's time). Where there are no such files, it is `file` itself.
    """
    try:
        descriptor = os.memfd_create("draft")
    except (AttributeError, OSError):
        yield file
        return
    with os.fdopen(descriptor, "w+b") as draft:
        yield draft
        size, position = os.fstat(descriptor).st_size, 0
        while position < size:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
            file.seek(start)
            file.write(os.pread(descriptor, position - start, start))


@contextmanager
def _path_of(file: BinaryIO, name: str) -> Iterator[Path]:
    """A path, for torch.save knows no others, that leads to an open file whatever comes to that file's own name.

    Its last part is that of `name`, which torch writes into the archive.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        path.symlink_to(descriptors.path_of(file.fileno()))
        try:
            yield path
        except OSError as error:
            if error.filename == str(path):  # which would mean nothing to a user
                error.filename = None
            raise
        except ConversionError as error:
            raise ConversionError(*(said.replace(str(path), name) for said in error.problems)) from error


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


def write_without_data(path: Path, content: Any) -> dict[TensorRef, int]:
    """torch.save with holes for the data of every TensorRef in `content`; returns where each one's data begin."""
    from torch.serialization import skip_data
    from torch.utils.serialization import config

    blank = _Blank()

    def stand_in(tree: Any) -> Any:
        if isinstance(tree, TensorRef):
            return blank.tensor(tree)
        return {key: stand_in(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree

    try:
        with config.patch({"save.storage_alignment": PAGE}), skip_data():  # pyright: ignore[reportAttributeAccessIssue]
            torch.save(stand_in(content), path)
    except RuntimeError as error:  # torch does not say which error it was
        raise OSError(errno.EIO, f"torch cannot write it (no space left?): {error}", str(path)) from error
    return find_data(path, content)


def find_data(path: Path, content: Any) -> dict[TensorRef, int]:
    """Where each TensorRef's data begin in a file that `write_without_data` made of `content`."""
    written = read_torch_file(path, noted=False)
    offsets = {}
    for number, ref in enumerate(_refs(content)):  # torch.save numbers storages as it meets them
        record = written.records[str(number)]
        if record.size != ref.nbytes:
            raise RuntimeError(f"{path}: storage {number} has {record.size} bytes, {ref.name} has {ref.nbytes}")
        offsets[ref] = record.offset
    return offsets


def _refs(tree: Any) -> Iterator[TensorRef]:
    if isinstance(tree, TensorRef):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _refs(value)
