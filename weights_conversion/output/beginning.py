"""How a process comes to hold OUT.partial: its lock is taken, and what is there is continued or starts over."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.output import descriptors, imitate, locks, ownership, place
from weights_conversion.output.partial import Partial

logger = logging.getLogger(__name__)

_ATTEMPTS = 500  # to open what another process may be removing at this moment


def prepare(out: Path, run_digest: str, overwrite: bool = False) -> Partial:
    """OUT.partial, ready for this process alone."""
    partial = Partial(out)
    try:
        with descriptors.shown_as("preparing", partial.path):
            _hold(partial)
            _choose(partial, run_digest, overwrite)
    except BaseException:
        partial.close()
        raise
    return partial


def clear_away(out: Path, run_digest: str) -> None:
    """Removes what is left of OUT.partial once OUT is the finished output of `run_digest`, as far as that can be done
    at this moment."""
    if not os.path.lexists(place.partial_folder(out)):
        return
    with Partial(out) as left, contextlib.suppress(ConversionError, OSError):
        _hold(left)
        if left.may_go(run_digest):
            left.remove()


def join(out: Path, run_digest: str) -> Partial:
    """Another rank's hold on what rank 0 has prepared; OSError while it is not to be seen, or is another run's."""
    partial = Partial(out)
    try:
        partial.parent = descriptors.open_place(out.absolute().parent)
        partial.enter()
        partial.lock = descriptors.open_regular(locks.NAME, partial.top, os.O_RDWR)
        if not locks.take(partial.lock, fcntl.LOCK_SH):
            partial.close("lock")
        elif not descriptors.is_at(locks.NAME, partial.top, partial.lock):
            raise FileNotFoundError(errno.ENOENT, "has been replaced", str(partial.path / locks.NAME))
        partial.complete = partial.is_published()
        partial.open_folders()  # before the digest is read: what is opened later can only be a newer run's
        note = descriptors.read_note(partial.journal, "digest", 1000)
        if note != run_digest.encode():
            raise FileNotFoundError(errno.ENOENT, "belongs to another run", str(partial.path))
    except BaseException:
        partial.close()
        raise
    return partial


def _hold(partial: Partial) -> None:
    """Opens OUT.partial, makes it where it is missing, and takes its lock. Nothing in it is touched before."""
    above = partial.out.absolute().parent
    above.mkdir(parents=True, exist_ok=True)
    partial.parent = descriptors.open_place(above)
    for attempt in range(_ATTEMPTS + 1):
        try:
            _open_top(partial)
            lock = locks.take_alone(partial.top, partial.path)
        except FileNotFoundError:  # another process has just finished and removed the folder
            lock = None
        if lock is not None:
            partial.lock = lock
            if descriptors.is_at(partial.path.name, partial.parent, partial.top):
                break
        partial.close("lock", "top")
        if attempt == _ATTEMPTS or not descriptors.is_place(above, partial.parent):
            raise ConversionError(f"{partial.path} is removed or renamed again and again; name another place for OUT")
        time.sleep(0.01)
    place.check_partial(partial.path, partial.top)


def _open_top(partial: Partial) -> None:
    place.check_partial(partial.path)
    with contextlib.suppress(FileExistsError):
        os.mkdir(partial.path.name, 0o700, dir_fd=partial.parent)
    partial.enter()
    # It may be older than its parent's list, or made by somebody with a list of its own.
    imitate.copy_default_list(partial.parent, partial.top)
    here = os.fstat(partial.top)
    if here.st_mode & 0o077:
        try:
            os.fchmod(partial.top, stat.S_IMODE(here.st_mode) & ~0o077)
        except OSError as error:
            if error.errno not in imitate.REFUSED:
                raise
        # Unless this filesystem has no modes, others could write into it until now, or hold the lock for ever.
        partial.was_open = not os.fstat(partial.top).st_mode & 0o077
        if partial.was_open:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(locks.NAME, dir_fd=partial.top)


def _choose(partial: Partial, run_digest: str, overwrite: bool) -> None:
    """Continues what is there, or starts over; OUT is looked at again. What was waited for may have written it."""
    _bring_back(partial)
    _drop_replaced(partial, overwrite)
    same = not partial.was_open and partial.digest() == run_digest
    if not partial.was_open and partial.is_published() and not overwrite:
        if not same:
            partial.remove()
            raise ConversionError(
                f"{partial.out} exists and is complete; --overwrite replaces it, or name another folder"
            )
        partial.resume = partial.complete = True
    else:
        _check_out(partial, overwrite)
        partial.resume = same and _can_continue(partial)
        if not partial.resume:
            start_over(partial, "may hold what stood at OUT before" if same else None)
    partial.open_folders()


def _bring_back(partial: Partial) -> None:
    """An earlier --overwrite was killed between its two renames."""
    with contextlib.suppress(FileNotFoundError):
        found = os.stat("replaced", dir_fd=partial.top, follow_symlinks=False)
        if partial.status_of_out() is None and found.st_uid == partial.me:
            os.rename("replaced", partial.out.name, src_dir_fd=partial.top, dst_dir_fd=partial.parent)


def _drop_replaced(partial: Partial, overwrite: bool) -> None:
    """What was taken away is not needed once OUT is there, if the note says that OUT is what replaced it."""
    if partial.status_of_out() is None or "replaced" not in os.listdir(partial.top):
        return
    if partial.was_open or not partial.is_published():
        raise ConversionError(
            f"{partial.path / 'replaced'} holds what an interrupted --overwrite took away; move it back or elsewhere"
        )
    if overwrite:
        descriptors.remove_tree("replaced", partial.top)


def _check_out(partial: Partial, overwrite: bool) -> None:
    found = partial.status_of_out()
    if found is None:
        return
    if ownership.output_in(partial.out).files and not overwrite:
        if set(os.listdir(partial.top)) <= {locks.NAME}:
            partial.remove()
        raise ConversionError(f"another run has just finished {partial.out}; name another folder")
    place.replaceable(partial.out, overwrite)
    if not place.may_replace(found.st_uid, partial.me):
        raise place.not_mine(partial.out)


def _can_continue(partial: Partial) -> bool:
    try:
        found = os.stat("checkpoint", dir_fd=partial.top, follow_symlinks=False)
    except FileNotFoundError:
        return False
    note = place.publishing(partial.top)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == partial.me and note in (None, (found.st_ino, found.st_uid))


def start_over(partial: Partial, why: str | None = None) -> None:
    """New folders, in place of all that is left. `why`: though the same run has left it."""
    if partial.digest() is not None:
        if partial.was_open:
            why = "was open to other users"
        why = why or "was left by a run with another source, option or release"
        logger.warning("%s %s: starting over", partial.path, why)
    with contextlib.suppress(FileNotFoundError), descriptors.folder("journal", partial.top) as journal:
        os.unlink("digest", dir_fd=journal)  # first: from here on, nothing that is left can be continued
    for name in ("checkpoint", "journal"):
        descriptors.remove_tree(name, partial.top)
    os.mkdir("journal", 0o700, dir_fd=partial.top)
    os.mkdir("checkpoint", dir_fd=partial.top)
    partial.resume = False
    with (
        contextlib.suppress(*fileio.ABSENT),
        descriptors.folder(partial.out.name, partial.parent) as old,
        descriptors.folder("checkpoint", partial.top) as new,
    ):
        imitate.copy_default_list(old, new)
