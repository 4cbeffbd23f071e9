"""Who may do what with a folder: its mode, owner, group and access lists, and whether another has as much or less."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.access_lists import ITS_GROUP, MASK, NOBODY, OTHER, OWNER, USER, access_list

_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
STRANGER, ITS_MEMBERS = 2001, 4242  # a user and a group that are not the test's
WARNING = "cannot be kept"
SHARED = access_list(
    (OWNER, 7, NOBODY), (USER, 5, STRANGER), (ITS_GROUP, 0, NOBODY), (MASK, 5, NOBODY), (OTHER, 0, NOBODY)
)


@dataclass(frozen=True)
class Access:
    """What counts for who may read and write a folder, and what will be made in it."""

    mode: int
    owner: int
    group: int
    list: bytes | None  # of an access list
    inherited: bytes | None  # of the list that new files get

    @classmethod
    def of(cls, folder: Path) -> Access:
        found = folder.stat()
        lists = _attribute(folder, _ACCESS), _attribute(folder, _DEFAULT)
        return cls(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, *lists)

    def __str__(self) -> str:
        may = ", ".join(f"{what} {who}: {bits:o}" for (what, who), bits in sorted(self.rights().items()))
        inherited = "" if self.inherited is None else ", and a list that new files get"
        return f"mode {self.mode:o} of {self.owner}:{self.group} ({may}{inherited})"

    def rights(self) -> Mapping[tuple[str, int], int]:
        """By user or group, what they may do, as bits of a mode."""
        if self.list is None:
            modes = (("user", self.owner, 6), ("group", self.group, 3), ("other", 0, 0))
            return {(what, who): self.mode >> shift & 7 for what, who, shift in modes}
        entries = list(struct.iter_unpack("<HHI", self.list[4:]))
        mask = next((may for tag, may, _ in entries if tag == MASK), 7)
        names = {OWNER: ("user", self.owner), ITS_GROUP: ("group", self.group), OTHER: ("other", 0)}
        found = {}
        for tag, may, who in entries:
            if tag != MASK:
                name = names.get(tag) or ("user" if tag == USER else "group", who)
                found[name] = may if tag in (OWNER, OTHER) else may & mask
        return found

    def gives_no_more_than(self, other: Access) -> bool:
        theirs = other.rights()
        return all(not may & ~theirs.get(who, theirs["other", 0]) for who, may in self.rights().items())


def dress(folder: Path) -> None:
    """Makes an output one that has been shared: with a group, a further user, and what is made in it too."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 0, ITS_MEMBERS)
    folder.chmod(0o750)
    for name in (_ACCESS, _DEFAULT):
        with contextlib.suppress(OSError):  # a filesystem without lists
            os.setxattr(folder, name, SHARED)


def taken_over(old: Access, new: Access, text: str, failed: bool) -> str | None:
    """What is wrong with the access to an OUT that has replaced one. `failed`: a call has, and less may be there."""
    if new == old:
        return None
    if not new.gives_no_more_than(old):
        return f"OUT gives rights that what it replaces did not: {new}, before {old}"
    if failed and WARNING in text:
        return None
    return f"OUT has lost rights, and nothing says so: {new}, before {old}"


def _attribute(folder: Path, name: str) -> bytes | None:
    with contextlib.suppress(OSError):
        return os.getxattr(folder, name)
    return None
