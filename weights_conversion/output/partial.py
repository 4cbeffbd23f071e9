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
import logging
import os
from pathlib import Path
from types import TracebackType

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.output import descriptors, finished, locks, ownership, place, publish

logger = logging.getLogger(__name__)

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
        self._publishing = False
        self.complete = False  # OUT is that run's finished output; only its clean-up is left
        self.noted: tuple[int, int] | None = None  # by what this process has noted that OUT will be known
        self.was_open = False  # to others, so that nothing in it is to be trusted

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self, *names: str) -> None:
        for name in names or _HELD:
            if getattr(self, name) >= 0:
                fileio.close_quietly(getattr(self, name))
                setattr(self, name, -1)

    @property
    def shown(self) -> Path:
        """Where the files of `checkpoint` are seen, for messages and for those who only read."""
        return self.out if self.complete else self.path / "checkpoint"

    @property
    def notes(self) -> Path:
        return self.path / "journal"

    def share(self) -> None:
        locks.share(self.lock, self.path)

    # --- folders ------------------------------------------------------------------------------------------------------

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

    def open_folders(self) -> None:
        self.close("checkpoint", "journal")
        if self.complete:
            with descriptors.shown_as("opening", self.out.absolute()):
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

    def may_go(self, run_digest: str) -> bool:
        """Whether nothing is left in it that anyone may want, now that OUT is the finished output of `run_digest`:
        neither another run's work nor what was taken away."""
        if self.is_published():
            return True
        return self.digest() in (None, run_digest) and "replaced" not in os.listdir(self.top)

    def is_published(self) -> bool:
        found = self.status_of_out()
        return found is not None and place.publishing(self.top) == (found.st_ino, found.st_uid)

    def digest(self) -> str | None:
        """Of the run that left it; None where nothing says so."""
        try:
            with descriptors.folder("journal", self.top) as journal:
                note = descriptors.read_note(journal, "digest", 1000)
        except fileio.ABSENT:
            return None
        return None if note is None else note.decode("ascii", "replace")

    def status_of_out(self) -> os.stat_result | None:
        try:
            with descriptors.shown_as("looking at", self.out.absolute()):
                return os.stat(self.out.name, dir_fd=self.parent, follow_symlinks=False)
        except FileNotFoundError:
            return None

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

    def note_publishing(self) -> None:
        """What `publish` notes before its rename, already while the last files are written."""
        with descriptors.shown_as("writing", self.notes / "publishing"):
            publish.note(self)

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
        self._publishing = True
        with descriptors.shown_as("renaming to", self.out):
            if (run_digest := self.digest()) is not None:
                finished.mark(self.checkpoint, run_digest)
            try:
                publish.publish(self, overwrite)
            except (OSError, ConversionError) as error:
                self._say_if_published(error)
                raise
        self.remove()

    @property
    def published(self) -> bool:
        """Whether this process has renamed it to OUT. Raises OSError where that is not to be seen."""
        return self._publishing and descriptors.is_at(self.out.name, self.parent, self.checkpoint)

    def end(self) -> None:
        """What is left to be done once it is published, from whatever point on."""
        with descriptors.shown_as("syncing", self.out.absolute().parent):
            try:
                descriptors.sync_folder(".", self.parent)
            except OSError as error:
                self._say_if_published(error)
                raise
        self.remove()

    def _say_if_published(self, error: OSError | ConversionError) -> None:
        """Raises ConversionError where OUT is the new output already, or may be: the usual words would be untrue."""
        why = fileio.failed(error) if isinstance(error, OSError) else str(error)
        try:
            if not self.published:
                return
        except OSError as unseen:
            raise ConversionError(
                f"the last step has failed ({why}), and whether {self.out} is the new output by now could not be seen "
                f"({fileio.failed(unseen)}); the same command goes on from whatever is there"
            ) from error
        raise ConversionError(
            f"{self.out} is complete, and what was there before is replaced, but the last step has failed "
            f"({why}), so that a power cut might still undo it; the same command sees to that"
        ) from error

    def set_aside(self) -> Path:
        """Renames what has failed its proof to OUT.unverified, in place of what failed it before; where it is then."""
        if not self.complete:
            self.check_places()
        aside = publish.set_aside(self)
        if aside != self.shown:
            self.remove()
        return aside

    def _remove_notes(self) -> None:
        """Last those by which the same command knows that only this was left to be done."""
        with contextlib.suppress(FileNotFoundError), descriptors.folder("journal", self.top) as journal:
            for name in sorted(os.listdir(journal), key=lambda name: (name in ("digest", "publishing"), name)):
                os.unlink(name, dir_fd=journal)
        descriptors.remove_tree("journal", self.top)

    def remove(self) -> None:
        """Removes OUT.partial; what a kill leaves of it is recognised, and never trusted."""
        try:
            found = ownership.partial_in(self.top)
            if found.foreign:
                logger.warning("%s holds %s, which no conversion wrote: it stays", self.path, found.says())
                return
            for name in ("checkpoint", "replaced"):
                descriptors.remove_tree(name, self.top)
            self._remove_notes()
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
