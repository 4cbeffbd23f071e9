"""Which run wrote a finished OUT, so that the same command run again is known to be done already.

The note is an extended attribute of the folder, which is part of no listing and goes with every rename. Without such
attributes (or after a copy that drops them) nothing is known, and an OUT that is there is refused as any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from weights_conversion.output import descriptors

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NAME = "user.weights_conversion.run"


def mark(folder: int, run_digest: str) -> None:
    """Notes in the finished `folder`, which is open, which run wrote it. Without effect where that is not to be had."""
    if hasattr(os, "setxattr"):
        with contextlib.suppress(OSError, ValueError):
            os.setxattr(folder, _NAME, f"{run_digest} {_state(folder)}".encode())


def is_noted(out: Path) -> bool:
    """Whether OUT is as a run that is known has left it."""
    return _run_of(out) is not None


def is_of(out: Path, run_digest: str) -> bool:
    """Whether OUT is the whole output of that very run, and no file of it was changed, added or removed since."""
    return _run_of(out) == run_digest


def _run_of(out: Path) -> str | None:
    if not hasattr(os, "getxattr"):
        return None
    try:
        with descriptors.folder(out) as top:
            status = os.fstat(top)
            # Who may write in it can note there what he likes, and change what the note is of.
            if status.st_uid != _me(out) or status.st_mode & _OTHERS_WRITE:
                return None
            run_digest, state = os.getxattr(top, _NAME).decode("ascii").split()
            return run_digest if state == _state(top) else None
    except (OSError, ValueError):
        return None


def _me(out: Path) -> int:
    found = descriptors.who_am_i_unseen(out.absolute().parent)
    return os.geteuid() if found is None else found


def _state(top: int) -> str:
    digest = hashlib.sha256()
    for entry in sorted(_entries(top, "")):
        digest.update(f"{entry}\n".encode())
    return digest.hexdigest()


def _entries(top: int, prefix: str) -> Iterator[tuple[str, int, int, int, int]]:
    """Name and type, size, time, inode and owner of everything below; of a folder the name and owner.

    Raises ValueError where something may be written by others than its owner: then its bytes may be anybody's.
    """
    for name in os.listdir(top):
        status = os.stat(name, dir_fd=top, follow_symlinks=False)
        if status.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(status.st_mode):
            raise ValueError(f"{prefix}{name} may be written by others")
        if stat.S_ISDIR(status.st_mode):
            yield f"{prefix}{name}/", 0, 0, 0, status.st_uid
            with descriptors.folder(name, top) as inner:
                yield from _entries(inner, f"{prefix}{name}/")
        else:
            kind = stat.S_IFMT(status.st_mode)
            yield f"{prefix}{name} {kind}", status.st_size, status.st_mtime_ns, status.st_ino, status.st_uid
