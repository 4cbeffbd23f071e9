"""torch.save files (.pt, .pth, .bin): reading places of tensors, and writing files whose data follow later.

A torch file is a zip archive of stored records: `data.pkl` with the structure, `data/<key>` with each storage.
"""

from __future__ import annotations

import argparse
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from weights_conversion.config import ConversionError
from weights_conversion.formats import pickles
from weights_conversion.placement import TensorRef
from weights_conversion.plan import PAGE

_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Record:
    """A stored zip record: first byte and length of its data, and of its entry in the central directory."""

    name: str
    offset: int
    size: int


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


def read_torch_file(path: Path) -> TorchFile:
    """Opens a torch file without reading its tensors."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = {info.filename: info for info in archive.infolist()}
            pickled = [name for name in infos if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickled) != 1:
                raise ConversionError(f"{path} is not a torch.save file (its archive has {len(pickled)} data.pkl)")
            prefix = pickled[0].removesuffix("data.pkl")
            record = _record(file, infos[pickled[0]], size, path)
            if record.size > pickles.MAX_PICKLE_BYTES:
                raise ConversionError(f"{path} claims a pickle of {record.size} bytes, more than any checkpoint has")
            order = prefix + "byteorder"
            if order in infos and archive.read(order) != b"little":
                raise ConversionError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
            file.seek(record.offset)
            content = pickles.load(file.read(record.size), str(path))
            records = {
                name.removeprefix(prefix + "data/"): _record(file, info, size, path)
                for name, info in infos.items()
                if name.startswith(prefix + "data/")
            }
    except ConversionError:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ConversionError(
            f"{path} is not a complete torch.save file ({error}); it is cut off, still being copied, or in the format "
            "of torch before 1.6 (then load it with torch and save it again)"
        ) from error
    except (struct.error, ValueError, NotImplementedError, EOFError, RuntimeError, OverflowError) as error:
        raise ConversionError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return TorchFile(path, content, records)


def _record(file: Any, info: zipfile.ZipInfo, size: int, path: Path) -> Record:
    """Where the data of a record begin: behind its local header, whose name and extra field have their own lengths."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ConversionError(f"{path}: record {info.filename} is compressed, which torch.save never does")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != _LOCAL:
        raise ConversionError(f"{path}: record {info.filename} does not begin where the archive says; it is damaged")
    name, extra = struct.unpack("<HH", header[26:30])
    offset = info.header_offset + 30 + name + extra
    if offset + info.file_size > size:
        raise ConversionError(f"{path}: record {info.filename} goes beyond the end of the file; it is cut off")
    return Record(info.filename, offset, info.file_size)


def flatten(tree: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts, their keys joined by dots."""
    if depth > _MAX_DEPTH:
        raise ConversionError("a state dict is nested too deeply to be a checkpoint")
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", leaf) for name, leaf in flatten(value, depth + 1))
        else:
            yield str(key), value


def tensors(file: TorchFile, tree: Any) -> dict[str, TensorRef]:
    """The tensors in (a part of) a file's content, by dotted name."""
    if not isinstance(tree, dict):
        raise ConversionError(f"{file.path} holds a {type(tree).__name__} where a dict of tensors was expected")
    found: dict[str, TensorRef] = {}
    for name, leaf in flatten(tree):
        if isinstance(leaf, pickles.StoredTensor):
            found[name] = file.ref(leaf, name)
            if len(found) > 1_000_000:
                raise ConversionError(f"{file.path} lists more than a million tensors, more than any checkpoint has")
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
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.serialization import skip_data
        from torch.utils.serialization import config

        path = root / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        order: list[TensorRef] = []

        def fake(tree: Any) -> Any:
            if isinstance(tree, TensorRef):
                order.append(tree)
                return torch.empty(tree.shape, dtype=tree.dtype)
            return {key: fake(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree

        with FakeTensorMode():
            content = fake(self.content)
        if not resume:
            with config.patch("save.storage_alignment", PAGE), skip_data(materialize_fake_tensors=True):
                torch.save(content, path)
        written = read_torch_file(path)
        offsets = {}
        for number, ref in enumerate(order):
            record = written.records[str(number)]
            if record.size != ref.nbytes:
                raise RuntimeError(f"{path}: storage {number} has {record.size} bytes, {ref.name} has {ref.nbytes}")
            offsets[ref] = record.offset
        return offsets

    def finish(self, root: Path, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None:
        """Puts the CRC-32 of each tensor's data where the archive keeps it: behind the data and in the directory."""
        path = root / self.file
        at = {offsets[ref]: crc for ref, crc in crcs.items() if ref in offsets and ref.file == self.file}
        sizes = {offsets[ref]: ref.nbytes for ref in self.refs}
        with zipfile.ZipFile(path) as archive:
            directory = archive.start_dir
        with path.open("r+b") as file:
            file.seek(directory)
            entries = file.read()
            position = 0
            while entries[position : position + 4] == _CENTRAL:
                name, extra, comment = struct.unpack_from("<HHH", entries, position + 28)
                header = _header_offset(entries, position, name, extra)
                file.seek(header + 26)
                local_name, local_extra = struct.unpack("<HH", file.read(4))
                data = header + 30 + local_name + local_extra
                if data in at:
                    crc = struct.pack("<I", at[data])
                    file.seek(directory + position + 16)
                    file.write(crc)
                    file.seek(data + sizes[data])
                    if file.read(4) != _DESCRIPTOR:
                        raise RuntimeError(f"{path}: no data descriptor behind byte {data + sizes[data]}")
                    file.write(crc)
                position += 46 + name + extra + comment


def _header_offset(entries: bytes, position: int, name: int, extra: int) -> int:
    """Where a record's local header stands, from its directory entry: 32 bits, or 64 in the zip64 extra field."""
    sizes_and_offset = struct.unpack_from("<II", entries, position + 20), struct.unpack_from("<I", entries, position + 42)
    (compressed, plain), (offset,) = sizes_and_offset
    if offset != 0xFFFFFFFF:
        return offset
    field_at, end = position + 46 + name, position + 46 + name + extra
    while field_at < end:
        kind, size = struct.unpack_from("<HH", entries, field_at)
        if kind == 1:
            skip = 8 * ((compressed == 0xFFFFFFFF) + (plain == 0xFFFFFFFF))
            return struct.unpack_from("<Q", entries, field_at + 4 + skip)[0]
        field_at += 4 + size
    raise RuntimeError("a zip64 record without its 64-bit offset")


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
