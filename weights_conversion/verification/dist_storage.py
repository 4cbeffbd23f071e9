"""The stored tensors of torch_dist checkpoints by row ranges, without the converter's readers.

They are read by the classes of torch.distributed.checkpoint, through unpicklers that know those classes and nothing
else: `.metadata` says where each part of a tensor is stored, and such an item is a zip archive of torch.save. Only the
rows that are asked for are read.
"""

from __future__ import annotations

import importlib
import io
import itertools
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from weights_conversion.errors import ConversionError
from weights_conversion.files.fileio import open_file


@dataclass(frozen=True)
class Part:
    """A box of a stored tensor, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


_Data = tuple[int, tuple[int, ...], tuple[int, ...]]  # first byte in the file, sizes, strides


@dataclass(frozen=True)
class DistTensor:
    dtype: torch.dtype
    size: tuple[int, ...]
    parts: tuple[Part, ...]
    _data: dict[Part, _Data] = field(default_factory=dict, compare=False, repr=False)
    _by_lead: dict[int, dict[tuple[int, ...], list[Part]]] = field(default_factory=dict, compare=False, repr=False)

    def _holding(self, lead: tuple[int, ...]) -> Sequence[Part]:
        """The parts that hold something of the matrix at index `lead`: a tensor of all experts has thousands."""
        if not lead:
            return self.parts
        if len(lead) not in self._by_lead:
            found: dict[tuple[int, ...], list[Part]] = {}
            for part in self.parts:
                boxes = zip(part.offsets[: len(lead)], part.sizes[: len(lead)], strict=True)
                for index in itertools.product(*(range(at, at + length) for at, length in boxes)):
                    found.setdefault(index, []).append(part)
            self._by_lead[len(lead)] = found
        return self._by_lead[len(lead)].get(lead, ())

    def read(self, lead: tuple[int, ...], first: int, last: int) -> Tensor:
        """Rows first..last of the matrix (or vector) that stands at index `lead` of the leading axes."""
        depth = len(lead)
        out = torch.empty((last - first, *self.size[depth + 1 :]), dtype=self.dtype)
        filled = 0
        for part in self._holding(lead):
            inside = [i - at for i, at in zip(lead, part.offsets, strict=False)]
            begin, end = max(first, part.offsets[depth]), min(last, part.offsets[depth] + part.sizes[depth])
            if any(not 0 <= i < n for i, n in zip(inside, part.sizes, strict=False)) or begin >= end:
                continue
            local = begin - part.offsets[depth], end - part.offsets[depth]
            piece = _read(part, self.dtype, inside, *local, self._data)
            target = out[begin - first : end - first]
            for axis, (at, length) in enumerate(zip(part.offsets[depth + 1 :], part.sizes[depth + 1 :], strict=True)):
                target = target.narrow(axis + 1, at, length)
            target.copy_(piece)
            filled += piece.numel()
        if filled != out.numel():
            raise ConversionError(f"the parts of a tensor of shape {list(self.size)} hold {filled} of {out.numel()}")
        return out


@dataclass(frozen=True)
class FlatTensor:
    """A tensor of `size` whose local blocks are flattened: it is stored as [number of blocks per axis, length]."""

    stored: DistTensor
    size: tuple[int, ...]

    def read(self, lead: tuple[int, ...], first: int, last: int) -> Tensor:
        """As DistTensor reads; a block is read whole."""
        counts = self.stored.size[:-1]
        local = tuple(size // count for size, count in zip(self.size, counts, strict=True))
        depth = len(lead)
        out = torch.empty(self.size[depth:], dtype=self.stored.dtype)
        for index in itertools.product(*(range(count) for count in counts[depth:])):
            block = (*(i // n for i, n in zip(lead, local, strict=False)), *index)
            flat = self.stored.read(block, 0, self.stored.size[-1]).view(local)
            flat = flat[tuple(i % n for i, n in zip(lead, local, strict=False))]
            place = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, local[depth:], strict=True))
            out[place] = flat
        return out[first:last]


class _Unnamed:
    """What `.metadata` holds beside tensors: plans and properties whose classes differ among releases."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_READ = {  # the classes of torch that say where the parts are
    "torch.distributed.checkpoint.metadata": {"Metadata", "MetadataIndex", "TensorStorageMetadata",
                                              "ChunkStorageMetadata", "BytesStorageMetadata"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "uint8", "int64"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _READ.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if name == "MCoreMetadata":  # of Megatron-Core up to 0.15
            return self.find_class("torch.distributed.checkpoint.metadata", "Metadata")
        return type(name, (_Unnamed,), {})


def read_index(folder: Path) -> dict[str, DistTensor | FlatTensor]:
    """The tensors of a torch_dist checkpoint by `.metadata`. Nothing that it names is imported but torch's own."""
    with open_file(folder / ".metadata") as file:
        content = _Index(file).load()
    stored = {(index.fqn, tuple(index.offset or ())): info for index, info in content.storage_data.items()}
    flattened = getattr(content, "mcore_data", None) or {}  # Megatron-Core up to 0.15
    found: dict[str, DistTensor | FlatTensor] = {}
    for key, entry in content.state_dict_metadata.items():
        if not hasattr(entry, "chunks") or (key, tuple(entry.chunks[0].offsets)) not in stored:
            continue
        parts = []
        for chunk in entry.chunks:
            info = stored[key, tuple(chunk.offsets)]
            file = folder / Path(info.relative_path).name
            parts.append(Part(tuple(chunk.offsets), tuple(chunk.sizes), file, info.offset, info.length))
        properties = entry.properties
        dtype = properties.dtype if hasattr(properties, "dtype") else properties.state[0]
        plain = DistTensor(dtype, tuple(entry.size), tuple(parts))
        true = flattened.get(key, {}).get("nd_reformulated_orig_global_shape")
        found[key] = plain if true is None else FlatTensor(plain, tuple(true))
    return found


class _Item(pickle.Unpickler):
    """`data.pkl` of an archive with one tensor, as (number of its first value, sizes, strides, key of its storage)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, start, size, stride, *_: (start, tuple(size), tuple(stride), storage[2])
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return type(name, (), {})
        raise ConversionError(f"a stored tensor names {module}.{name}, which none needs")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Window(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0
        self.failed: OSError | None = None  # zipfile takes an error of the disk for a broken archive

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        try:
            data = self._file.read(max(min(len(buffer), self._length - self._at), 0))
        except OSError as error:
            self.failed = error
            raise
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _read(part: Part, dtype: torch.dtype, inside: list[int], first: int, last: int, known: dict[Part, _Data]) -> Tensor:
    """Rows first..last of a part, at index `inside` of its leading axes; `known` is filled with where data begin."""
    with open_file(part.file) as file:
        if part not in known:
            known[part] = _data_of(part, file)
        at, size, stride = known[part]
        if size != part.sizes:
            raise ConversionError(f"{part.file} holds a part of shape {list(size)}, its index says {list(part.sizes)}")
        if not _is_contiguous(size, stride):
            raise ConversionError(f"{part.file} holds a part with strides {list(stride)}: its rows are not in order")
        shape = part.sizes[len(inside) :]
        row = prod(shape[1:])
        begin = 0
        for index, axis in zip(inside, part.sizes, strict=False):
            begin = begin * axis + index
        begin = (begin * shape[0] + first) * row
        file.seek(at + begin * dtype.itemsize)
        data = bytearray((last - first) * row * dtype.itemsize)
        if cast(Any, file).readinto(data) != len(data):
            raise ConversionError(f"{part.file} ends within a part that its index says it holds; copy it again")
        return torch.frombuffer(data, dtype=dtype).view(last - first, *shape[1:])


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(
        length == 1 or step == prod(size[axis + 1 :])
        for axis, (length, step) in enumerate(zip(size, stride, strict=True))
    )


def _data_of(part: Part, file: BinaryIO) -> _Data:
    """(where in the file a part's values begin, its sizes, its strides)."""
    window = _Window(file, part.start, part.length)
    try:
        with zipfile.ZipFile(cast(BinaryIO, io.BufferedReader(window))) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            start, size, stride, key = _Item(io.BytesIO(archive.read(records["data.pkl"]))).load()
            record = records[f"data/{key}"]
    except (zipfile.BadZipFile, KeyError, EOFError, pickle.UnpicklingError) as error:
        if window.failed is not None:
            raise window.failed from None
        raise ConversionError(f"{part.file} holds a broken archive at byte {part.start} ({error})") from error
    if start or record.compress_type != zipfile.ZIP_STORED:
        raise ConversionError(f"{part.file} holds a part that is compressed, or a view of another tensor")
    # The names in the file itself may be longer than in the directory: torch pads them, so that data are aligned.
    file.seek(part.start + record.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return part.start + record.header_offset + 30 + name + extra, size, stride
