"""What is written gets onto the disk beside the work, and is noted only then.

A thread of its own syncs the files that were written since their last sync, and then lets the journal say which chunks
they hold. No thread that reads, converts or writes waits for it. The first time it also makes the laid out files and
their folders durable, and only then notes by which run they can be continued.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol

from weights_conversion.layouts.placement import Written
from weights_conversion.output.journal import Entries, Journal
from weights_conversion.output.together import join, together

logger = logging.getLogger(__name__)

# A kill costs what was written since the last sync began: at most these seconds of work, and those that a sync takes.
SYNC_SECONDS = 20.0
FIRST_SECONDS = 2.0  # before the first, which a short run ends without


class Files(Protocol):
    """The output's files of tensors."""

    def sync(self, file: str) -> None:
        """Makes what was written into a file survive a power cut."""
        ...

    def close(self) -> None: ...


class Durability:
    """Within its block the thread runs; at its end, whatever ends it, what is written is synced and noted.

    `first` are calls that make the names of the laid out `names` durable, and `note` then says by which run they can be
    continued; None where that has been done.
    """

    def __init__(
        self, journal: Journal, files: Files, names: Sequence[str], first: Sequence[Callable[[], None]] = (),
        note: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.files, self._journal = files, journal
        self._names, self._first, self._note = names, first, note
        self._lock = threading.Lock()  # one sync at a time
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sync")
        self._error: BaseException | None = None
        self._sync_failed = False

    def __enter__(self) -> Durability:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        join([self._thread])
        if error is None:
            self._check()
            return
        try:
            self.flush()
        except Exception as further:
            if not isinstance(error, Exception):  # a signal, whose sentence would promise more than is there
                raise
            logger.debug("what was written could not be noted: %s", further)

    def add(self, number: int, written: Iterable[Written]) -> None:
        """A chunk is written. Raises what has ended the thread."""
        self._check()
        self._journal.add(number, written)

    def stop(self) -> None:
        """All chunks are written: ends the thread, and raises what has ended it before."""
        self._stop.set()
        join([self._thread])
        self._check()

    def flush(self) -> None:
        """Syncs what was written and notes it; without effect after a sync has failed."""
        with self._lock:
            entries = self._journal.take()
            if self._sync_failed or not (entries.lines or self._note):
                return
            files = entries.files if self._note is None else self._names
            together([*(functools.partial(self._sync, file) for file in files), *self._unnamed()])
            self._write(entries)

    def finish(self, tasks: Sequence[Callable[[], None]], finish_file: Callable[[str], None]) -> None:
        """`finish_file` for each file, whose sync follows, with `tasks` at the same time."""

        def finished(file: str) -> None:
            finish_file(file)
            self._sync(file)

        with self._lock:
            together([*(functools.partial(finished, file) for file in self._names), *tasks, *self._unnamed()])

    def note(self) -> None:
        """Notes all that is written, once `finish` has synced it."""
        with self._lock:
            self._write(self._journal.take())

    def _unnamed(self) -> Sequence[Callable[[], None]]:
        return () if self._note is None else [functools.partial(self._vouched, task) for task in self._first]

    def _sync(self, file: str) -> None:
        self._vouched(functools.partial(self.files.sync, file))

    def _vouched(self, sync: Callable[[], None]) -> None:
        try:
            sync()
        except OSError:
            self._sync_failed = True  # the kernel reports lost data once, so no later sync vouches for anything
            raise

    def _write(self, entries: Entries) -> None:
        together([functools.partial(self._journal.note, entries), *([] if self._note is None else [self._note])])
        self._note = None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        pause = FIRST_SECONDS
        while not self._stop.wait(pause):
            pause = SYNC_SECONDS
            try:
                self.flush()
            except BaseException as error:
                self._error = error
                return
