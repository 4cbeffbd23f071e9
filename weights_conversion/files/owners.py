"""Whose a folder is that a checkpoint names: anyone may have made it again at that path since."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from weights_conversion.files import fileio


def stranger(path: Path) -> int | None:
    """The user id of somebody else who owns `path`, a file's folder, or a link there; None: the user's or root's.

    What is not there is nobody's, and what lies in a closed folder is that folder's owner's: it can be opened at any
    moment. Paths that a flag names are the user's own choice and need no such check. Raises OSError where whose it is
    cannot be known.
    """
    trusted = {os.geteuid(), 0}
    for each, followed in ((path, False), (path, True), (_folder(path), True)):
        found = _status(each, followed)
        if found is not None and found.st_uid not in trusted:
            return found.st_uid
    return None


def _folder(path: Path) -> Path:
    found = _status(path, True)
    return path if found is not None and stat.S_ISDIR(found.st_mode) else path.parent


def _status(path: Path, followed: bool) -> os.stat_result | None:
    """Of `path`, or of the nearest folder above it that can be looked at; None where nothing is there."""
    for each in (path, *path.absolute().parents):
        with contextlib.suppress(PermissionError):
            return fileio.status(each, followed)
    return None


def is_closed(path: Path) -> bool:
    """Whether `path` lies in a folder that this user may not enter, so that nobody knows what is there."""
    try:
        fileio.status(path)
    except PermissionError:
        return True
    return False
