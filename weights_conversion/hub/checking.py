"""Whether a file of the hub's cache holds the bytes that the hub states: their SHA-256, or git's blob id.

A file is read once, right after it was fetched and while the next one is fetched. That it was right is noted beside the
blobs, with all that a change of the file would change; a note that somebody else may have written is not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio

NOTES = ".checked"  # a folder of a repository's cache, which the client's own tools leave alone
_MAX_NOTE_BYTES = 4096
_READ_BYTES = 4 << 20
_STATED = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True)
class Cached:
    """A file of a snapshot. `stated` is its SHA-256 (64 hex digits) or git blob id (40); None: nothing says."""

    repository: str
    commit: str
    path: Path
    stated: str | None


def stated_by(path: Path, sha256: str | None, blob_id: str | None) -> str | None:
    """What is stated of the cached file `path`: by the listing, or by the name that the client gave its blob.

    The blob's name is the ETag of its download. It goes before the listing's `blob_id`, which is that of a pointer
    where a listing leaves LFS out.
    """
    name = path.resolve().name if fileio.is_link(path) else None
    of_blob = name if name and _STATED.fullmatch(name) else None
    if sha256:
        return sha256
    return of_blob if of_blob and (len(of_blob) == 64 or not blob_id) else blob_id


class Checker:
    """Checks files on a thread of its own, in the order in which they are added. Use it as a context.

    `again`: files that were found right earlier are read again.
    """

    def __init__(self, again: bool) -> None:
        self._again, self._stop = again, threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._found: list[Future[str | None]] = []

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def add(self, file: Cached) -> None:
        self._found.append(self._pool.submit(_check, file, self._again, self._stop))

    def finish(self) -> None:
        """Waits for all. Raises ConversionError, a sentence for each file that is not what was stated."""
        if problems := [problem for found in self._found if (problem := found.result())]:
            raise ConversionError(*problems)
        self._found.clear()


def check(file: Cached, again: bool = False) -> None:
    """One file, at once. Raises ConversionError where it is not what was stated."""
    if problem := _check(file, again, threading.Event()):
        raise ConversionError(problem)


def _check(file: Cached, again: bool, stop: threading.Event) -> str | None:
    if file.stated is None:
        return None
    before = _state(file.path)
    if not again and _noted(file) == before:
        return None
    found = _digest(file.path, file.stated, stop)
    if stop.is_set():
        return None
    if found == file.stated:
        if _state(file.path) == before:
            _note(file, before)
        return None
    kind = "the SHA-256" if len(file.stated) == 64 else "git's blob id"
    drop = shlex.join(["rm", str(file.path.resolve())])
    return (
        f"{file.path.name} of repository {file.repository} does not hold the bytes that the hub states: {kind} "
        f"{file.stated} was stated, {found} is that of the cached {file.path}; drop it with '{drop}' and run the same "
        "command again, and should it come again, ask who runs the proxy or mirror."
    )


def _digest(path: Path, stated: str, stop: threading.Event) -> str:
    """The sum of a file's bytes, of the kind that `stated` is of."""
    buffer = memoryview(bytearray(_READ_BYTES))
    with os.fdopen(fileio.open_descriptor(path, noted=False), "rb", buffering=0) as file, fileio.named("reading", path):
        if len(stated) == 64:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while (count := file.readinto(buffer)) and not stop.is_set():
            digest.update(buffer[:count])
    return digest.hexdigest()


# Notes


def _state(path: Path) -> dict[str, int]:
    """What every change of a file's bytes changes; the time of the last change cannot be set by hand."""
    status = path.stat()
    return {
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _folder(file: Cached, create: bool) -> int:
    """A descriptor of the folder of notes; OSError where there is none, or a link in its place."""
    folder = file.path.parents[2] / NOTES
    if create:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _noted(file: Cached) -> dict[str, int] | None:
    try:
        folder = _folder(file, create=False)
    except OSError:
        return None
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(str(file.stated), flags, dir_fd=folder), "rb") as note:
            if any(os.fstat(opened).st_uid not in (0, os.geteuid()) for opened in (folder, note.fileno())):
                return None
            return json.loads(note.read(_MAX_NOTE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(folder)


def _note(file: Cached, state: dict[str, int]) -> None:
    """Never the reason for a failure: without the note the file is read again the next time."""
    with contextlib.suppress(OSError):
        folder = _folder(file, create=True)
        try:
            fresh = f"{file.stated}.{os.getpid()}.{threading.get_ident()}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(fresh, flags, 0o600, dir_fd=folder), "wb") as note:
                note.write(json.dumps(state).encode())
            os.replace(fresh, str(file.stated), src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)
