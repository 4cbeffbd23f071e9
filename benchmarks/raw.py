"""What the disk can do, without any of our code: `python -m benchmarks.raw write|copy|read ...`.

    write OUT BYTES     writes so many bytes
    copy OUT FOLDER...  copies the files below folders into one
    read FOLDER...      reads the files below folders

Two threads take pieces of 32 MB, past the page cache where the filesystem allows it (O_DIRECT); files that are written
are preallocated, and synced once at the end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE = 32 << 20
PAGE = 4096
THREADS = 2
DIRECT = getattr(os, "O_DIRECT", 0)


def _open(path: Path, flags: int) -> int:
    """Past the page cache, where that is taken."""
    try:
        return os.open(path, flags | DIRECT)
    except OSError:
        return os.open(path, flags)


def _made(path: Path, size: int) -> int:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return _open(path, os.O_WRONLY)


def _pieces(sizes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(file, first byte in it, bytes, first byte among all) of every piece; each file begins on a page of the whole."""
    begin = 0
    for number, size in enumerate(sizes):
        for at in range(0, size, PIECE):
            yield number, at, min(PIECE, size - at), begin + at
        begin += _pages(size)


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _each(work: Callable[[mmap.mmap, tuple[int, int, int, int]], None], pieces: Sequence[tuple[int, ...]]) -> None:
    local = threading.local()

    def one(piece: tuple[int, int, int, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, PIECE)
            local.buffer[:] = random.Random(0).randbytes(1 << 20) * (PIECE >> 20)
        work(local.buffer, piece)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, pieces))  # pyright: ignore[reportArgumentType]


def write(out: Path, size: int) -> None:
    size = _pages(size)
    target = _made(out, size)

    def one(buffer: mmap.mmap, piece: tuple[int, int, int, int]) -> None:
        _, _, length, at = piece
        with memoryview(buffer) as view, view[:length] as part:
            _write_all(target, part, at)

    _each(one, list(_pieces([size])))
    os.fsync(target)
    os.close(target)


def _write_all(target: int, part: memoryview, at: int) -> None:
    done = 0
    while done < len(part):
        done += os.pwrite(target, part[done:], at + done)


def read(folders: Sequence[Path], then: Callable[[memoryview, int], None] | None = None) -> None:
    """`then` gets every piece (in whole pages), and where it begins among all."""
    paths = _files(folders)
    opened = [_open(path, os.O_RDONLY) for path in paths]

    def one(buffer: mmap.mmap, piece: tuple[int, int, int, int]) -> None:
        number, start, length, at = piece
        with memoryview(buffer) as view, view[: _pages(length)] as part:
            done = 0
            while done < length:
                done += os.preadv(opened[number], [part[done:]], start + done)
            if then is not None:
                then(part, at)

    _each(one, list(_pieces([path.stat().st_size for path in paths])))
    for descriptor in opened:
        os.close(descriptor)


def copy(out: Path, folders: Sequence[Path]) -> None:
    target = _made(out, sum(_pages(path.stat().st_size) for path in _files(folders)))
    read(folders, lambda part, at: _write_all(target, part, at))
    os.fsync(target)
    os.close(target)


def _files(folders: Sequence[Path]) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def main() -> None:
    what, *rest = sys.argv[1:]
    with contextlib.suppress(BrokenPipeError):
        if what == "write":
            write(Path(rest[0]), int(rest[1]))
        elif what == "copy":
            copy(Path(rest[0]), list(map(Path, rest[1:])))
        elif what == "read":
            read(list(map(Path, rest)))
        else:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
