"""Reads past the page cache (O_DIRECT), for what it does not hold.

What a conversion reads once costs a page of memory and a copy for every page when it goes through the cache, and pushes
out what the machine does need. What stands in the cache already is read from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import threading

from weights_conversion.files import fileio
from weights_conversion.layouts.placement import PAGE

LEAST_BYTES = 1 << 20  # of a range that is read directly: below it the kernel's read-ahead is worth more
BOUNCE_BYTES = 8 << 20  # of each thread, for what does not lie on pages
_SAMPLE_BYTES = 4 << 20
_CACHESTAT = 451  # the number of the call on every architecture (Linux 6.5)
# Errors of a read that are not about how it was asked for.
_OF_THE_DISK = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)


class Direct:
    """Direct reads of files that are open already. May be used from several threads."""

    def __init__(self) -> None:
        self._files: dict[int, int | None] = {}  # by the descriptor that they were opened from; None: refused
        self._refused: list[int] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    def wants(self, descriptor: int, position: int, length: int) -> bool:
        """Whether these bytes of a file are better read directly: many, mostly not in the cache, of a file that can."""
        return (
            length >= LEAST_BYTES
            and self._open(descriptor) is not None
            and 2 * cached_bytes(descriptor, position, length) < length
        )

    def read(self, descriptor: int, into: memoryview, position: int) -> int:
        """Fills `into`, a view of C memory, from byte `position` on; how many bytes it has got.

        Fewer where the file ends, or its filesystem refuses: the rest is for a read through the cache.
        """
        direct = self._open(descriptor)
        if direct is None:
            return 0
        try:
            done = 0
            if position % PAGE == 0 and _address(into) % PAGE == 0:
                done = _read_pages(direct, into[: len(into) // PAGE * PAGE], position)
                if done < len(into) // PAGE * PAGE:
                    return done
            return done + self._bounce(direct, into[done:], position + done)
        except OSError as error:
            if error.errno in _OF_THE_DISK:
                raise
            with self._lock:  # refused, in whatever words: from here on through the page cache
                self._files[descriptor] = None
                self._refused.append(direct)  # other threads may be reading by it
            return 0

    def _bounce(self, direct: int, into: memoryview, position: int) -> int:
        """As `read`, by way of this thread's pages."""
        bounce, done = self._buffer(), 0
        while done < len(into):
            start = (position + done) // PAGE * PAGE
            skip = position + done - start
            wanted = min(len(into) - done, BOUNCE_BYTES - skip)
            got = _read_pages(direct, bounce[: -(-(skip + wanted) // PAGE) * PAGE], start, skip + wanted) - skip
            if got <= 0:
                break
            got = min(got, wanted)
            ctypes.memmove(_address(into) + done, _address(bounce) + skip, got)  # without Python's lock
            done += got
            if got < wanted:
                break
        return done

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
        return self._local.buffer

    def _open(self, descriptor: int) -> int | None:
        with self._lock:
            if descriptor not in self._files:
                self._files[descriptor] = _reopened(descriptor)
            return self._files[descriptor]

    def forget(self, descriptor: int) -> None:
        """Before a descriptor that nobody is reading by is closed."""
        with self._lock:
            direct = self._files.pop(descriptor, None)
        if direct is not None:
            fileio.close_quietly(direct)

    def close(self) -> None:
        """Before the descriptors that it was given are closed."""
        for direct in [*self._files.values(), *self._refused]:
            if direct is not None:
                fileio.close_quietly(direct)
        self._files.clear()
        self._refused.clear()


def _reopened(descriptor: int) -> int | None:
    """The same file, whatever stands at its name by now; None where it cannot be read directly."""
    if not hasattr(os, "O_DIRECT"):
        return None
    with contextlib.suppress(OSError):
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    return None


def _read_pages(direct: int, into: memoryview, position: int, enough: int | None = None) -> int:
    """Reads whole pages, until `enough` bytes are there (all); how many, which is fewer where the file ends."""
    done, enough = 0, len(into) if enough is None else enough
    while done < enough:
        count = os.preadv(direct, [into[done:]], position + done)
        if done + count >= enough:
            return done + count
        if count % PAGE or count == 0:  # the end, or a short read, behind which nothing lies on a page
            return done + count
        done += count
    return done


def cached_bytes(descriptor: int, position: int, length: int) -> int:
    """How many of these bytes stand in the page cache, about; all of them where the system does not say."""
    counted = _cachestat(descriptor, position, length)
    if counted is not None:
        return counted
    samples = max(length // _SAMPLE_BYTES, 2)
    # At other places in every run: looking makes the kernel read what is looked at.
    found = sum(_is_cached(descriptor, position + random.randrange(length)) for _ in range(samples))
    return length * found // samples


def _cachestat(descriptor: int, position: int, length: int) -> int | None:
    """By the call of that name; None where it is not known, or not allowed for this file."""
    where, found = (ctypes.c_uint64 * 2)(position, length), (ctypes.c_uint64 * 5)()
    try:
        if _libc().syscall(_CACHESTAT, ctypes.c_uint(descriptor), where, found, ctypes.c_uint(0)) != 0:
            return None
    except (AttributeError, OSError):
        return None
    return min(found[0] * mmap.PAGESIZE, length)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _is_cached(descriptor: int, position: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        pass
    return True


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view)) if len(view) else 0
