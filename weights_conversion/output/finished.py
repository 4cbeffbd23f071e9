"""Which run wrote a finished OUT, so that the same command run again is known to be done already.

The note is an extended attribute of the folder, which is part of no listing and goes with every rename. Without such
attributes (or after a copy that drops them) nothing is known, and an OUT that is there is refused as any other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weights_conversion.files import fileio
from weights_conversion.output import descriptors

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NO_NOTE = (*fileio.UNSUPPORTED, errno.ENODATA, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)
_DEPTH = 8
_NAME = "user.weights_conversion.run"


def mark(folder: int, run_digest: str) -> None:
    """Notes in the finished `folder`, which is open, which run wrote it. Without effect where that is not to be had."""
    if hasattr(os, "setxattr"):
        note = f"{run_digest} {_state(folder)}".encode()
        with contextlib.suppress(OSError):  # all that is lost is that the same command, run again, is refused
            os.setxattr(folder, _NAME, note)


@dataclass(frozen=True)
class Note:
    """Which run wrote OUT, by its digest. Not `sure`: others may write in it, and so the note itself."""

    run_digest: str
    sure: bool


def read(out: Path) -> Note | None:
    """What OUT says of itself, where it is this user's and no file was changed, added or removed since; else None."""
    if not hasattr(os, "getxattr"):
        return None
    with contextlib.ExitStack() as opened:
        try:
            top = opened.enter_context(descriptors.folder(out))
            note = os.getxattr(top, _NAME)
        except OSError as error:
            if error.errno in _NO_NOTE:
                return None
            raise
        if os.fstat(top).st_uid != _me(out):
            return None
        try:
            run_digest, state = note.decode("ascii").split()
            return Note(run_digest, not open_to_others(top)) if state == _state(top) else None
        except ValueError:
            return None


def open_to_others(top: int) -> bool:
    """Whether others than its owner may write in it, or in a file or folder below."""
    with descriptors.named_in(top):
        own = os.fstat(top).st_mode
    modes = [own, *(status.st_mode for _, status in entries(top))]
    return any(mode & _OTHERS_WRITE and not stat.S_ISLNK(mode) for mode in modes)


def _me(out: Path) -> int:
    found = descriptors.who_am_i_unseen(out.absolute().parent)
    return os.geteuid() if found is None else found


def _state(top: int) -> str:
    """Changes with the names, types, owners, inodes, sizes and times of what is below; of folders names and owners."""
    digest = hashlib.sha256()
    for name, status in sorted(entries(top), key=lambda entry: entry[0]):
        kind = stat.S_IFMT(status.st_mode)
        numbers = (0, 0, 0) if stat.S_ISDIR(kind) else (status.st_size, status.st_mtime_ns, status.st_ino)
        digest.update(f"{name} {kind} {numbers} {status.st_uid}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def entries(top: int, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Relative name and status of everything below; no link is followed.

    Raises ValueError where folders are nested more deeply than in any output, as somebody may have made them.
    """
    if prefix.count("/") > _DEPTH:
        raise ValueError(f"{prefix} is nested too deeply")
    with descriptors.named_in(top):
        names = os.listdir(top)
    for name in names:
        with descriptors.named_in(top, name):
            status = os.stat(name, dir_fd=top, follow_symlinks=False)
        yield f"{prefix}{name}", status
        if stat.S_ISDIR(status.st_mode):
            with descriptors.folder(name, top) as inner:
                yield from entries(inner, f"{prefix}{name}/")
