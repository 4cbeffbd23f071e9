"""The mode, owner, group and access lists of an OUT that was there: what takes its place has them too."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from pathlib import Path

from weights_conversion.files import fileio
from weights_conversion.output import descriptors

logger = logging.getLogger(__name__)

_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def take_over(old: int, new: int) -> int | None:
    """Gives the finished folder `new` what `old` has (both are open).

    Its files and folders get no right that `old` does not give. Where the group may not be given away, it gets no
    right at all: another group would have it. Returns the mode that is left to be set once `new` has been renamed,
    where its owner may not write in it, which a rename needs.
    """
    wanted = os.stat(old)
    mode = stat.S_IMODE(wanted.st_mode)
    for folder, files, descriptor in descriptors.walk(new):
        for name in files:
            with descriptors.named_in(descriptor):
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
            try:
                with descriptors.named_in(handle):
                    _give(handle, wanted, mode & 0o777)
            finally:
                fileio.close_quietly(handle)
        top = folder == "."
        if top:
            for name in (_ACCESS, _DEFAULT):
                _copy_list(name, old, descriptor)
        with descriptors.named_in(descriptor):
            _give(descriptor, wanted, mode | 0o700 if top else mode | 0o300, exact=top)
    return mode if mode & 0o700 != 0o700 else None


def _give(handle: int, wanted: os.stat_result, mode: int, exact: bool = False) -> None:
    """Owner and group of `wanted`; of the mode, exactly `mode`, or what it and the present one both allow."""
    here = os.fstat(handle)
    if (here.st_uid, here.st_gid) != (wanted.st_uid, wanted.st_gid):
        _change_owner(handle, here, wanted)
        now = os.fstat(handle)
        if now.st_gid != wanted.st_gid:
            mode &= ~0o2070
            if exact:
                logger.warning("group %d of the output's folder cannot be kept: no group may read it", wanted.st_gid)
    has = stat.S_IMODE(here.st_mode)
    right = mode if exact else has & mode & 0o777 | mode & 0o2000
    if stat.S_IMODE(os.fstat(handle).st_mode) != right:
        with contextlib.suppress(PermissionError):  # a filesystem without modes
            os.fchmod(handle, right)


def _change_owner(handle: int, here: os.stat_result, wanted: os.stat_result) -> None:
    for owner in (wanted.st_uid, -1):
        with contextlib.suppress(OSError):
            os.fchown(handle, owner, wanted.st_gid)
            return


def copy_default_list(old: int | Path, new: int) -> None:
    """What is made in `new` gets the access list that it would get in `old`, or none."""
    _copy_list(_DEFAULT, old, new)


def _copy_list(name: str, old: int | Path, new: int) -> None:
    """An access list, where the filesystem has them; `new` loses one that `old` has not."""
    with contextlib.suppress(OSError, AttributeError):
        try:
            entries = os.getxattr(old, name)
        except OSError as error:
            if error.errno == errno.ENODATA:
                os.removexattr(new, name)
            raise
        os.setxattr(new, name, entries)
