"""Files and folders by descriptors, relative to the folder that is held: no link is followed, no FIFO waited for."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from weights_conversion.files import fileio

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NOT_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR)
_NO_SYNC = (*fileio.UNSUPPORTED, errno.EBADF, errno.EISDIR)


@contextlib.contextmanager
def folder(name: Path | str | int, within: int | None = None) -> Iterator[int]:
    """A descriptor of a folder, closed at the end; one that is open already is duplicated.

    Raises NotADirectoryError for a link, FileNotFoundError where nothing is.
    """
    above = name if isinstance(name, int) else within
    with contextlib.nullcontext() if above is None else named_in(above):
        descriptor = os.dup(name) if isinstance(name, int) else open_folder(name, within)
    try:
        with named_in(descriptor):
            yield descriptor
    finally:
        fileio.close_quietly(descriptor)


@contextlib.contextmanager
def named_in(within: int, name: str | None = None) -> Iterator[None]:
    """An OSError in the block that names nothing, or something in the open folder `within`, gets a whole path.

    `name` in `within` is what it is about where it names nothing.
    """
    try:
        yield
    except OSError as error:
        if not (isinstance(error.filename, str) and error.filename.startswith("/")) and (where := place_of(within)):
            inner = error.filename if isinstance(error.filename, str) else name
            error.filename = f"{where}/{inner}" if inner not in (None, ".") else where
        raise


def place_of(descriptor: int) -> str | None:
    """Where an open folder stands, as far as the system says."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
    except OSError:
        return None


@contextlib.contextmanager
def shown_as(doing: str, path: Path) -> Iterator[None]:
    """An OSError in the block names what a user can find, and not a name relative to some folder, or none."""
    with fileio.named(doing, path):
        try:
            yield
        except OSError as error:
            if not (isinstance(error.filename, str) and error.filename.startswith("/")):
                error.filename = str(path)
            raise


def open_folder(name: Path | str, within: int | None = None) -> int:
    """Opens a folder that is no link. Raises NotADirectoryError for anything else."""
    try:
        return os.open(name, FOLDER, dir_fd=within)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # what O_NOFOLLOW says of a link
            raise NotADirectoryError(errno.ENOTDIR, "is a symbolic link", str(name)) from error
        raise


def open_place(path: Path) -> int:
    """A folder to name things in, links on the way allowed; it need not be readable where the system knows O_PATH."""
    return os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)


def open_regular(name: str, within: int, flags: int) -> int:
    """Opens a regular file that is there, `name` relative to `within`, without waiting. Raises OSError for all else."""
    with _parent(name, within) as (above, last), named_in(above, last):
        descriptor = os.open(last, flags | _SAFE, dir_fd=above)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENXIO, "is not a regular file", name)  # as of a socket
        except BaseException:
            fileio.close_quietly(descriptor)
            raise
    return descriptor


def open_new(name: str, within: int, mode: int = 0o666) -> int:
    """Makes a file that was not there, and the folders above it, to be written and read."""
    with _parent(name, within, make=True) as (above, last), named_in(above, last):
        return os.open(last, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, mode, dir_fd=above)


@contextlib.contextmanager
def _parent(name: str, within: int, make: bool = False) -> Iterator[tuple[int, str]]:
    """The folder in which the last part of `name` stands, and that part."""
    *above, last = name.split("/")
    with named_in(within, last):
        held = os.dup(within)
    try:
        for part in above:
            with named_in(held, part):
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=held)
                inner = open_folder(part, held)
            fileio.close_quietly(held)
            held = inner
        yield held, last
    finally:
        fileio.close_quietly(held)


def remove_tree(name: str, within: int) -> None:
    """Removes a folder and all below it, following no link; nothing happens where nothing is."""
    try:
        top = open_folder(name, within)
    except FileNotFoundError:
        return
    try:
        with named_in(top):
            if os.fstat(top).st_mode & 0o700 != 0o700:  # of an earlier output, whose folders were made read-only
                with contextlib.suppress(OSError):
                    os.fchmod(top, 0o700)
            for entry in os.listdir(top):
                if stat.S_ISDIR(os.stat(entry, dir_fd=top, follow_symlinks=False).st_mode):
                    remove_tree(entry, top)
                else:
                    os.unlink(entry, dir_fd=top)
    finally:
        fileio.close_quietly(top)
    with named_in(within):
        os.rmdir(name, dir_fd=within)


