"""Finishes what has been written into the files of an output: sums, small files, the proof, and the rename to OUT."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.layouts.placement import TensorRef, Written
from weights_conversion.output import assembly, crc32, descriptors, file_sums
from weights_conversion.output.partial import Partial


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
    files: Mapping[str, bytes | Path], last: Mapping[str, bytes], overwrite: bool, sum_workers: int = 0,
    prove: Callable[[Path], None] | None = None, stands: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """CRCs, small files (`last` ones after all others are on the disk), then the rename that makes OUT appear.

    `sum_workers` > 0: SHA-256 sums are written too, on so many threads. `prove` is called with the
    finished folder just before the rename; should it raise ConversionError, the folder becomes OUT.unverified instead.
    `stands` raises ConversionError where the source has changed: then nothing is renamed.
    """
    names = [*(target.file for target in targets), *files]
    if held.complete:
        _check_complete(held, {*names, *last, *(file_sums.written(names) if sum_workers else [])})
        _prove(held, prove)
        with descriptors.shown_as("syncing", held.out.absolute().parent):
            descriptors.sync_folder(".", held.parent)  # which may be what the earlier run did not come to
        held.remove()
        return
    crcs = combine_crcs(targets, written)
    for target in targets:
        with assembly.named("finishing", held, target), os.fdopen(held.open(target.file), "r+b") as file:
            target.finish(file, crcs, offsets)
    _remove_strays(held.checkpoint, {*names})
    for name, content in files.items():
        if isinstance(content, Path):  # a copy is readable by nobody who cannot read what it is a copy of
            data = fileio.read_whole(content, fileio.MAX_TOKENIZER_BYTES)
            held.write(name, data, content.stat().st_mode & 0o777)
        else:
            held.write(name, content)
    if sum_workers:
        for name, content in file_sums.sums(held.shown, names, last, sum_workers).items():
            held.write(name, content)
    assembly.sync_all(held, targets)
    for name, text in last.items():
        held.write(name, text)
    with descriptors.shown_as("syncing", held.shown):
        descriptors.sync_folder(held.checkpoint)
    stands()
    if prove is not None:
        _prove(held, prove)
        stands()
    try:
        held.publish(overwrite)
    except BaseException as interruption:
        if isinstance(interruption, Exception) or not held.published:
            raise
        held.end()  # a signal after OUT is there: the work is done, and ends as such


def _prove(held: Partial, prove: Callable[[Path], None] | None) -> None:
    """Proves the finished folder, wherever it is; what fails is named OUT.unverified, never OUT.

    What could not be read has not failed: it stays where it is, and the same command proves it again.
    """
    if prove is None:
        return
    try:
        prove(held.shown)
    except ConversionError as error:
        if _is_trouble(error):
            raise
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
    except OSError:
        return False
    return True


def _remove_strays(top: int, expected: set[str]) -> None:
    """Removes what the finish of an earlier run wrote and this one will not, as a tokenizer file that is gone."""
    for above, names, descriptor in descriptors.walk(top):
        for name in names:
            if Path(above, name).as_posix() not in expected:
                with descriptors.named_in(descriptor):
                    os.unlink(name, dir_fd=descriptor)
