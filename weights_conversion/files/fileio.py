"""How every layer opens and reads files that somebody else has made.

Opening never waits (a pipe has no end), takes regular files only, and knows a Git LFS pointer. What is read whole has a
limit of size. All are noted in the run's Watch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from weights_conversion.errors import ConversionError
from weights_conversion.files import watch

ABSENT = (FileNotFoundError, NotADirectoryError)  # what alone says that nothing is at a path
# A filesystem, a server or a sandbox that has not what a call asks for. 524: the kernel's ENOTSUPP, which 9p and NFS
# servers let through.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, 524)
MAX_CONFIG_BYTES = 16_000_000  # config.json and its like
MAX_INDEX_BYTES = 64_000_000  # an index of hundreds of thousands of tensors
MAX_TOKENIZER_BYTES = 128_000_000  # the largest published tokenizer.json have some 35 MB
_MAX_DEPTH = 64
_HASH_BYTES = 4 << 20
_POINTER_BYTES = 1024  # of a Git LFS pointer, by its specification
_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


@contextmanager
def named(doing: str, path: str | Path) -> Iterator[None]:
    """An OSError in the block says what was being done (`doing`, as in "reading") and to which file."""
    try:
        yield
    except OSError as error:
        _name(error, doing, path)
        raise


def _name(error: OSError, doing: str, path: str | Path) -> None:
    if error.errno is not None and not isinstance(error.filename, (str, bytes)):  # none, or a descriptor's number
        error.filename = str(path)
    if not hasattr(error, "doing"):
        error.doing = f"{doing} {path}"  # pyright: ignore[reportAttributeAccessIssue]


def failed(error: OSError) -> str:
    """What an OSError says, in words that name the file and what was being done to it, as far as it is known."""
    doing, path = getattr(error, "doing", None), error.filename
    if doing is None and path is not None:
        doing = str(path)
    elif doing is not None and isinstance(path, str) and path.startswith("/") and f"{path} " not in f"{doing} ":
        doing = f"{doing} ({path})"
    return f"{f'{doing}: ' if doing else ''}{error.strerror or error}"


def open_descriptor(path: str | Path, watching: watch.Watch | None = None, *, noted: bool = True) -> int:
    """A descriptor for reading a regular file. Raises ConversionError for anything else, OSError where it fails.

    `watching` is the run's Watch in threads, which do not have their own; `noted` False: the file may change.
    """
    with named("opening", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        with named("opening", path):
            status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConversionError(f"{path} is {_kind(status.st_mode)}, where a regular file was expected")
        _refuse_pointer(descriptor, status.st_size, path)
        watching = watching or watch.current()
        if noted and watching is not None:
            watching.note(path, status)
    except BaseException:
        close_quietly(descriptor)
        raise
    return descriptor


def is_there(path: str | Path) -> bool:
    """Whether anything is at a path, a link that leads nowhere too. Raises OSError where that is not to be known."""
    return status(path, followed=False) is not None


def exists(path: str | Path) -> bool:
    """Whether a path leads to anything. Raises OSError where that is not to be known, as do those below.

    Path.exists and its like take every error for no in Python 3.14: a file that could not be looked at would be left
    out of a conversion.
    """
    return status(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether a path leads to a regular file."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | Path) -> bool:
    """Whether a path leads to a folder."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_link(path: str | Path) -> bool:
    """Whether a symbolic link stands at a path."""
    found = status(path, followed=False)
    return found is not None and stat.S_ISLNK(found.st_mode)


def status(path: str | Path, followed: bool = True) -> os.stat_result | None:
    """None where nothing is, or a link that leads nowhere, or to itself; where nothing can be of such a name, too."""
    try:
        with named("looking for", path):
            return os.stat(path, follow_symlinks=followed)
    except (*ABSENT, ValueError):  # the last: a zero byte in it
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise


def size_of(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none. Raises OSError where that is not to be known."""
    found = status(path)
    return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None


def close_quietly(descriptor: int) -> None:
    """Closes what was only read, or a folder: whatever that says, all that was wanted of it is had."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


class _Read(io.FileIO):
    """A file that is read: its errors name it, and closing it is no error."""

    def __init__(self, descriptor: int, path: str | Path) -> None:
        super().__init__(descriptor, "rb")
        self._path = path

    def readinto(self, buffer: Any) -> int:
        with named("reading", self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with named("reading", self._path):
            return super().readall()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def open_file(path: str | Path, *, noted: bool = True) -> BinaryIO:
    """`open_descriptor` as a file object, whose errors name the file."""
    descriptor = open_descriptor(path, noted=noted)
    try:
        with named("opening", path):
            return cast(BinaryIO, io.BufferedReader(_Read(descriptor, path)))
    except BaseException:
        close_quietly(descriptor)
        raise


def read_at(descriptor: int, length: int, position: int, path: str | Path) -> bytes:
    """`length` bytes of an open file from `position` on, as many as there are; `path` is for errors."""
    parts: list[bytes] = []
    try:  # `named` would cost as much as the call: a checkpoint has hundreds of thousands of small pieces
        while length and (part := os.pread(descriptor, length, position)):
            parts.append(part)
            length, position = length - len(part), position + len(part)
    except OSError as error:
        _name(error, "reading", path)
        raise
    return b"".join(parts)


def advise(descriptor: int, advice: str, *pieces: tuple[int, int]) -> None:
    """A hint to the kernel (POSIX_FADV_...) about pieces of a file (first byte, bytes; 0: up to its end).

    It may refuse: then nothing is lost but speed.
    """
    with contextlib.suppress(OSError, AttributeError, ValueError, OverflowError):
        number = getattr(os, advice)
        for position, length in pieces:
            os.posix_fadvise(descriptor, position, length, number)


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for test, name in kinds if test(mode)), "a device")


def _refuse_pointer(descriptor: int, size: int, path: str | Path) -> None:
    if not 0 < size < _POINTER_BYTES:
        return
    head = read_at(descriptor, len(_POINTERS[0]), 0, path)
    if head.startswith(_POINTERS):
        raise ConversionError(
            f"{path} is a Git LFS pointer, text that stands for the file itself; run `git lfs pull` in its folder"
        )


def read_whole(path: Path, limit: int, *, noted: bool = True) -> bytes:
    """A file's bytes. Raises ConversionError where it has more than `limit` bytes, or is no regular file."""
    with open_file(path, noted=noted) as file, named("reading", path):
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ConversionError(f"{path} has {size} bytes, where at most {limit} were expected; it is another file")
        parts, left = [], limit + 1
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise ConversionError(f"{path} grew beyond {limit} bytes while it was read")
    return b"".join(parts)


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    try:
        content = json.loads(read_whole(path, limit).decode("utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise ConversionError(f"{path} is not readable as JSON (it is nested too deeply)") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, where a JSON object was expected")
    if _is_deep(content):
        raise ConversionError(f"{path} is not readable as JSON (it is nested more than {_MAX_DEPTH} levels deep)")
    return content


def _is_deep(content: Any) -> bool:
    """Whether it is nested so deeply that walking it, or writing it again, may exhaust the stack."""
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; of no use once `stop` is set, which ends it early."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_BYTES))
    with named("reading", path), os.fdopen(open_descriptor(path, noted=False), "rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(buffer[:count])
    return digest.hexdigest()
