"""OUT appears complete or not at all: it is put together in OUT.partial, which one job holds, and renamed.

    OUT.partial/checkpoint/   the output as it will be
    OUT.partial/journal/      what of it is known to be good: a plan digest, and the chunks that are done
    OUT.partial/lock          held by the job that writes: by its one process alone, or shared by its ranks
    OUT.partial/replaced/     what --overwrite has taken away, where the filesystem cannot exchange two folders at once

The last step renames `checkpoint` to OUT. A run with the same plan continues from the journal; any other starts over.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.output import descriptors, imitate, ownership

logger = logging.getLogger(__name__)

LEFT_SECONDS = 60.0  # how long to wait for ranks of an earlier job that have lost their rank 0: within it they end
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN)


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def unverified_folder(out: Path) -> Path:
    return out.with_name(out.name + ".unverified")


def check(out: Path, overwrite: bool, verify: bool = False) -> list[str]:
    """Refuses an OUT that is there already, unless it is an empty folder or an earlier output that may be replaced.

    Changes nothing. Returns the files that would go.
    """
    if out.name in ("", ".."):
        raise ConversionError(f"{out} cannot be renamed into place; name a folder of its own, inside or beside it")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConversionError(f"{out} exists and is not a folder; name another one")
    if out.is_dir() and os.path.ismount(out):
        raise ConversionError(f"{out} is a mount point, which cannot be renamed into place; name a folder inside it")
    partial = partial_folder(out)
    _check_partial(partial)
    if verify:
        check_unverified(out)
    replaced = partial / "replaced"
    if published(out):  # an earlier run was killed when only its clean-up was left; `prepare` knows if it was this one
        return list(ownership.output_in(out).files) if overwrite else []
    if replaced.exists() and (out.exists() or not overwrite):
        raise ConversionError(
            f"{replaced} holds what an interrupted --overwrite took away from {out}; the same command with --overwrite "
            f"goes on, or move it back with mv"
        )
    return replaceable(replaced if replaced.exists() else out, overwrite)


def _check_partial(partial: Path) -> None:
    """Refuses an OUT.partial that no conversion left, or in which something else has been put."""
    if partial.is_symlink():
        raise ConversionError(f"{partial} is a symbolic link, and was not left by this converter; move it away")
    found = ownership.partial_in(partial)
    if found.foreign:
        raise ConversionError(f"{partial} exists and holds {found.says()}, which no conversion wrote; move it away")


def check_unverified(out: Path) -> None:
    """Refuses an OUT.unverified that no failed proof has left: the next one would take its name."""
    aside = unverified_folder(out)
    if aside.is_symlink():
        raise ConversionError(f"{aside} is a symbolic link, which no failed proof has left; move it away")
    found = ownership.output_in(aside)
    if found.foreign:
        raise ConversionError(
            f"{aside} holds {found.says()}, which no conversion wrote; an output that fails its proof would take that "
            "name, so move it away"
        )


def replaceable(out: Path, overwrite: bool) -> list[str]:
    """The files of the earlier output at `out`, each of which a conversion wrote; otherwise it is refused."""
    found = ownership.output_in(out)
    if found.foreign:
        raise ConversionError(
            f"{out} exists and holds {found.says()}, which no conversion wrote and none replaces; name another folder, "
            "or move it away"
        )
    if found.files and not overwrite:
        raise ConversionError(f"{out} exists and is not empty; --overwrite replaces it, or name another folder")
    return list(found.files)


@dataclass
class Hold:
    """OUT.partial in the hands of one process, by descriptors: its lock, and the folders of this run.

    A run that starts over makes new folders. What a process of an earlier run opens through its own descriptors is
    therefore never a file of the new run, even where the filesystem has no locks (`lock` is -1 there).
    """

    lock: int = -1
    checkpoint: int = -1
    journal: int = -1
    resume: bool = False  # an earlier run of the same plan can be continued

    def share(self) -> None:
        """From the one process that has prepared OUT.partial to all ranks of its job, which take it by `join`."""
        if self.lock >= 0:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                raise ConversionError("another process has just begun to write the same output; wait for it") from error

    def close(self) -> None:
        for name in ("checkpoint", "journal", "lock"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)


def prepare(out: Path, run_digest: str, overwrite: bool = False) -> Hold:
    """Makes OUT.partial ready for this process alone. What it waited for may have written OUT: then it is refused."""
    partial = partial_folder(out)
    hold = Hold(_lock_alone(partial))
    try:
        replaced = partial / "replaced"
        if replaced.is_dir() and not out.exists():  # an earlier --overwrite was killed between its two renames
            replaced.rename(out)
        if not published(out):
            if not overwrite and out.is_dir() and any(out.iterdir()):
                if not (partial / "journal").exists():
                    remove(partial)
                raise ConversionError(f"another run has just finished {out}; name another folder")
            replaceable(out, overwrite)
        elif overwrite:
            remove(partial)
            hold.close()
            return prepare(out, run_digest, overwrite)
        hold.resume = _can_continue(out, run_digest)
        if not hold.resume:
            _start_over(partial)
        _open_folders(hold, out)
    except BaseException:
        hold.close()
        raise
    return hold


def join(out: Path, run_digest: str) -> Hold:
    """Another rank's hold on what rank 0 has prepared; OSError while it is not to be seen, or is another run's."""
    path = partial_folder(out) / "lock"
    hold = Hold(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    try:
        if not _take(hold.lock, fcntl.LOCK_SH):
            hold.lock = os.close(hold.lock) or -1
        elif not _is_at(path, hold.lock):
            raise FileNotFoundError(errno.ENOENT, "has been replaced", str(path))
        _open_folders(hold, out)  # before the digest is read: what is opened later can only be a newer run's
        with os.fdopen(os.open("digest", os.O_RDONLY, dir_fd=hold.journal)) as file:
            if file.read() != run_digest:
                raise FileNotFoundError(errno.ENOENT, "belongs to another run", str(path.parent))
    except BaseException:
        hold.close()
        raise
    return hold


def _can_continue(out: Path, run_digest: str) -> bool:
    partial = partial_folder(out)
    note = partial / "journal" / "digest"
    same = note.is_file() and note.read_text() == run_digest
    if published(out):
        if same:
            return True
        remove(partial)
        raise ConversionError(f"{out} exists and is complete; --overwrite replaces it, or name another folder")
    checkpoint = partial / "checkpoint"
    return same and checkpoint.is_dir() and _publishing(partial) in (None, checkpoint.stat().st_ino)


def _start_over(partial: Path) -> None:
    note = partial / "journal" / "digest"
    if note.is_file():
        logger.warning("%s was left by a run with another source, option or release: starting over", partial)
    note.unlink(missing_ok=True)  # first: from here on, nothing that is left can be continued
    for name in ("checkpoint", "journal"):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    (partial / "journal").mkdir()
    (partial / "checkpoint").mkdir()


def _open_folders(hold: Hold, out: Path) -> None:
    hold.checkpoint = os.open(root_of(out), _FOLDER)
    hold.journal = os.open(partial_folder(out) / "journal", _FOLDER)


def root_of(out: Path) -> Path:
    """Where the output's files are: still in OUT.partial, or in OUT, where only the clean-up was left."""
    return out if published(out) else partial_folder(out) / "checkpoint"


