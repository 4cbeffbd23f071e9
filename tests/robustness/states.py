"""The digest of all that a run has left on the disk, on which alone depends how the same command goes on.

Runs start from the same source (which is looked at after each), the same command and the same code. Equal states are so
equal starts, and one rerun tells for all of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from weights_conversion.output import descriptors, finished

_PUBLISHING = "out.partial/journal/publishing"  # names the inode of what becomes OUT
_DIGEST = "out.partial/journal/digest"


def digest(place: Path, of_any_run: bool = False) -> str:
    """SHA-256 over names, types, modes, owners, access lists, contents, links and notes; inodes as the names that they
    have.

    Times do not count: no run looks at those of its own files, but for the note of a finished OUT, which is compared.
    `of_any_run`: nor does by which digest a run knows its own; for runs that had the same source in other files.
    """
    found = hashlib.sha256()
    entries = dict(_entries(str(place), ""))
    inodes = {status.st_ino: name for name, status in entries.items() if stat.S_ISDIR(status.st_mode)}
    for name, status in entries.items():
        path = place / name
        content, note = b"", "" if stat.S_ISLNK(status.st_mode) else _note(path)
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
            if name == _PUBLISHING:
                content = _by_name(content, inodes)
            elif name.startswith("out.partial/journal/chunks."):  # read as a set of lines, each with a sum of its own
                content = b"\n".join(sorted(content.split(b"\n")))
            elif of_any_run and name == _DIGEST:
                content = re.sub(rb"[0-9a-f]", b"x", content)
        elif stat.S_ISDIR(status.st_mode):
            note = re.sub(r"[0-9a-f]{64}", "run", note) if of_any_run else note
        else:
            content = os.fsencode(os.readlink(path))
        found.update(f"{name} {status.st_mode:o} {status.st_uid} {status.st_gid} {note} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def _entries(top: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(top) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        yield prefix + entry.name, status
        if stat.S_ISDIR(status.st_mode):
            yield from _entries(entry.path, f"{prefix}{entry.name}/")


def _by_name(content: bytes, inodes: dict[int, str]) -> bytes:
    words = content.split()
    if len(words) != 2 or not words[0].isdigit():
        return content
    return os.fsencode(inodes.get(int(words[0]), "none")) + b" " + words[1]


def _note(path: Path) -> str:
    """Access lists, and of a folder's note that a run wrote it, by which, and whether nothing has changed since."""
    notes = []
    for name in sorted(os.listxattr(path)):
        value = os.getxattr(path, name).decode(errors="backslashreplace")
        if name == finished._NAME and len(value.split()) == 2:
            run, state = value.split()
            with descriptors.folder(path) as top:
                value = f"{run} {state == finished._state(top)}"
        notes.append(f"{name}={value}")
    return " ".join(notes)
