"""Writes through the page cache, for filesystems that take no direct ones.

Left alone, the kernel keeps gigabytes of what was written, then stops every writer until the disk has caught up, with
a lock on the file that all of them wait for. Here the disk begins with each piece at once, and what it has is dropped:
nothing that the machine needs is pushed out, and no writer is stopped for long.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from weights_conversion.files import fileio

KEPT = 4  # pieces of a file that may still be on their way to the disk when the next is written


class Behind:
    """One file's writes. May be used from several threads, of which one writes at a time, as the kernel has it too."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._pieces: deque[tuple[int, int]] = deque()  # position and length

    def write(self, view: memoryview, position: int) -> None:
        whole = (position, len(view))
        with self._lock:
            while view:
                count = os.pwrite(self._descriptor, view, position)
                view, position = view[count:], position + count
            self._pieces.append(whole)
            older = self._pieces.popleft() if len(self._pieces) > KEPT else None
        self._let_go(whole)
        if older is not None:
            self._let_go(older)

    def _let_go(self, piece: tuple[int, int]) -> None:
        """Begins to write what is not on the disk yet and drops what is."""
        fileio.advise(self._descriptor, "POSIX_FADV_DONTNEED", piece)
