"""Whether the files that a conversion reads stand still while it reads them.

Every source file is noted as it is opened, compared wherever it is opened again, and once more before the output is
published: half of one model and half of another would be no model. Not by device: a job may be continued elsewhere.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from weights_conversion.errors import ConversionError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Stamp:
    """What changes when a file's bytes do: its inode, size in bytes, and times in nanoseconds."""

    inode: int
    size: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def change(self, now: Stamp) -> str | None:
        """In words what `now` differs in, which is of the same path; None: in nothing."""
        if now == self:
            return None
        if now.inode != self.inode:
            return "another file has taken its place"
        if now.size != self.size:
            return f"it had {self.size} bytes and has {now.size}"
        return "it was written to" if now.mtime != self.mtime else "its inode was changed (written to, linked or chmod)"


class Watch:
    """The stamp of every file noted, by path. May be used from several threads.

    `outcome` is what the sentence says of the run that a change ends.
    """

    def __init__(self, outcome: str = "nothing was published") -> None:
        self.outcome = outcome
        self._seen: dict[str, Stamp] = {}
        self._lock = threading.Lock()

    def note(self, path: str | Path, status: os.stat_result) -> None:
        """Notes a file that has just been opened. Raises ConversionError where it is not what it was before."""
        now = Stamp.of(status)
        with self._lock:
            before = self._seen.setdefault(str(path), now)
        if change := before.change(now):
            raise self._changed([(str(path), change)])

    def paths(self) -> list[str]:
        """What has been opened up to now."""
        with self._lock:
            return list(self._seen)

    def check(self) -> None:
        """Raises ConversionError where a noted file is not what it was when it was opened."""
        changes, cause = [], None
        for path, before in list(self._seen.items()):
            try:
                change = before.change(Stamp.of(os.stat(path)))
            except OSError as error:
                change, cause = f"it is gone ({error.strerror})", error
            if change:
                changes.append((path, change))
        if changes:
            raise self._changed(changes) from cause

    def _changed(self, changes: list[tuple[str, str]]) -> ConversionError:
        path, change = changes[0]
        more = f" (as have {len(changes) - 1} more files)" if len(changes) > 1 else ""
        return ConversionError(
            f"{path} has changed while it was read: {change}{more}; {self.outcome}. Wait until nothing writes the "
            "source any more, or copy it, and run the same command again"
        )


_current: ContextVar[Watch | None] = ContextVar("watch", default=None)


def current() -> Watch | None:
    """The watch of this run, to be taken along by threads of its own; None outside of a run."""
    return _current.get()


def opened_files() -> list[str]:
    """What this run has opened up to now."""
    watch = current()
    return [] if watch is None else watch.paths()


@contextmanager
def watching(watch: Watch | None = None) -> Iterator[Watch]:
    """Within the block, what this thread opens by fileio is noted in `watch`, or in a new one."""
    token = _current.set(watch := watch or Watch())
    try:
        yield watch
    finally:
        _current.reset(token)


def watched(function: Callable[P, R]) -> Callable[P, R]:
    """The function under a watch of its own, for `run` to check. It does not check by itself."""

    @functools.wraps(function)
    def under_watch(*args: P.args, **kwargs: P.kwargs) -> R:
        with watching():
            return function(*args, **kwargs)

    return under_watch
