"""The lock on OUT.partial: one process alone, or shared by the ranks of one job; some filesystems have none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.output import descriptors

logger = logging.getLogger(__name__)

LEFT_SECONDS = 60.0  # how long to wait for ranks of an earlier job that have lost their rank 0: within it they end
NAME = "lock"
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN)
_NO_LOCKS = (*fileio.UNSUPPORTED, errno.ENOLCK)


def open_lock(top: int) -> int:
    """The lock's file in an open OUT.partial, made where it is missing. Raises OSError where it is no file."""
    with contextlib.suppress(FileExistsError):
        return descriptors.open_new(NAME, top, 0o600)
    return descriptors.open_regular(NAME, top, os.O_RDWR)


def take(descriptor: int, kind: int) -> bool:
    """Takes a lock; False where the filesystem has none, BlockingIOError where another process has it.

    Any other OSError says nothing of either: who goes on without a lock then may write beside another process.
    """
    try:
        with descriptors.named_in(descriptor):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def take_alone(top: int, partial: Path) -> int | None:
    """The lock of this process alone; -1 where there are no locks, None where another file has come to its name."""
    deadline, waiting = time.monotonic() + LEFT_SECONDS, False
    while True:
        descriptor, kept = open_lock(top), False
        try:
            if not take(descriptor, fcntl.LOCK_EX):
                return -1
            kept = descriptors.is_at(NAME, top, descriptor)
            return descriptor if kept else None
        except BlockingIOError as error:
            if not _is_shared(descriptor) or time.monotonic() > deadline:
                raise ConversionError(f"another process is writing {partial} at this moment; wait for it") from error
        finally:
            if not kept:
                fileio.close_quietly(descriptor)
        if not waiting:
            logger.warning("ranks of another job are writing %s: waiting for their end", partial)
        waiting = True
        time.sleep(0.2)


def share(descriptor: int, partial: Path) -> None:
    """From the one process that has prepared OUT.partial to all ranks of its job, which take it with `take`.

    Raises ConversionError where another process was faster, OSError where the filesystem no longer locks.
    """
    if descriptor < 0:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise ConversionError(f"another process has just begun to write {partial}; wait for it") from error
        raise OSError(error.errno, error.strerror, str(partial / NAME)) from error


def _is_shared(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return take(descriptor, fcntl.LOCK_SH)
    return False
