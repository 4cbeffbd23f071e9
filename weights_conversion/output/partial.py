"""OUT appears complete or not at all: it is put together in OUT.partial, which one job holds, and renamed.

    OUT.partial/checkpoint/   the output as it will be
    OUT.partial/journal/      what of it is known to be good: a plan digest, and the chunks that are done
    OUT.partial/lock          held by the job that writes: by its one process alone, or shared by its ranks
    OUT.partial/replaced/     what --overwrite has taken away, where the filesystem cannot exchange two folders at once

The last step renames `checkpoint` to OUT. A run with the same plan continues from the journal; any other starts over.
Others may write in the folder that OUT stands in. So OUT.partial is of mode 0700, only one that belongs to this user is
used, and everything in it is reached through descriptors that are held, whatever comes to its names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from pathlib import Path
from types import TracebackType

from weights_conversion.errors import ConversionError
from weights_conversion.output import descriptors, finished, imitate, locks, ownership, place, publish

logger = logging.getLogger(__name__)

_ATTEMPTS = 500  # to open what another process may be removing at this moment
_HELD = ("checkpoint", "journal", "lock", "top", "parent")


class Partial:
    """OUT.partial in the hands of one process, which closes it at the end; made by `prepare` or `join`.

    Descriptors, -1 where not open: `parent` (the folder that OUT stands in), `top` (OUT.partial), `lock`, `journal`,
    and `checkpoint`, whose files are written. A run that starts over makes new folders: what a process of an earlier
    run opens through its own is never a file of the new run, even where the filesystem has no locks.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, place.partial_folder(out)
        self.checkpoint = self.journal = self.lock = self.top = self.parent = -1
        self.me = -1
        self.resume = False  # an earlier run of the same plan can be continued
        self.published = False  # this process has renamed it to OUT
        self.complete = False  # OUT is that run's finished output; only its clean-up is left
        self._was_open = False  # to others, so that nothing in it is to be trusted

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self, *names: str) -> None:
        for name in names or _HELD:
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    @property
    def shown(self) -> Path:
        """Where the files of `checkpoint` are seen, for messages and for those who only read."""
        return self.out if self.complete else self.path / "checkpoint"

    @property
    def notes(self) -> Path:
        return self.path / "journal"

    def share(self) -> None:
        locks.share(self.lock)

    # --- beginning ----------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Opens OUT.partial, makes it where it is missing, and takes its lock. Nothing in it is touched before."""
        above = self.out.absolute().parent
        above.mkdir(parents=True, exist_ok=True)
        self.parent = descriptors.open_place(above)
        for attempt in range(_ATTEMPTS + 1):
            try:
                self._open_top()
                lock = locks.take_alone(self.top, self.path)
            except FileNotFoundError:  # another process has just finished and removed the folder
                lock = None
            if lock is not None:
                self.lock = lock
                if descriptors.is_at(self.path.name, self.parent, self.top):
                    break
            self.close("lock", "top")
            if attempt == _ATTEMPTS or not descriptors.is_place(above, self.parent):
                raise ConversionError(f"{self.path} is removed or renamed again and again; name another place for OUT")
            time.sleep(0.01)
        place.check_partial(self.path, self.top)

    def _open_top(self) -> None:
        place.check_partial(self.path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path.name, 0o700, dir_fd=self.parent)
        self.enter()
        here = os.fstat(self.top)
        if here.st_mode & 0o077:
            with contextlib.suppress(OSError):
                os.fchmod(self.top, stat.S_IMODE(here.st_mode) & ~0o077)
            # Unless this filesystem has no modes, others could write into it until now, or hold the lock for ever.
            self._was_open = not os.fstat(self.top).st_mode & 0o077
            if self._was_open:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(locks.NAME, dir_fd=self.top)

    def enter(self) -> None:
        """Opens the OUT.partial that is there, and makes sure that it is one's own."""
        try:
            self.top = descriptors.open_folder(self.path.name, self.parent)
            place.check_partial(self.path, self.top)
            self.me = descriptors.who_am_i(self.top)
        except NotADirectoryError as error:
            raise ConversionError(f"{self.path} is not a folder that this converter left; move it away") from error
        except PermissionError as error:
            raise place.not_mine(self.path) from error
        if os.fstat(self.top).st_uid != self.me:
            raise place.not_mine(self.path)

    def choose(self, run_digest: str, overwrite: bool) -> None:
        """Continues what is there, or starts over; OUT is looked at again. What was waited for may have written it."""
        self._bring_back()
        self._drop_replaced(overwrite)
        same = not self._was_open and self._digest() == run_digest
        if not self._was_open and self.is_published() and not overwrite:
            if not same:
                self.remove()
                raise ConversionError(
                    f"{self.out} exists and is complete; --overwrite replaces it, or name another folder"
                )
            self.resume = self.complete = True
        else:
            self._check_out(overwrite)
            self.resume = same and self._can_continue()
            if not self.resume:
                self.start_over()
        self.open_folders()

    def _bring_back(self) -> None:
        """An earlier --overwrite was killed between its two renames."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat("replaced", dir_fd=self.top, follow_symlinks=False)
            if self._out() is None and found.st_uid == self.me:
                os.rename("replaced", self.out.name, src_dir_fd=self.top, dst_dir_fd=self.parent)

    def _drop_replaced(self, overwrite: bool) -> None:
        """What was taken away is not needed once OUT is there, if the note says that OUT is what replaced it."""
        if self._out() is None or "replaced" not in os.listdir(self.top):
            return
        if self._was_open or not self.is_published():
            raise ConversionError(
                f"{self.path / 'replaced'} holds what an interrupted --overwrite took away; move it back or elsewhere"
            )
        if overwrite:
            descriptors.remove_tree("replaced", self.top)

    def _out(self) -> os.stat_result | None:
        try:
            return os.stat(self.out.name, dir_fd=self.parent, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _check_out(self, overwrite: bool) -> None:
        found = self._out()
        if found is None:
            return
        if ownership.output_in(self.out).files and not overwrite:
            if set(os.listdir(self.top)) <= {locks.NAME}:
                self.remove()
            raise ConversionError(f"another run has just finished {self.out}; name another folder")
        place.replaceable(self.out, overwrite)
        if not place.may_replace(found.st_uid, self.me):
            raise place.not_mine(self.out)

    def is_published(self) -> bool:
        found = self._out()
        return found is not None and place.publishing(self.top) == (found.st_ino, found.st_uid)

    def _digest(self) -> str | None:
        try:
            with descriptors.folder("journal", self.top) as journal:
                note = descriptors.read_note(journal, "digest", 1000)
        except OSError:
            return None
        return None if note is None else note.decode("ascii", "replace")

    def _can_continue(self) -> bool:
        try:
            found = os.stat("checkpoint", dir_fd=self.top, follow_symlinks=False)
        except FileNotFoundError:
            return False
        note = place.publishing(self.top)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == self.me and note in (None, (found.st_ino, found.st_uid))

    def start_over(self) -> None:
        """New folders, in place of all that is left."""
        if self._digest() is not None:
            why = "it was open to other users" if self._was_open else "another source, option or release"
            logger.warning("%s was left by a run with %s: starting over", self.path, why)
        with contextlib.suppress(FileNotFoundError), descriptors.folder("journal", self.top) as journal:
            os.unlink("digest", dir_fd=journal)  # first: from here on, nothing that is left can be continued
        for name in ("checkpoint", "journal"):
            descriptors.remove_tree(name, self.top)
        os.mkdir("journal", 0o700, dir_fd=self.top)
        os.mkdir("checkpoint", dir_fd=self.top)
        self.resume = False
        with (
            contextlib.suppress(OSError),
            descriptors.folder(self.out.name, self.parent) as old,
            descriptors.folder("checkpoint", self.top) as new,
        ):
            imitate.copy_default_list(old, new)

    def open_folders(self) -> None:
        self.close("checkpoint", "journal")
        if self.complete:
            self.checkpoint = descriptors.open_folder(self.out.name, self.parent)
        else:
            self.checkpoint = descriptors.open_folder("checkpoint", self.top)
            if os.fstat(self.checkpoint).st_uid != self.me:
                raise place.not_mine(self.shown)
        self.journal = descriptors.open_folder("journal", self.top)

    def note_digest(self, run_digest: str) -> None:
        """From here on, another run of the same plan may continue this one."""
        with descriptors.shown_as("writing", self.notes / "digest"):
            descriptors.write_note(self.journal, "digest", run_digest.encode())

    # --- files --------------------------------------------------------------------------------------------------------

    def create(self, name: str, mode: int = 0o666) -> int:
        """A new file of the output, in place of one that an earlier finish has left."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(name, dir_fd=self.checkpoint)
        return descriptors.open_new(name, self.checkpoint, mode)

    def open(self, name: str, flags: int = os.O_RDWR) -> int:
        return descriptors.open_regular(name, self.checkpoint, flags)

    def write(self, name: str, content: bytes, mode: int = 0o666) -> None:
        path = self.shown / name
        with descriptors.shown_as("writing", path), os.fdopen(self.create(name, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    # --- ending -------------------------------------------------------------------------------------------------------

    def check_places(self) -> None:
        """Refuses to publish where another folder has come to a name: another run's, or another user's."""
        if not (
            descriptors.is_at(self.path.name, self.parent, self.top)
            and descriptors.is_at("checkpoint", self.top, self.checkpoint)
            and descriptors.is_at("journal", self.top, self.journal)
            and descriptors.is_place(self.out.absolute().parent, self.parent)
        ):
            raise ConversionError(
                f"{self.path} was moved, removed or taken by another run while this one was writing into it, so "
                f"nothing is published; start the same command again when no other writes {self.out}"
            )

    def publish(self, overwrite: bool) -> None:
        """Renames the finished `checkpoint` to OUT, and removes what is left of OUT.partial."""
        self.check_places()
        with descriptors.shown_as("renaming to", self.out):
            if (run_digest := self._digest()) is not None:
                finished.mark(self.checkpoint, run_digest)
            publish.publish(self, overwrite)
        self.published = True
        self.remove()

    def set_aside(self) -> Path:
        """Renames what has failed its proof to OUT.unverified, in place of what failed it before; where it is then."""
        if not self.complete:
            self.check_places()
        aside = publish.set_aside(self)
        if aside != self.shown:
            self.remove()
        return aside

    def remove(self) -> None:
        """Removes OUT.partial; what a kill leaves of it is recognised, and never trusted."""
        try:
            found = ownership.partial_in(self.top)
            if found.foreign:
                logger.warning("%s holds %s, which no conversion wrote: it stays", self.path, found.says())
                return
            for name in ("checkpoint", "replaced", "journal"):
                descriptors.remove_tree(name, self.top)
            for name in os.listdir(self.top):
                os.unlink(name, dir_fd=self.top)
            if descriptors.is_at(self.path.name, self.parent, self.top):
                os.rmdir(self.path.name, dir_fd=self.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning(
                "%s could not be removed completely (%s); nothing in it is needed any more", self.path, error.strerror
            )


def prepare(out: Path, run_digest: str, overwrite: bool = False) -> Partial:
    """OUT.partial, ready for this process alone."""
    partial = Partial(out)
    try:
        with descriptors.shown_as("preparing", partial.path):
            partial.hold()
            partial.choose(run_digest, overwrite)
    except BaseException:
        partial.close()
        raise
    return partial


def join(out: Path, run_digest: str) -> Partial:
    """Another rank's hold on what rank 0 has prepared; OSError while it is not to be seen, or is another run's."""
    partial = Partial(out)
    try:
        partial.parent = descriptors.open_place(out.absolute().parent)
        partial.enter()
        partial.lock = descriptors.open_regular(locks.NAME, partial.top, os.O_RDWR)
        if not locks.take(partial.lock, fcntl.LOCK_SH):
            partial.lock = os.close(partial.lock) or -1
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
