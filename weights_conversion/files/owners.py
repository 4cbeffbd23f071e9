"""Whose a folder is that a checkpoint names: anyone may have made it again at that path since."""

from __future__ import annotations

import os
from pathlib import Path


def stranger(path: Path) -> int | None:
    """The user id of somebody else who owns `path`, a file's folder, or a link there; None: the user's or root's.

    What is not there is nobody's. Paths that a flag names are the user's own choice and need no such check.
    """
    trusted = {os.geteuid(), 0}
    for look, each in ((os.lstat, path), (os.stat, path), (os.stat, path if path.is_dir() else path.parent)):
        try:
            owner = look(each).st_uid
        except (OSError, ValueError):
            continue
        if owner not in trusted:
            return owner
    return None
