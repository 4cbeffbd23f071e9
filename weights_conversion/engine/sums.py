"""SHA-256 sums of an output's files, taken of the bytes that are written, as far as they come in a file's order.

Chunks hand in what they have written in turn, whichever is done first. One that holds parts of several tensors (query,
key and value; gate and up) writes some of them far ahead in the file: these are read back when all before them has been
summed, soon after they were written. Read back at the end are files that get their last bytes there, such as the CRC-32
that stands before a tensor in torch's, and what other processes, or earlier runs, have written.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from weights_conversion.engine.direct import Direct
from weights_conversion.engine.streams import Sink, bytes_of
from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.layouts.placement import TensorRef
from weights_conversion.output import descriptors

READ_BYTES = 4 << 20

Piece = tuple[TensorRef, int, Tensor]  # what is written, contiguous, from which byte of which tensor on


class Taped:
    """A sink that keeps what it has written, for RunningSums.take. Of one thread."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._pieces = sink, list[Piece]()

    def write(self, ref: TensorRef, start: int, data: Tensor) -> None:
        self._sink.write(ref, start, data)
        self._pieces.append((ref, start, data))

    def taken(self) -> list[Piece]:
        """What was written since it was asked before."""
        pieces, self._pieces = self._pieces, []
        return pieces


@dataclass
class _File:
    """`end`: of its last tensor. `upto`: how many bytes are summed. `ahead`: the end of each run of later bytes."""

    name: str
    end: int
    ahead: dict[int, int]
    upto: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class RunningSums:
    """Of files that are laid out. `take` is for those that have their final bytes as soon as these are written."""

    def __init__(self, folder: int, shown: Path, offsets: Mapping[TensorRef, int]) -> None:
        """The files stand in the open `folder`, which a user finds at `shown`; `offsets` are where tensors begin."""
        self._folder, self._shown, self._offsets = folder, shown, offsets
        self._direct, self._lock, self._opened = Direct(), threading.Lock(), dict[str, int]()
        self._turn, self._ended, self._changed = 0, threading.Event(), threading.Condition()
        first, last = dict[str, int](), dict[str, int]()
        for ref, offset in offsets.items():
            first[ref.file] = min(first.get(ref.file, offset), offset)
            last[ref.file] = max(last.get(ref.file, 0), offset + ref.nbytes)
        self._files = {name: _File(name, last[name], {0: begin}) for name, begin in first.items()}  # the header

    def take(self, turn: int, pieces: Sequence[Piece]) -> None:
        """Waits until all turns before `turn` (0, 1, ...) have been taken; without effect after `end`."""
        with self._changed:
            while self._turn != turn and not self._ended.is_set():
                self._changed.wait()
        for ref, start, data in pieces:
            if self._ended.is_set():
                return
            self._add(self._files[ref.file], self._offsets[ref] + start, bytes_of(data))
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def end(self) -> None:
        """A turn will not come: nobody waits, or reads, any longer."""
        with self._changed:
            self._ended.set()
            self._changed.notify_all()

    def finish(self, name: str, stop: threading.Event) -> str | None:
        """The sum of a file, in hexadecimal, of no use once `stop` is set; None of one without tensors.

        Reads what is not summed yet. May be called of several files at once.
        """
        file = self._files.get(name)
        if file is None:
            return None
        with fileio.named("reading", self._shown / name):
            size = os.fstat(self._open(name)).st_size
        if size < max(file.upto, file.end):
            raise self._cut_off(name, size)
        self._read(file, size, stop)
        self._close(name)
        return file.digest.hexdigest()

    def close(self) -> None:
        self._direct.close()
        for descriptor in self._opened.values():
            fileio.close_quietly(descriptor)
        self._opened.clear()

    def _add(self, file: _File, position: int, data: memoryview) -> None:
        self._catch_up(file)
        if position == file.upto:
            file.digest.update(data)  # without Python's lock
            file.upto += len(data)
            self._catch_up(file)
        else:
            file.ahead[position] = position + len(data)

    def _catch_up(self, file: _File) -> None:
        while not self._ended.is_set() and (end := file.ahead.pop(file.upto, None)) is not None:
            self._read(file, end, self._ended)
        if file.upto >= file.end:
            self._close(file.name)

    def _read(self, file: _File, end: int, stop: threading.Event) -> None:
        """Sums up to byte `end`, from the disk, which is read while what it has given is summed."""
        size = min(READ_BYTES, end - file.upto)
        if size <= 0:
            return
        with fileio.named("reading", self._shown / file.name):  # into memory on pages, as direct reads want it
            this, other = (memoryview(mmap.mmap(-1, size)) for _ in range(2))
        with ThreadPoolExecutor(1, thread_name_prefix="sums") as reader:
            count = self._fill(file.name, this, file.upto)
            while count and not stop.is_set():
                position, following = file.upto + count, lambda: 0
                if position < end:
                    following = _begun(reader, self._fill, file.name, other[: end - position], position)
                file.digest.update(this[:count])
                file.upto = position
                this, other, count = other, this, following()

    def _fill(self, name: str, into: memoryview, position: int) -> int:
        """Reads some bytes from `position` on; how many."""
        with fileio.named("reading", self._shown / name):
            descriptor, count = self._open(name), 0
            if self._direct.wants(descriptor, position, len(into)):
                count = self._direct.read(descriptor, into, position)
            count = count or os.preadv(descriptor, [into], position)
        if not count:
            raise self._cut_off(name, position)
        return count

    def _cut_off(self, name: str, size: int) -> ConversionError:
        return ConversionError(f"{self._shown / name} ends at byte {size}; somebody has cut it off")

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._opened:
                with descriptors.shown_as("opening", self._shown / name):
                    self._opened[name] = descriptors.open_regular(name, self._folder, os.O_RDONLY)
            return self._opened[name]

    def _close(self, name: str) -> None:
        with self._lock:
            descriptor = self._opened.pop(name, None)
            if descriptor is not None:
                self._direct.forget(descriptor)
                fileio.close_quietly(descriptor)


def _begun(pool: ThreadPoolExecutor, call: Callable[..., int], *given: object) -> Callable[[], int]:
    """`call`'s result, later; where the system gives no thread, it is called only then."""
    try:
        return pool.submit(call, *given).result
    except RuntimeError:
        return functools.partial(call, *given)
