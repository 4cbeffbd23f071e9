"""POSIX access lists, as the extended attributes system.posix_acl_access and _default hold them."""

from __future__ import annotations

import struct

OWNER, USER, ITS_GROUP, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20  # acl_tag of linux/posix_acl.h
NOBODY = 0xFFFFFFFF  # the id in an entry that names none


def access_list(*entries: tuple[int, int, int]) -> bytes:
    """system.posix_acl_* as linux/posix_acl_xattr.h has it: version 2, then (tag, permission bits, id) of each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
