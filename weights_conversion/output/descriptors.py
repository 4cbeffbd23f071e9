"""Files and folders by descriptors, relative to the folder that is held: no link is followed, no FIFO waited for."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EISDIR)


@contextlib.contextmanager
def folder(name: Path | str | int, within: int | None = None) -> Iterator[int]:
    """A descriptor of a folder, closed at the end; one that is open already is duplicated.

    Raises NotADirectoryError for a link, FileNotFoundError where nothing is.
    """
    descriptor = os.dup(name) if isinstance(name, int) else open_folder(name, within)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_folder(name: Path | str, within: int | None = None) -> int:
    """Opens a folder that is no link. Raises NotADirectoryError for anything else."""
    try:
        return os.open(name, FOLDER, dir_fd=within)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # what O_NOFOLLOW says of a link
            raise NotADirectoryError(errno.ENOTDIR, "is a symbolic link", str(name)) from error
        raise


def open_regular(name: str, within: int, flags: int) -> int:
    """Opens a regular file that is there, without waiting. Raises OSError for anything else."""
    descriptor = os.open(name, flags | _SAFE, dir_fd=within)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", name)
    return descriptor


def read_note(within: int, name: str, limit: int, whole: bool = True) -> bytes | None:
    """A small file's content; None where it is not there, cannot be read, or (`whole`) has more than `limit` bytes."""
    try:
        with os.fdopen(open_regular(name, within, os.O_RDONLY), "rb") as file:
            content = file.read(limit + whole)
    except OSError:
        return None
    return None if len(content) > limit else content


def sync_folder(path: Path | str | int, within: int | None = None) -> None:
    """Makes the names in a folder survive a power cut, where the filesystem knows how and the folder may be read."""
    try:
        with folder(path, within) as descriptor:
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in _NO_SYNC:
                    raise
    except PermissionError:
        return
