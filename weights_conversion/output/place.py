"""The three names of an output, and whether what stands at them may be used, replaced or removed. Changes nothing."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.output import descriptors, finished, ownership

_NONE = -1, -1  # no folder's inode and owner


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def unverified_folder(out: Path) -> Path:
    return out.with_name(out.name + ".unverified")


def check(out: Path, overwrite: bool, verify: bool = False) -> list[str]:
    """Refuses an OUT that is there already, unless it is an empty folder or an earlier output that may be replaced.

    Returns the files that would go. What it finds can change until it is used, so `Partial` looks again.
    """
    if out.name in ("", ".."):
        raise ConversionError(f"{out} cannot be renamed into place; name a folder of its own, inside or beside it")
    if fileio.is_link(out):
        raise ConversionError(
            f"{out} is a symbolic link to {os.readlink(out)}, and no folder that can be renamed into place; name what "
            "it stands for"
        )
    if fileio.exists(out) and not fileio.is_folder(out):
        raise ConversionError(f"{out} exists and is not a folder; name another one")
    if fileio.is_folder(out) and os.path.ismount(out):
        raise ConversionError(f"{out} is a mount point, which cannot be renamed into place; name a folder inside it")
    partial = partial_folder(out)
    check_partial(partial)
    _check_owners(out)
    if verify:
        check_unverified(out)
    if is_published(partial, out):  # only its clean-up was left; `Partial` knows whether it was this command
        return list(ownership.output_in(out).files) if overwrite else []
    replaced = partial / "replaced"
    if fileio.exists(replaced) and (fileio.exists(out) or not overwrite):
        raise ConversionError(
            f"{replaced} holds what an interrupted --overwrite took away from {out}; the same command with --overwrite "
            "goes on, or move it back with mv"
        )
    if not overwrite and finished.read(out) is not None:  # of which run is known once the plan is
        return []
    return replaceable(replaced if fileio.exists(replaced) else out, overwrite)


def check_apart(out: Path, sources: Sequence[Path]) -> None:
    """Refuses a source that is, or stands in, OUT, OUT.partial or OUT.unverified: each may be replaced or removed."""
    ownership.check_apart([out, partial_folder(out), unverified_folder(out)], sources)


def check_partial(partial: Path, opened: int | None = None) -> None:
    """Refuses an OUT.partial that no conversion left, or in which something else has been put."""
    if fileio.is_link(partial):
        raise ConversionError(f"{partial} is a symbolic link, and was not left by this converter; move it away")
    try:
        found = ownership.partial_in(partial if opened is None else opened)
    except PermissionError as error:
        raise not_mine(partial) from error
    if found.foreign:
        raise ConversionError(f"{partial} exists and holds {found.says()}, which no conversion wrote; move it away")


def check_unverified(out: Path) -> None:
    """Refuses an OUT.unverified that no failed proof has left: the next one would take its name."""
    aside = unverified_folder(out)
    if fileio.is_link(aside):
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
        raise is_there(out)
    if found.files and not os.access(out, os.W_OK | os.X_OK):  # a folder that moves gets another parent, "..", in it
        raise ConversionError(
            f"{out} may not be written (its mode is {stat.S_IMODE(out.stat().st_mode):o}), so it stays where it is; "
            f"`chmod u+w {out}` lets --overwrite replace it, or name another folder"
        )
    return list(found.files)


def is_there(out: Path) -> ConversionError:
    return ConversionError(
        f"{out} exists and is not empty; --overwrite replaces it, verify.py says what it holds, or name another folder"
    )


def not_mine(path: Path) -> ConversionError:
    return ConversionError(
        f"{path} belongs to another user, and what it holds could be changed by that user; name another place for the "
        "output, or have it removed"
    )


def may_replace(owner: int, me: int) -> bool:
    """Whether an OUT of `owner` may be replaced: one's own, and by root any, which leaves it to its owner."""
    return owner == me or os.geteuid() == 0


def _check_owners(out: Path) -> None:
    """Refuses an OUT or OUT.partial of another user, as far as that can be told without leaving a trace."""
    partial = partial_folder(out)
    owners = {}
    for path in (out, partial):
        with contextlib.suppress(*fileio.ABSENT):
            owners[path] = path.lstat().st_uid
    if not owners or (me := descriptors.who_am_i_unseen(out.absolute().parent)) is None:
        return
    for path, owner in owners.items():
        if owner != me and not (path == out and may_replace(owner, me)):
            raise not_mine(path)


def is_published(partial: Path, out: Path) -> bool:
    """Whether OUT is, by the note in OUT.partial, the finished output of the run that left it."""
    try:
        found = out.lstat()
        with descriptors.shown_as("looking into", partial), descriptors.folder(partial) as top:
            return stat.S_ISDIR(found.st_mode) and publishing(top) == (found.st_ino, found.st_uid)
    except fileio.ABSENT:
        return False


def publishing(top: int) -> tuple[int, int] | None:
    """Inode and owner of the folder that was about to be renamed to OUT, or has been; None where nothing says so.

    A damaged note names no folder that there is: what stands in OUT.partial may be what OUT was before.
    """
    try:
        with descriptors.folder("journal", top) as journal:
            note = descriptors.read_note(journal, "publishing", 100)
            is_there = note is not None or "publishing" in os.listdir(journal)
    except fileio.ABSENT:
        return None
    try:
        inode, owner = (note or b"").split()
        return int(inode), int(owner)
    except ValueError:
        return _NONE if is_there else None
