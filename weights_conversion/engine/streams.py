"""Bytes in and out of files: reused page-aligned memory, positioned reads, positioned writes around the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weights_conversion.engine.behind import Behind
from weights_conversion.engine.direct import Direct
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio, watch
from weights_conversion.layouts.placement import PAGE, TensorRef
from weights_conversion.layouts.plan import CHUNK_BYTES
from weights_conversion.output import descriptors

logger = logging.getLogger(__name__)

LEAST_BEHIND = 1 << 20  # bytes of a write through the page cache that the disk is to begin with at once

# Errors of a write that are not about how it was asked for.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS)


class Scratch:
    """Page-aligned memory of one worker, handed out piece by piece and reused for every chunk."""

    def __init__(self) -> None:
        self._regions: list[tuple[mmap.mmap, Tensor]] = []
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that starts on a page; valid until `reset`."""
        size = prod(shape) * dtype.itemsize
        pages = -(-max(size, 1) // PAGE) * PAGE
        if not self._regions or self._used + pages > len(self._regions[-1][0]):
            self._add(max(pages, CHUNK_BYTES))
        _, tensor = self._regions[-1]
        piece = tensor[self._used : self._used + size].view(dtype).view(tuple(shape))
        self._used += pages
        return piece

    def reset(self) -> None:
        if len(self._regions) > 1:  # one region next time, so that the pieces of a chunk follow each other
            total = sum(len(region) for region, _ in self._regions)
            self._regions = []
            self._add(total)
        self._used = 0

    def _add(self, size: int) -> None:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._regions.append((region, torch.frombuffer(region, dtype=torch.uint8)))
        self._used = 0


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which must outlive the view."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


class Source:
    """Positioned reads from any number of files, by path; descriptors stay open until `close`.

    What was not in the page cache before is taken out of it again once it has been read: a conversion reads every byte
    once, and would otherwise push out what the machine does need, through memory that is slow to get at first.
    """

    def __init__(self, root: Path | None = None, direct: Direct | None = None) -> None:
        """`direct`: what is not in the page cache is read past it, so that no read-ahead works for who reads little."""
        self._root, self._watch, self._direct = root, watch.current(), direct
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._absent: set[tuple[int, int]] = set()  # (descriptor, first byte) of what prefetch found uncached

    def read(self, ref: TensorRef, start: int, into: Tensor) -> None:
        """Fill the contiguous tensor `into` from byte `start` of `ref` on."""
        descriptor = self._open(ref.file)
        left, position = bytes_of(into), ref.offset + start
        whole = (descriptor, position, len(left))
        if self._direct is not None and self._direct.wants(*whole):
            with fileio.named("reading", self._path(ref.file)):
                done = self._direct.read(descriptor, left, position)
            left, position = left[done:], position + done
        while left:
            with fileio.named("reading", self._path(ref.file)):
                count = os.preadv(descriptor, [left], position)
            if count == 0:
                raise ConversionError(f"{ref.file} ends in the middle of {ref.name}; it was cut off while it was read")
            left, position = left[count:], position + count
        if whole[:2] in self._absent:
            self._absent.discard(whole[:2])
            fileio.advise(descriptor, "POSIX_FADV_DONTNEED", whole[1:])

    def prefetch(self, ref: TensorRef, start: int, length: int) -> None:
        """Ask the kernel to begin reading these bytes; where it cannot be asked, nothing is lost."""
        if hasattr(os, "posix_fadvise"):
            descriptor, position = self._open(ref.file), ref.offset + start
            if self._direct is not None and self._direct.wants(descriptor, position, length):
                return
            if not _cached(descriptor, position + length // 2):  # its ends may share pages with what is read before
                self._absent.add((descriptor, position))
            fileio.advise(descriptor, "POSIX_FADV_WILLNEED", (position, length))

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = fileio.open_descriptor(self._path(file), self._watch)
            return self._files[file]

    def _path(self, file: str) -> str | Path:
        return self._root / file if self._root else file

    def close(self) -> None:
        if self._direct is not None:
            self._direct.close()
        for descriptor in self._files.values():
            with contextlib.suppress(OSError):  # all that was wanted of it has been read
                os.close(descriptor)
        self._files.clear()


def _cached(descriptor: int, position: int) -> bool:
    """Whether a byte of a file stands in the page cache; True where the filesystem does not say."""
    try:
        os.preadv(descriptor, [bytearray(1)], position, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        pass
    return True


class Sink(Protocol):
    """What takes the bytes of tensors, from several threads: files (streams.Target), or what compares with them."""

    def write(self, ref: TensorRef, start: int, data: Tensor) -> None:
        """The contiguous tensor `data` belongs at byte `start` of `ref`."""
        ...


class Target:
    """Positioned writes into files that exist with their final size.

    Whole pages bypass the page cache (O_DIRECT), which on a local disk doubles the speed of a conversion; what does
    not fill a page, and filesystems that refuse O_DIRECT, go through the page cache.
    """

    def __init__(
        self, root: Path, offsets: Mapping[TensorRef, int], direct: bool = True, folder: int | None = None
    ) -> None:  # fmt: skip
        """`folder`: a descriptor of `root`, by which its files are then opened, whatever comes to that name later."""
        self._root, self._offsets, self._direct, self._folder = root, offsets, direct, folder
        self._files: dict[str, tuple[int, int | None]] = {}
        self._behind: dict[str, Behind] = {}
        self._refused: set[int] = set()
        self._lock = threading.Lock()

    def write(self, ref: TensorRef, start: int, data: Tensor) -> None:
        """Write the contiguous tensor `data` at byte `start` of `ref`."""
        with fileio.named("writing", self._root / ref.file):
            self._write(ref, start, data)

    def _write(self, ref: TensorRef, start: int, data: Tensor) -> None:
        cached, direct = self._open(ref.file)
        view, position = bytes_of(data), self._offsets[ref] + start
        if direct is not None and position % PAGE == 0 and data.data_ptr() % PAGE == 0:
            pages = len(view) // PAGE * PAGE
            try:
                _write_all(direct, view[:pages], position)
                view, position = view[pages:], position + pages
            except OSError as error:
                if error.errno in _OF_THE_DISK:
                    raise
                with self._lock:  # refused, in whatever words: from here on through the page cache
                    self._files[ref.file] = (cached, None)
                    self._refused.add(direct)  # other threads may be writing by it
        if len(view) < LEAST_BEHIND:
            _write_all(cached, view, position)
        else:
            self._behind[ref.file].write(view, position)

    def _open(self, file: str) -> tuple[int, int | None]:
        with self._lock:
            if file not in self._files:
                cached = self._open_file(file, os.O_WRONLY)
                direct = None
                if self._direct and hasattr(os, "O_DIRECT"):
                    try:
                        direct = self._open_file(file, os.O_WRONLY | os.O_DIRECT)
                    except OSError:
                        logger.debug("%s: no direct writes here", file)
                self._files[file], self._behind[file] = (cached, direct), Behind(cached)
            return self._files[file]

    def _open_file(self, file: str, flags: int) -> int:
        if self._folder is None:
            return os.open(self._root / file, flags | os.O_CLOEXEC)
        return descriptors.open_regular(file, self._folder, flags)

    def sync(self, file: str) -> None:
        """Make what was written into a file survive a power cut, by whom it was ever written."""
        with descriptors.shown_as("syncing", self._root / file):
            with self._lock:
                opened = self._files.get(file)
            if opened is not None:  # open since before it was written: by this descriptor no error goes unheard
                os.fsync(opened[0])
                return
            descriptor = self._open_file(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                fileio.close_quietly(descriptor)

    def close(self) -> None:
        files, refused = self._files, self._refused
        self._files, self._refused = {}, set()
        for direct in refused:
            with contextlib.suppress(OSError):
                os.close(direct)
        for file, opened in files.items():
            for descriptor in opened:
                if descriptor is not None:
                    with fileio.named("closing", self._root / file):
                        os.close(descriptor)


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count
