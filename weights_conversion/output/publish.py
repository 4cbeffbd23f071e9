"""The renames that put a finished output in its place, and what stood there out of it."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.output import descriptors, imitate, ownership, place

if TYPE_CHECKING:
    from weights_conversion.output.partial import Partial


# EXDEV: folders of an overlay's lower layer. EPERM, EACCES: before anything has moved, as by a sandbox that does not
# know the call; where it is the folders that are closed, two renames are refused too.
_NO_EXCHANGE = (*fileio.UNSUPPORTED, errno.EXDEV, errno.EPERM, errno.EACCES)


def publish(partial: Partial, overwrite: bool) -> None:
    """Makes OUT of the finished `checkpoint`; in place of an earlier output, which is then in OUT.partial."""
    out = partial.out
    old, mode = _what_is_there(partial), None
    if old is not None and not place.may_replace(old.st_uid, partial.me):
        raise place.not_mine(out)
    found = ownership.output_in(out)
    if found.foreign or (found.files and not overwrite):
        raise _meanwhile(partial)
    if old is not None:
        with descriptors.folder(out.name, partial.parent) as there:
            mode = imitate.take_over(there, partial.checkpoint)
    note(partial)
    if not found.files:
        try:
            _rename(partial, "checkpoint", out.name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            found = ownership.output_in(out)
            if found.foreign or not overwrite:
                raise _meanwhile(partial) from error
            _replace(partial)
    else:
        _replace(partial)
    if not descriptors.is_at(out.name, partial.parent, partial.checkpoint):
        raise ConversionError(f"{out} was taken by another process in the moment in which it was written; look at it")
    if mode is not None:
        os.fchmod(partial.checkpoint, mode)
    descriptors.sync_folder(".", partial.parent)  # not by its path, on which there may be links


def note(partial: Partial) -> None:
    """Writes by what OUT is known again, should the clean-up be interrupted; again only where that has changed."""
    with descriptors.shown_as("looking at", partial.shown):
        finished = os.fstat(partial.checkpoint)
    if partial.noted != (known := (finished.st_ino, finished.st_uid)):
        descriptors.write_note(partial.journal, "publishing", f"{known[0]} {known[1]}".encode())
        partial.noted = known


def _what_is_there(partial: Partial) -> os.stat_result | None:
    found = partial.status_of_out()
    if found is None:
        return None
    if not stat.S_ISDIR(found.st_mode):
        raise _meanwhile(partial)
    return found


def _meanwhile(partial: Partial) -> ConversionError:
    holds = ", ".join(os.listdir(partial.out)[:8]) if fileio.is_folder(partial.out) else "it is no folder"
    return ConversionError(
        f"{partial.out} has appeared or changed in the meantime, and holds other files ({holds}); {partial.shown} "
        "holds the finished output: move one of them away"
    )


def _rename(partial: Partial, inner: str, name: str) -> None:
    os.rename(inner, name, src_dir_fd=partial.top, dst_dir_fd=partial.parent)


def _take_away(partial: Partial, name: str, inner: str) -> None:
    os.rename(name, inner, src_dir_fd=partial.parent, dst_dir_fd=partial.top)


def _replace(partial: Partial) -> None:
    """Puts the finished output in place of an earlier one; what has come to that meanwhile stays where it was."""
    name = partial.out.name
    exchanged = exchange(partial.top, "checkpoint", partial.parent, name)
    if not exchanged:
        try:
            _take_away(partial, name, "replaced")
            _rename(partial, "checkpoint", name)
        except BaseException as error:  # a signal too: what a user may remove now is the only one that there is
            _put_back(partial, error)
            raise
    with descriptors.folder("checkpoint" if exchanged else "replaced", partial.top) as old:
        foreign = ownership.output_in(old).foreign  # written into it between the look and the renames
    if not foreign:
        return
    if not exchanged:
        _take_away(partial, name, "checkpoint")
        _rename(partial, "replaced", name)
    elif not exchange(partial.top, "checkpoint", partial.parent, name):
        raise ConversionError(
            f"{partial.shown} is what stood at {partial.out}, and has got other files in the meantime; look at it"
        )
    raise _meanwhile(partial)


def _put_back(partial: Partial, cause: BaseException) -> None:
    """What was taken away, where the new output could not be put in its place because of `cause`."""
    try:
        if partial.status_of_out() is None:
            _rename(partial, "replaced", partial.out.name)
    except OSError as error:
        why = fileio.failed(cause) if isinstance(cause, OSError) else "interrupted"
        raise ConversionError(
            f"{partial.out} could not be replaced ({why}) nor put back: what was there is in "
            f"{partial.path / 'replaced'} now; the same command with --overwrite goes on, or move it back with mv"
        ) from error


def exchange(one: int, inner: str, two: int, name: str) -> bool:
    """Swaps two folders in one step, so that OUT is there at every moment. False where that is not known.

    Raises OSError where it has failed: whether they were swapped is not to be guessed then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    swap = ctypes.c_uint(2)  # RENAME_EXCHANGE
    if libc.renameat2(ctypes.c_int(one), os.fsencode(inner), ctypes.c_int(two), os.fsencode(name), swap) == 0:
        return True
    if (code := ctypes.get_errno()) not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code))
    return False


def set_aside(partial: Partial) -> Path:
    """Renames what has failed its proof to OUT.unverified. Where a foreign one has come meanwhile, it stays."""
    aside = place.unverified_folder(partial.out)
    try:
        place.check_unverified(partial.out)
        if fileio.exists(aside) and not place.may_replace(aside.lstat().st_uid, partial.me):
            return partial.shown
    except ConversionError:
        return partial.shown
    if fileio.is_folder(partial.out) and not partial.complete:
        with descriptors.folder(partial.out.name, partial.parent) as there:
            imitate.take_over(there, partial.checkpoint)
    descriptors.remove_tree(aside.name, partial.parent)
    if partial.complete:
        os.rename(partial.out.name, aside.name, src_dir_fd=partial.parent, dst_dir_fd=partial.parent)
    else:
        _rename(partial, "checkpoint", aside.name)
    return aside
