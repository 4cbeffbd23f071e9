"""The disk that an output needs: whether it is there, and taking it before the work begins."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.errors.text import size
from weights_conversion.files import fileio
from weights_conversion.output import place


def check_space(out: Path, needed: int) -> None:
    """Refuses to begin where the filesystem has not the space, or the folder cannot be written."""
    folder = _existing_parent(out)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(f"{folder} is not writable; name another place for {out.name}")
    if needed > (free := free_space(out)):
        raise ConversionError(
            f"{out} needs {size(needed)}, but its filesystem has {size(free)} free; "
            "free some space, or name a place elsewhere"
        )


def free_space(out: Path) -> int:
    """Bytes that the output may take: what is free, and what an interrupted run of it holds already."""
    stat = os.statvfs(_existing_parent(out))
    return stat.f_bavail * stat.f_frsize + _allocated(place.partial_folder(out))


def _existing_parent(out: Path) -> Path:
    folder = out.absolute().parent
    while not fileio.exists(folder):
        folder = folder.parent
    return folder


def _allocated(folder: Path) -> int:
    """Bytes on the disk below a folder, as far as it may be read; no link is followed."""
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(above, name)).st_blocks * 512
    return total


def reserve(descriptor: int) -> None:
    """Allocates a file's blocks now, so that a full disk or quota shows before the work and not within it."""
    size = os.fstat(descriptor).st_size
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    # The C library's fallocate, not posix_fallocate: the latter writes every block where the call is not known.
    while size and libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))
        if code != errno.EINTR:
            return  # not known here: a full disk will show when it is written
