"""torch.save files in the format before torch 1.6, as old repositories hold them, and what else a file may be.

Five pickles stand one after another: a magic number, a version, the machine's sizes, the object, and the keys of its
storages; behind them each storage in this order, its number of elements (8 bytes) before its data.
"""

from __future__ import annotations

import os
import pickletools
import struct
from pathlib import Path
from typing import Any, BinaryIO

from weights_conversion.errors import ConversionError
from weights_conversion.formats import pickles
from weights_conversion.formats.archives import Record
from weights_conversion.formats.stand_ins import Storage

_MAGIC = 0x1950A86A20F9469CFC6C
HEAD = b"\x80\x02\x8a\x0a" + _MAGIC.to_bytes(10, "little") + b"."
_VERSION = 1001
# The first bytes of what people have in place of a torch file, and what to say of it.
_OTHERS = (
    (b"GGUF", "a GGUF file, llama.cpp's format, whose weights are mostly quantised; take the original weights"),
    (b"<!DOCTYPE", "a web page: the download went wrong; download the file again"),
    (b"<html", "a web page: the download went wrong; download the file again"),
    (b"{", "a text of JSON; download the file again"),
    (b"\x89HDF", "an HDF5 file, TensorFlow's weights; take the repository's PyTorch or safetensors weights"),
    (b"\x1f\x8b", "compressed by gzip; decompress it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; decompress it"),
    (b"\xfd7zXZ", "compressed by xz; decompress it"),
)


def refuse_others(head: bytes, path: Path) -> None:
    """Raises ConversionError where a file's first bytes say that it is of another kind."""
    for first, what in _OTHERS:
        if head.lower().startswith(first.lower()):
            raise ConversionError(f"{path} is no torch.save file but {what}")
    if head[257:262] == b"ustar":
        raise ConversionError(
            f"{path} is in the tar format of torch before 0.1.10; load it with torch.load and save it again"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        raise ConversionError(f"{path} is no torch.save file but a safetensors file; rename it to .safetensors")
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        raise ConversionError(f"{path} is a bare pickle, not a torch.save file; load it and save it with torch.save")


def read(file: BinaryIO, path: Path, training: bool) -> tuple[Any, dict[str, Record]]:
    """The pickled object, and where each storage's data stand. Raises ConversionError for what torch cannot read."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    _next(file, path)
    if _next(file, path) != _VERSION:
        raise ConversionError(f"{path} is of an unknown version of torch's format before 1.6")
    machine = _next(file, path)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ConversionError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
    used: dict[str, Storage] = {}
    content, keys = _next(file, path, training, used), _next(file, path)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise ConversionError(f"{path} is damaged: it has no list of its storages")
    records: dict[str, Record] = {}
    position = file.tell()
    for key in keys:
        file.seek(position)
        head = file.read(8)
        storage = used.get(key)
        if len(head) != 8 or storage is None or storage.dtype is None:
            raise ConversionError(f"{path} is cut off or damaged at its storage {key}; download or copy it again")
        (count,) = struct.unpack("<q", head)
        length = storage.numel * storage.dtype.itemsize
        if count != storage.numel or position + 8 + length > size:
            raise ConversionError(
                f"{path} is cut off or damaged: its storage {key} of {storage.numel} elements says {count}, and the "
                f"file has {size} bytes; download or copy it again"
            )
        records[key] = Record(key, position + 8, length, 0)
        position += 8 + length
    if position != size:
        raise ConversionError(f"{path} has {size - position} bytes behind its last storage; it is another file")
    return content, records


def _next(file: BinaryIO, path: Path, training: bool = False, storages: dict[str, Storage] | None = None) -> Any:
    """The object of the pickle at the file's position, which moves behind it."""
    start = file.tell()
    try:
        for _, _, position in pickletools.genops(file):
            if position is not None and position - start > pickles.MAX_PICKLE_BYTES:
                raise ConversionError(f"{path} has a pickle of more than {pickles.MAX_PICKLE_BYTES} bytes")
    except ValueError as error:
        raise ConversionError(f"{path} holds a damaged pickle ({error})") from error
    end = file.tell()
    file.seek(start)
    data = file.read(end - start)
    return pickles.load(data, str(path), training=training, storages=storages)