def _lock_alone(partial: Path) -> int:
    """Takes the lock on OUT.partial, creating the folder. Nothing in it may be touched before. -1: no locks here."""
    deadline, waiting = time.monotonic() + LEFT_SECONDS, False
    while True:
        _check_partial(partial)
        partial.mkdir(parents=True, exist_ok=True)
        path = partial / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process has just finished and removed the folder
            continue
        try:
            if not _take(descriptor, fcntl.LOCK_EX):
                os.close(descriptor)
                return -1
        except BlockingIOError as error:
            shared = _is_shared(descriptor)
            os.close(descriptor)
            if not shared or time.monotonic() > deadline:
                raise ConversionError(f"another process is writing {partial} at this moment; wait for it") from error
            if not waiting:
                logger.warning("ranks of another job are writing %s: waiting for their end", partial)
            waiting = True
            time.sleep(0.2)
            continue
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)


def _take(descriptor: int, kind: int) -> bool:
    """Takes a lock; False where the filesystem has none, BlockingIOError where another process has it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise
        return False
    return True


def _is_shared(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return _take(descriptor, fcntl.LOCK_SH)
    return False


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def publish(out: Path, overwrite: bool) -> None:
    """Renames the finished `checkpoint` to OUT, and removes what is left of OUT.partial."""
    partial = partial_folder(out)
    finished, note = partial / "checkpoint", partial / "journal" / "publishing"
    note.write_text(str(finished.stat().st_ino))  # by which OUT is known again, should the clean-up be interrupted
    sync_path(note)
    sync_path(note.parent)
    if out.is_dir():
        imitate.take_over(out, finished)
    if out.is_dir() and any(out.iterdir()):
        _replace(out, overwrite)
    else:
        finished.rename(out)
    descriptors.sync_folder(out.absolute().parent)
    remove(partial)


def _replace(out: Path, overwrite: bool) -> None:
    """Puts the finished output in place of an earlier one; what has come to that meanwhile stays where it was."""
    partial = partial_folder(out)
    finished, old = partial / "checkpoint", partial / "replaced"

    def meanwhile() -> ConversionError:
        return ConversionError(
            f"{out} has appeared or changed in the meantime, and holds {ownership.output_in(out).says() or 'an output'}"
            f"; {finished} holds the finished output: move one of them away"
        )

    if not overwrite or ownership.output_in(out).foreign:
        raise meanwhile()
    exchanged = _exchange(finished, out)
    if exchanged:
        old = finished
    else:
        out.rename(old)
        try:
            finished.rename(out)
        except OSError:
            old.rename(out)
            raise
    if ownership.output_in(old).foreign:  # written into it between the look and the renames
        if not exchanged:
            out.rename(finished)
            old.rename(out)
        elif not _exchange(finished, out):
            raise ConversionError(f"{finished} holds what stood at {out} and has changed in the meantime; look at it")
        raise meanwhile()


def published(out: Path) -> bool:
    """Whether OUT is the finished output of the run that left OUT.partial, which only had to be removed."""
    return out.is_dir() and _publishing(partial_folder(out)) == out.stat().st_ino


def _publishing(partial: Path) -> int | None:
    """The inode of the folder that was about to be renamed to OUT, or has been; None before."""
    try:
        return int((partial / "journal" / "publishing").read_text() or 0)
    except FileNotFoundError:
        return None


def _exchange(one: Path, two: Path) -> bool:
    """Swaps two folders in one step, so that OUT is there at every moment. False where that is not known."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, swap = ctypes.c_int(-100), ctypes.c_uint(2)  # AT_FDCWD, RENAME_EXCHANGE
    return libc.renameat2(here, os.fsencode(one), here, os.fsencode(two), swap) == 0


def set_aside(out: Path) -> Path:
    """Renames what has failed its proof to OUT.unverified, in place of what failed it before."""
    aside = unverified_folder(out)
    try:
        check_unverified(out)
    except ConversionError:  # it has come in the meantime
        return partial_folder(out) / "checkpoint"
    if aside.exists():
        shutil.rmtree(aside)
    (partial_folder(out) / "checkpoint").rename(aside)
    remove(partial_folder(out))
    return aside


def remove(partial: Path) -> None:
    """Removes OUT.partial; what a kill leaves of it is recognised, and never trusted."""
    found = ownership.partial_in(partial)
    if found.foreign:
        logger.warning("%s holds %s, which no conversion wrote: it stays", partial, found.says())
        return
    for name in ("checkpoint", "replaced", "journal"):
        shutil.rmtree(partial / name, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    if partial.exists():
        logger.warning("%s could not be removed completely; nothing in it is needed any more", partial)


def write_file(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    sync_path(path)


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
