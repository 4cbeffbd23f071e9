"""Zip archives as torch.save writes them: where their records stand, and putting CRC-32s in once the data are written.

An archive may be a part of a larger file. It is taken for what torch takes it for, or refused: see `directory`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weights_conversion.errors import ConversionError

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_DESCRIPTOR, _END64, _LOCATOR = b"PK\x07\x08", b"PK\x06\x06", b"PK\x06\x07"
_MAX_DIRECTORY_BYTES = 256 << 20


@dataclass(frozen=True)
class Record:
    """A stored zip record: first byte, length and CRC-32 (0: not kept) of its data."""

    name: str
    offset: int
    size: int
    crc: int


class Window(io.RawIOBase):
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


def directory(file: BinaryIO, size: int, path: Path) -> list[Record]:
    """The records of a zip archive of `size` bytes: stored, named once, and none in another's bytes.

    Nothing is read, and no memory taken, on the word of a size that the file does not have.
    """

    def damaged(why: str) -> ConversionError:
        return ConversionError(
            f"{path} is not a complete torch.save file: {why}; it is cut off, damaged or still being copied"
        )

    count, length, first = _end(file, size, damaged)
    file.seek(first)
    entries, position, found = file.read(length), 0, []
    if len(entries) != length:
        raise damaged("its directory is cut off")
    for _ in range(count):
        if entries[position : position + 4] != CENTRAL or position + 46 > length:
            raise damaged("its directory is cut off")
        fields = struct.unpack_from("<HH4xIIIHHHH", entries, position + 8)
        flags, method, crc, stored, plain, name, extra, note, disk = fields
        if stored == 0xFFFFFFFF or plain == 0xFFFFFFFF:
            stored, plain = _sizes64(entries, position, name, extra, stored, plain)
        header_at = _header_offset(entries, position, name, extra)
        label = entries[position + 46 : position + 46 + name].decode("utf-8", "replace")
        if label.endswith("/") and not plain:  # a folder's own entry, as zip makes them
            position += 46 + name + extra + note
            continue
        if method or flags & 1 or stored != plain:
            raise damaged(f"record {label} is compressed, which torch.save never does")
        if disk:
            raise damaged(f"record {label} claims to be in another of several files")
        if entries[position + 38] & 0x10:  # torch would take it for empty, and leave the tensor uninitialised
            raise damaged(f"record {label} is marked as a folder")
        file.seek(min(header_at, size))
        header = file.read(30)
        if len(header) != 30 or header[:4] != LOCAL:
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


def _end(file: BinaryIO, size: int, damaged: Callable[[str], ConversionError]) -> tuple[int, int, int]:
    """(records, bytes, first byte) of an archive's directory, by the record at its end."""
    tail_at = max(size - (22 + 0xFFFF), 0)
    file.seek(tail_at)
    tail = file.read(size - tail_at)
    end = tail.rfind(END)
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
    return count, length, first


def patch_crcs(file: BinaryIO, start: int, length: int, at: Mapping[int, tuple[int, int]]) -> None:
    """Writes CRC-32s into the archive in bytes start..start+length of `file`: behind the data and in the directory.

    `at` maps the first byte of a record's data (in `file`) to its size and CRC.
    """
    with io.BufferedReader(Window(file, start, length)) as window:
        _, _, first = _end(window, length, lambda why: ConversionError(f"an archive just made is damaged: {why}"))
    directory = start + first
    file.seek(directory)
    entries = file.read(start + length - directory)
    position = 0
    while entries[position : position + 4] == CENTRAL:
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
