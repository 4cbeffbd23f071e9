"""Zip archives as torch.save writes them: where their records stand, and putting CRC-32s in once the data are written.

An archive may be a part of a larger file. It is taken for what torch takes it for, or refused: see `directory`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

_HEADER = 30  # bytes in front of a record's name
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

    def reader(self, path: Path, headers: Iterable[int]) -> Callable[[int, int], bytes] | None:
        """(first byte, length) -> those bytes, as many as the window has; None where the file is none of the system.

        `headers` is where the reads will begin.
        """
        try:
            descriptor = self._file.fileno()
        except (OSError, AttributeError):
            return None
        # A parallel filesystem brings many at a time, but each of them only after a while.
        fileio.advise(descriptor, "POSIX_FADV_WILLNEED", *((self._start + at, _HEADER) for at in headers))

        def read(position: int, length: int) -> bytes:
            return fileio.read_at(descriptor, max(min(length, self._size - position), 0), self._start + position, path)

        return read


class _Heard:
    """A file that keeps the error of a read, which zipfile takes for a broken archive."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failed: OSError | None = None
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            self.failed = error
            raise


def directory(file: BinaryIO, size: int, path: Path) -> list[Record]:
    """The records of a zip archive of `size` bytes: `zipfile` reads them, and rules refuse what it lets pass.

    That is what torch would read otherwise. No memory is taken on the word of a size that the file does not have.
    """

    def damaged(why: str) -> ConversionError:
        return ConversionError(
            f"{path} is not a complete torch.save file: {why}; it is cut off, damaged or still being copied"
        )

    count, _, first = _end(file, size, damaged)
    heard = _Heard(file)
    try:
        with zipfile.ZipFile(heard) as archive:  # pyright: ignore[reportArgumentType]
            entries = archive.infolist()
            if (archive.start_dir, len(entries)) != (first, count):
                raise damaged("its two directories disagree")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        if heard.failed is not None:
            raise heard.failed from None
        raise damaged(f"its directory is cut off or damaged ({error})") from error
    entries = [entry for entry in entries if not _is_folder(entry)]
    for why, breaks in RULES.items():
        if broken := next(filter(breaks, entries), None):
            raise damaged(f"record {broken.orig_filename} {why}")
    read_at = _reader(file, path, [entry.header_offset for entry in entries])
    found = [
        Record(entry.orig_filename, _data_at(read_at, size, entry, damaged), entry.file_size, entry.CRC)
        for entry in entries
    ]
    if len({record.name for record in found}) != len(found):
        raise damaged("it names a record twice")
    _check_apart(found, first, damaged)
    return found


def _reader(file: BinaryIO, path: Path, headers: Iterable[int]) -> Callable[[int, int], bytes]:
    """(first byte, length) -> those bytes of an archive, as many as there are: the `headers` of records, no more.

    Buffers would read a few KB for each of 30 bytes, of a checkpoint of 512 ranks a million times.
    """
    window = getattr(file, "raw", None)
    if isinstance(window, Window) and (read_at := window.reader(path, headers)) is not None:
        return read_at

    def read(position: int, length: int) -> bytes:
        file.seek(position)
        return file.read(length)

    return read


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    """A folder's own entry, as zip makes them; torch has none, and passes it over."""
    return entry.orig_filename.endswith("/") and not entry.file_size


def _is_compressed(entry: zipfile.ZipInfo) -> bool:
    """Or encrypted, or of two sizes."""
    return bool(entry.compress_type or entry.flag_bits & 1 or entry.compress_size != entry.file_size)


def _is_elsewhere(entry: zipfile.ZipInfo) -> bool:
    return bool(entry.volume)


def _is_marked_as_folder(entry: zipfile.ZipInfo) -> bool:
    """Which torch would take for empty, and leave the tensor uninitialised."""
    return bool(entry.external_attr & 0x10)


RULES: dict[str, Callable[[zipfile.ZipInfo], bool]] = {
    "is compressed, which torch.save never does": _is_compressed,
    "claims to be in another of several files": _is_elsewhere,
    "is marked as a folder": _is_marked_as_folder,
}


def _data_at(
    read_at: Callable[[int, int], bytes], size: int, entry: zipfile.ZipInfo, damaged: Callable[[str], ConversionError]
) -> int:
    """The first byte of a record's data, by the header in front of it."""
    header = read_at(min(entry.header_offset, size), _HEADER)
    if len(header) != _HEADER or header[:4] != LOCAL:
        raise damaged(f"record {entry.orig_filename} does not begin where the directory says")
    name, extra = struct.unpack_from("<HH", header, 26)
    return entry.header_offset + _HEADER + name + extra


def _check_apart(records: Sequence[Record], end: int, damaged: Callable[[str], ConversionError]) -> None:
    """No record's data may reach into another's, or to the directory at `end`."""
    previous = 0
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < previous or record.offset + record.size > end:
            raise damaged(f"record {record.name} reaches into others, or beyond the end")
        previous = record.offset + record.size


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


def _zip64(entries: bytes, position: int, name: int, extra: int) -> bytes:
    """The content of a directory entry's zip64 extra field; empty where there is none."""
    field_at, end = position + 46 + name, position + 46 + name + extra
    while field_at + 4 <= end:
        kind, size = struct.unpack_from("<HH", entries, field_at)
        if kind == 1:
            return entries[field_at + 4 : field_at + 4 + size]
        field_at += 4 + size
    return b""
