"""Copies of what a run has left, so that a state is made once and put back before each point.

A copy has the modes, owners, access lists and times of what it is a copy of, and other inodes. What names inodes (the
note by which OUT is known again, and the attribute of a finished OUT) then names those of the copy.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from weights_conversion.output import descriptors, finished

NAMES = ("out", "out.partial")
_PUBLISHING = "journal/publishing"


def keep(place: Path, kept: Path) -> None:
    """Moves what stands at OUT and OUT.partial into `kept`: no inode changes."""
    kept.mkdir(parents=True)
    for name in NAMES:
        if (place / name).exists():
            (place / name).rename(kept / name)


def put_back(kept: Path, place: Path) -> None:
    """Copies what was kept."""
    inodes: dict[int, int] = {}
    for name in NAMES:
        if (kept / name).exists():
            inodes |= copy(kept / name, place / name)
    note = place / NAMES[1] / _PUBLISHING
    if note.exists():
        inode, owner = note.read_text().split()
        note.write_text(f"{inodes.get(int(inode), 0)} {owner}")


def copy(source: Path, target: Path) -> dict[int, int]:
    """A folder and all below it; which folder's inode has become which."""
    target.mkdir()
    inodes: dict[int, int] = {}
    for entry in os.scandir(source):
        if entry.is_dir(follow_symlinks=False):
            inodes |= copy(Path(entry.path), target / entry.name)
        else:
            shutil.copyfile(entry.path, target / entry.name, follow_symlinks=False)
            _like(Path(entry.path), target / entry.name)
    _like(source, target)
    return inodes | {source.stat().st_ino: target.stat().st_ino}


def _like(source: Path, target: Path) -> None:
    """Owner, attributes, mode and times, in the order in which none undoes another."""
    found = source.stat()
    if found.st_gid != (here := target.stat()).st_gid or found.st_uid != here.st_uid:
        os.chown(target, found.st_uid, found.st_gid)
    for name in set(os.listxattr(target)) - set(os.listxattr(source)):  # a list that its folder has given it
        os.removexattr(target, name)
    for name in os.listxattr(source):
        value = os.getxattr(source, name)
        os.setxattr(target, name, _marked(source, target, value) if name == finished._NAME else value)
    target.chmod(found.st_mode & 0o7777)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _marked(source: Path, target: Path, value: bytes) -> bytes:
    """The attribute of a finished OUT, for its copy; one that is untrue of the OUT stays untrue."""
    run_digest, state = value.decode().split()
    with descriptors.folder(source) as old, descriptors.folder(target) as new:
        if state != finished._state(old):
            return value
        return f"{run_digest} {finished._state(new)}".encode()
