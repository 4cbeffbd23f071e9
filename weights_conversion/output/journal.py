"""What of an unfinished output is known to be good, so that a run that was killed can be continued."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import TensorRef, Written
from weights_conversion.output import descriptors

MAX_NOTE_BYTES = 1 << 30
VISIBLE_SECONDS = 20.0  # how long another node's files may take to be seen here


@dataclass(frozen=True)
class Entries:
    """Finished chunks, as lines, and the files that hold their data."""

    lines: Sequence[bytes]
    files: Sequence[str]


class Journal:
    """Which chunks are written and on the disk. A file per process; entries follow a sync of their data.

    Each line has its own CRC-32 in front, so that what a kill or a broken disk leaves is never taken for an entry.

    `descriptor` is the open `folder`: what is noted then goes there and nowhere else, whatever comes to its name.
    """

    def __init__(
        self, folder: Path, refs: Sequence[TensorRef], rank: int = 0, descriptor: int | None = None
    ) -> None:  # fmt: skip
        self._folder, self._rank, self._descriptor = folder, rank, descriptor
        self._number = {ref: number for number, ref in enumerate(refs)}
        self._refs = refs
        self._waiting: list[bytes] = []
        self._files: set[str] = set()
        self._lock = threading.Lock()

    def load(self) -> dict[int, list[Written]]:
        """Chunks that any process has finished, with what they wrote. Lines that are none count as not there.

        Raises OSError where a note could not be read: what it may say would be converted again.
        """
        done: dict[int, list[Written]] = {}
        with descriptors.shown_as("looking into", self._folder), self._opened() as folder:
            names = sorted(name for name in os.listdir(folder) if name.startswith("chunks."))
            notes = [descriptors.read_note(folder, name, MAX_NOTE_BYTES) or b"" for name in names]
        for line in b"\n".join(notes).split(b"\n"):
            sum_, _, text = line.partition(b" ")
            if sum_ != _sum(text):  # cut off by a kill, or garbage
                continue
            number, writes = json.loads(text)
            done[number] = [Written(self._refs[ref], start, length, crc) for ref, start, length, crc in writes]
        return done

    def load_all(self, count: int) -> dict[int, list[Written]]:
        """All of `count` chunks, as the ranks noted them; a network filesystem may show their notes a little late, or
        lose sight of one for a moment."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            late = time.monotonic() > deadline
            try:
                done = self.load()
            except OSError:
                if late:
                    raise
            else:
                if len(done) >= count:
                    return done
                if late:
                    raise ConversionError(
                        f"{self._folder} shows {len(done)} of {count} parts as written, after all ranks have written "
                        "theirs; the output must be on a filesystem that all nodes share"
                    )
            time.sleep(0.5)

    def add(self, number: int, written: Iterable[Written]) -> None:
        """A finished chunk, to be noted when its data are on the disk."""
        writes = [(self._number[w.ref], w.start, w.length, w.crc) for w in written]
        text = json.dumps([number, writes]).encode()
        with self._lock:
            self._waiting.append(_sum(text) + b" " + text)
            self._files.update(self._refs[ref].file for ref, *_ in writes)

    def take(self) -> Entries:
        """What was added since it was last taken: to be noted once these files are synced."""
        with self._lock:
            taken = Entries(self._waiting, sorted(self._files))
            self._waiting, self._files = [], set()
        return taken

    def note(self, entries: Entries) -> None:
        """Writes entries whose data are on the disk."""
        if not entries.lines:
            return
        shown = descriptors.shown_as("writing", self._folder / f"chunks.{self._rank}")
        with shown, self._opened() as folder, os.fdopen(self._open(folder), "ab") as file:
            file.write(b"\n" + b"\n".join(entries.lines) + b"\n")  # in front too: a kill may have left half a line
            file.flush()
            os.fsync(file.fileno())

    def _opened(self) -> contextlib.AbstractContextManager[int]:
        return descriptors.folder(self._folder if self._descriptor is None else self._descriptor)

    def _open(self, folder: int) -> int:
        name = f"chunks.{self._rank}"
        with contextlib.suppress(FileExistsError):
            return descriptors.open_new(name, folder, 0o600)
        return descriptors.open_regular(name, folder, os.O_WRONLY | os.O_APPEND)


def _sum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