def walk(top: int, prefix: str = ".") -> Iterator[tuple[str, list[str], int]]:
    """(relative folder, names of what is none, its descriptor) of all below an open folder, and of itself at the end.

    No error is passed over, and no link followed.
    """
    with folder(top) as held:
        inner, others = [], []
        for name in sorted(os.listdir(held)):
            is_folder = stat.S_ISDIR(os.stat(name, dir_fd=held, follow_symlinks=False).st_mode)
            (inner if is_folder else others).append(name)
        for name in inner:
            with folder(name, held) as below:
                yield from walk(below, f"{prefix}/{name}")
        yield prefix, others, held


def is_no_file(error: OSError) -> bool:
    """Whether it says what stands at a name (nothing, a link, a folder, a pipe), and not that this is not known."""
    return error.errno in _NOT_A_FILE


def read_note(within: int, name: str, limit: int, whole: bool = True) -> bytes | None:
    """A small file's content; None where no such file is there, or (`whole`) it has more than `limit` bytes.

    What may be there and could not be read is an OSError that names it: to go on as if it were not there is how a
    failing disk turns one output into another.
    """
    try:
        descriptor = open_regular(name, within, os.O_RDONLY)
    except OSError as error:
        if is_no_file(error):
            return None
        raise
    with named_in(within, name), os.fdopen(descriptor, "rb", buffering=0) as file:
        content = b""
        while len(content) < limit + whole and (part := file.read(limit + whole - len(content))):
            content += part
    return None if len(content) > limit else content


def write_note(within: int, name: str, content: bytes) -> None:
    """Writes a small file whole or not at all, whatever is cut off when."""
    new = f"{name}.new"
    with named_in(within, new):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new, dir_fd=within)
        with os.fdopen(open_new(new, within, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, name, src_dir_fd=within, dst_dir_fd=within)
    sync_folder(within)


def sync_folder(name: Path | str | int, within: int | None = None) -> None:
    """Makes the names in a folder survive a power cut, where the filesystem knows how and the folder may be read."""
    try:
        with folder(name, within) as descriptor:
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in _NO_SYNC:
                    raise
    except PermissionError:
        return


def is_at(name: str, within: int, descriptor: int) -> bool:
    """Whether what is open is still what stands at `name`. Raises OSError where that is not to be known."""
    try:
        with named_in(within, name):
            return os.path.samestat(os.stat(name, dir_fd=within, follow_symlinks=False), os.fstat(descriptor))
    except fileio.ABSENT:
        return False


def is_place(path: Path, descriptor: int) -> bool:
    """Whether `path`, links followed, still leads to the folder that is open. Raises OSError as `is_at`."""
    try:
        with shown_as("looking at", path):
            return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except fileio.ABSENT:
        return False


def who_am_i(within: int) -> int:
    """The owner that this filesystem gives to a file that this process makes: no id is compared with any other.

    Servers may squash all users to one, or map each to another number.
    """
    name = f"probe.{secrets.token_hex(8)}"
    descriptor = open_new(name, within, 0o600)
    try:
        with named_in(within, name):
            return os.fstat(descriptor).st_uid
    finally:
        fileio.close_quietly(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=within)


def who_am_i_unseen(folder: Path) -> int | None:
    """As `who_am_i`, by a file without a name, so that nothing changes; None where there are no such files."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (AttributeError, OSError):
        return None
    try:
        with fileio.named("looking at a file without a name in", folder):
            return os.fstat(descriptor).st_uid
    finally:
        fileio.close_quietly(descriptor)


def path_of(descriptor: int) -> Path:
    """A path that opens what `descriptor` holds, for libraries that take paths alone.

    No file is looked at for it, so that no file's error can be in the way.
    """
    return Path(f"/dev/fd/{descriptor}" if place_of(descriptor) is None else f"/proc/self/fd/{descriptor}")
