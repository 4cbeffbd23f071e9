"""Errors of the system of which libraries of C++ and Rust tell in words alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Whose words no library says of a file's content.
_OF_THE_SYSTEM = (
    errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC,
    errno.EDQUOT, errno.EROFS, errno.EINTR, errno.ENODEV, errno.EBUSY, errno.ETIMEDOUT, errno.ENOSYS, errno.EOPNOTSUPP,
)  # fmt: skip


def of_the_system(error: Exception, path: Path) -> OSError | None:
    """What has failed when a library could not read the file `path`; None where it says something of its content.

    safetensors calls every refusal to open a file "No such file": one that is there has met another error.
    """
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path))
    if isinstance(error, FileNotFoundError) and os.path.lexists(path):
        return OSError(errno.EIO, "it cannot be opened", str(path))
    if isinstance(error, OSError):
        return error
    for number in errno.errorcode:
        words = os.strerror(number)
        numbered = f"{words} ({number})" in str(error) or f"(os error {number})" in str(error)
        if numbered or (number in _OF_THE_SYSTEM and words in str(error)):
            return OSError(number, words, str(path))
    return None
