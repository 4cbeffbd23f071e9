"""Finishes what has been written into the files of an output: sums, small files, the proof, and the rename to OUT."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.layouts.placement import TensorRef, Written
from weights_conversion.output import assembly, crc32, descriptors, file_sums
from weights_conversion.output.durability import Durability
from weights_conversion.output.partial import Partial
from weights_conversion.output.together import together


def combine_crcs(targets: Sequence[assembly.TargetFile], written: Iterable[Written]) -> dict[TensorRef, int]:
    """The CRC-32 of every tensor. Proves on the way that each byte of each tensor was written exactly once."""
    parts: dict[TensorRef, list[tuple[int, int, int]]] = {}
    for write in written:
        parts.setdefault(write.ref, []).append((write.start, write.length, write.crc))
    crcs = {}
    for target in targets:
        for ref in target.refs:
            position = 0
            for start, length, _ in sorted(parts.get(ref, [])):
                if start != position:
                    raise RuntimeError(f"{ref.file}: {ref.name} has bytes {position} to {start} written twice or never")
                position += length
            if position != ref.nbytes:
                raise RuntimeError(f"{ref.file}: {ref.name} has {ref.nbytes} bytes, {position} of them were written")
            crcs[ref] = crc32.combine([(crc, length) for _, length, crc in sorted(
                (start, length, crc) for start, length, crc in parts.get(ref, []))])  # fmt: skip
    return crcs


def finish(
    held: Partial, targets: Sequence[assembly.TargetFile], offsets: Mapping[TensorRef, int], written: Iterable[Written],
    files: Mapping[str, bytes | Path], last: Mapping[str, bytes], overwrite: bool, durability: Durability,
    sum_workers: int = 0, prove: Callable[[Path], None] | None = None, stands: Callable[[], None] = lambda: None,
    running: Callable[[str, threading.Event], str | None] = lambda *_: None,
) -> None:  # fmt: skip
    """CRCs, small files (`last` ones after all others are on the disk), then the rename that makes OUT appear.

    `sum_workers` > 0: SHA-256 sums are written too, on so many threads (`running`: file_sums.sums). `prove` is called
    with the finished folder just before the rename; should it raise ConversionError, the folder becomes OUT.unverified.
    `stands` raises ConversionError where the source has changed: then nothing is renamed.
    """
    names = [*(target.file for target in targets), *files]
    if held.complete:
        _check_complete(held, {*names, *last, *(file_sums.written(names) if sum_workers else [])})
        _prove(held, prove, stands)
        with descriptors.shown_as("syncing", held.out.absolute().parent):
            descriptors.sync_folder(".", held.parent)  # which may be what the earlier run did not come to
        held.remove()
        return
    _remove_strays(held.checkpoint, {*names})
    _finish_files(held, targets, offsets, combine_crcs(targets, written), files, durability)
    sums = file_sums.sums(held.shown, names, last, sum_workers, running) if sum_workers else {}
    early = [held.note_publishing] if prove is None else []  # what fails its proof will not be OUT
    together([durability.note, lambda: _write_last(held, sums, last), *early])
    durability.files.close()
    stands()
    if prove is not None:
        _prove(held, prove, stands)
        stands()
    try:
        held.publish(overwrite)
    except BaseException as interruption:
        if isinstance(interruption, Exception) or not _is_published(held):
            raise
        held.end()  # a signal after OUT is there: the work is done, and ends as such


def _is_published(held: Partial) -> bool:
    """As far as that is to be seen."""
    with contextlib.suppress(OSError):
        return held.published
    return False


def _finish_files(
    held: Partial, targets: Sequence[assembly.TargetFile], offsets: Mapping[TensorRef, int],
    crcs: Mapping[TensorRef, int], files: Mapping[str, bytes | Path], durability: Durability,
) -> None:  # fmt: skip
    """The files of tensors get their CRCs, the small ones their content, and all is synced, at one time."""
    by_name = {target.file: target for target in targets}

    def finish_file(name: str) -> None:
        target = by_name[name]
        with assembly.named("finishing", held, target), os.fdopen(held.open(name), "r+b") as file:
            target.finish(file, crcs, offsets)

    with contextlib.ExitStack() as opened:
        small = [opened.enter_context(_Small(held, name, content)) for name, content in files.items()]
        syncs = assembly.folder_syncs(held, files)  # all names are there by now
        durability.finish([*(each.write for each in small), *syncs], finish_file)


class _Small:
    """A small file of the output that is there, empty, and to be written."""

    def __init__(self, held: Partial, name: str, content: bytes | Path) -> None:
        self._held, self._path, mode = held, held.shown / name, 0o666
        if isinstance(content, Path):  # a copy is readable by nobody who cannot read what it is a copy of
            content, mode = fileio.read_whole(content, fileio.MAX_TOKENIZER_BYTES), content.stat().st_mode & 0o777
        self._content = content
        with descriptors.shown_as("writing", self._path):
            self._file = os.fdopen(held.create(name, mode), "wb")

    def __enter__(self) -> _Small:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # where `write` has not come to it, another error is told
            self._file.close()

    def write(self) -> None:
        """All of it, onto the disk."""
        with descriptors.shown_as("writing", self._path), self._file as file:
            file.write(self._content)
            file.flush()
            os.fsync(file.fileno())


def _write_last(held: Partial, sums: Mapping[str, bytes], last: Mapping[str, bytes]) -> None:
    """What is written when all other files are on the disk, and its names."""
    for files in filter(None, (sums, last)):
        together([functools.partial(held.write, name, content) for name, content in files.items()])
        together(assembly.folder_syncs(held, files))


def _prove(held: Partial, prove: Callable[[Path], None] | None, stands: Callable[[], None]) -> None:
    """Proves the finished folder, wherever it is; what fails is named OUT.unverified, never OUT.

    What could not be read, or was compared with a source that has changed, has not failed: it stays where it is, and
    the same command proves it again, or starts over.
    """
    if prove is None:
        return
    try:
        prove(held.shown)
    except ConversionError as error:
        if _is_trouble(error):
            raise
        stands()
        kept = f"the output is kept as {held.set_aside()} for inspection"
        raise ConversionError(*error.problems, kept, whole=error.whole) from error


def _is_trouble(error: BaseException | None) -> bool:
    """Whether the system has failed a call, and not the output its proof."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))


def _check_complete(held: Partial, names: set[str]) -> None:
    """Refuses an OUT that an earlier run has published, and that has not all its files any more."""
    missing = sorted(name for name in names if not _is_there(held, name))
    if missing:
        raise ConversionError(
            f"{held.out} was finished by the same command, but lacks {', '.join(missing[:8])} now; --overwrite makes "
            "it again"
        )


def _is_there(held: Partial, name: str) -> bool:
    try:
        fileio.close_quietly(held.open(name, os.O_RDONLY))
    except OSError as error:
        if descriptors.is_no_file(error):
            return False
        raise
    return True


def _remove_strays(top: int, expected: set[str]) -> None:
    """Removes what the finish of an earlier run wrote and this one will not, as a tokenizer file that is gone."""
    for above, names, descriptor in descriptors.walk(top):
        for name in names:
            if Path(above, name).as_posix() not in expected:
                with descriptors.named_in(descriptor):
                    os.unlink(name, dir_fd=descriptor)
