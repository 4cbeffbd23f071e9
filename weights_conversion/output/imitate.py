"""The mode, owner, group and access lists of an OUT that was there: what takes its place has them too."""

from __future__ import annotations

import errno
import logging
import os
import stat

from weights_conversion.files import fileio
from weights_conversion.output import descriptors

logger = logging.getLogger(__name__)

_NO_LIST = (*fileio.UNSUPPORTED, errno.ENODATA, errno.ENOENT)  # the last: without /proc
REFUSED = (*fileio.UNSUPPORTED, errno.EPERM, errno.EACCES, errno.EDQUOT)  # EINVAL: an id of another namespace
_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def take_over(old: int, new: int) -> int | None:
    """Gives the finished folder `new` what `old` has (both are open).

    Its files and folders get no right that `old` does not give. Where the group may not be given away, or a list not
    be kept, the group gets no right at all: another would have it, or more of it (where there is a list, the mode's
    bits of the group are its mask). Returns the mode that is left to be set once `new` has been renamed, where its
    owner may not write in it, which a rename needs.
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
                if not _copy_list(name, old, descriptor):
                    logger.warning("the access list (%s) of the output's folder cannot be kept", name)
                    mode &= ~0o2070
        with descriptors.named_in(descriptor):
            _give(descriptor, wanted, mode | 0o700 if top else mode | 0o300, exact=top)
    return mode if mode & 0o700 != 0o700 else None


def _give(handle: int, wanted: os.stat_result, mode: int, exact: bool = False) -> None:
    """Owner and group of `wanted`; of the mode, exactly `mode`, or what it and the present one both allow."""
    here = os.fstat(handle)
    if (here.st_uid, here.st_gid) != (wanted.st_uid, wanted.st_gid):
        _change_owner(handle, wanted)
        now = os.fstat(handle)
        if now.st_gid != wanted.st_gid:
            mode &= ~0o2070
            if exact:
                logger.warning("group %d of the output's folder cannot be kept: no group may read it", wanted.st_gid)
        if exact and now.st_uid != wanted.st_uid:
            logger.warning("owner %d of the output's folder cannot be kept: it is %d's", wanted.st_uid, now.st_uid)
    has = stat.S_IMODE(here.st_mode)
    right = mode if exact else has & mode & 0o777 | mode & 0o2000
    if stat.S_IMODE(os.fstat(handle).st_mode) != right:
        try:
            os.fchmod(handle, right)
        except OSError as error:
            # A filesystem without modes shows one for all. Where only this cannot be set, it must not give more.
            if error.errno not in REFUSED or stat.S_IMODE(os.fstat(handle).st_mode) & ~right & 0o777:
                raise


def _change_owner(handle: int, wanted: os.stat_result) -> None:
    for owner in (wanted.st_uid, -1):
        try:
            os.fchown(handle, owner, wanted.st_gid)
            return
        except OSError as error:
            if error.errno not in REFUSED:
                raise


def copy_default_list(old: int, new: int) -> None:
    """What is made in `new` gets the access list that it would get in `old`, or none."""
    _copy_list(_DEFAULT, old, new)


def _copy_list(name: str, old: int, new: int) -> bool:
    """An access list, where the filesystem has them; `new` loses one that `old` has not.

    False where that is refused. Raises OSError where it has failed, or where it is not to be known what `old` has.
    """
    if not hasattr(os, "getxattr"):
        return True
    try:
        entries = os.getxattr(descriptors.path_of(old), name)  # which may be open for its names alone
    except OSError as error:
        if error.errno not in _NO_LIST:
            error.filename = descriptors.place_of(old)
            raise
        entries = None
    try:
        os.removexattr(new, name) if entries is None else os.setxattr(new, name, entries)
    except OSError as error:
        if error.errno in _NO_LIST and entries is None:
            return True
        if error.errno not in REFUSED:
            raise
        return entries is None and not _has_list(name, new)  # some servers refuse to remove what is not there
    return True


def _has_list(name: str, folder: int) -> bool:
    try:
        os.getxattr(folder, name)
    except OSError as error:
        if error.errno in _NO_LIST:
            return False
        raise
    return True
