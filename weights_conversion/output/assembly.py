"""Lays out every file of an output at its final size, and finishes what has been written into them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from weights_conversion import __version__, fileio, watch
from weights_conversion.engine.execute import Written
from weights_conversion.errors import ConversionError
from weights_conversion.layouts.placement import TensorRef
from weights_conversion.layouts.plan import Chunk, Plan
from weights_conversion.output import crc32, descriptors, file_sums, partial, place
from weights_conversion.output.journal import VISIBLE_SECONDS
from weights_conversion.output.partial import Partial

logger = logging.getLogger(__name__)


class TargetFile(Protocol):
    """A file of tensors that can be laid out before its data exist."""

    @property
    def file(self) -> str: ...

    @property
    def refs(self) -> tuple[TensorRef, ...]: ...

    def create(self, file: BinaryIO) -> dict[TensorRef, int]:
        """Writes everything but the data, at its final size; returns the first byte of each tensor's data."""
        ...

    def find(self, file: BinaryIO) -> dict[TensorRef, int]:
        """What `create` returned, of a file that is there, with some of its data, and is left as it is."""
        ...

    def finish(self, file: BinaryIO, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None:
        """Puts in what only the data tell, such as the CRC-32 of each tensor."""
        ...


def check_apart(out: Path, plan: Plan, further: Iterable[Path | None] = ()) -> None:
    """Refuses a source inside OUT, OUT.partial or OUT.unverified, each of which may be replaced or removed.

    `further` are the source's folder, and files that are copied.
    """
    sources = [Path(file) for file in source_files(plan)] + [path for path in further if path is not None]
    place.check_apart(out, sources)


def source_files(plan: Plan) -> list[str]:
    """Every file that the plan reads tensors from."""
    return sorted({b.ref.file for s in plan.steps for p in s.source for copy in p.copies for b in copy})


def digest(plan: Plan, targets: Sequence[TargetFile], extra: str) -> str:
    """Changes with everything that decides an output byte: sources (by their stamps), plan, options, releases."""
    whole = (__version__, torch.__version__, extra, plan.new_rows, plan.source, plan.target, plan.config)
    sha = hashlib.sha256(repr(whole).encode())
    for file in source_files(plan):
        sha.update(f"{file} {watch.Stamp.of(os.stat(file))}\n".encode())
    for step in plan.steps:
        sha.update(repr(step).encode())
    for target in targets:
        sha.update(f"{target.file} {target.refs} {getattr(target, 'content', None)}\n".encode())
    return sha.hexdigest()


def output_bytes(targets: Sequence[TargetFile]) -> int:
    return sum(ref.nbytes for target in targets for ref in target.refs)


def check_space(out: Path, needed: int) -> None:
    """Refuses to begin where the filesystem has not the space, or the folder cannot be written."""
    folder = _existing_parent(out)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(f"{folder} is not writable; name another place for {out.name}")
    if needed > (free := free_space(out)):
        raise ConversionError(
            f"{out} needs {needed / 1e9:.3f} GB, but its filesystem has {free / 1e9:.3f} GB free; "
            "free some space, or name a place elsewhere"
        )


def free_space(out: Path) -> int:
    """Bytes that the output may take: what is free, and what an interrupted run of it holds already."""
    stat = os.statvfs(_existing_parent(out))
    return stat.f_bavail * stat.f_frsize + _allocated(place.partial_folder(out))


def _existing_parent(out: Path) -> Path:
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return folder


def _allocated(folder: Path) -> int:
    """Bytes on the disk below a folder, as far as it may be read; no link is followed."""
    total = 0
    for above, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(above, name)).st_blocks * 512
    return total


def reserve(descriptor: int) -> None:
    """Allocates a file's blocks now, so that a full disk or quota shows before the work and not within it."""
    size = os.fstat(descriptor).st_size
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    # The C library's fallocate, not posix_fallocate: the latter writes every block where the call is not known.
    while size and libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))
        if code != errno.EINTR:
            return  # not known here: a full disk will show when it is written


def lay_out(held: Partial, targets: Sequence[TargetFile], run_digest: str) -> dict[TensorRef, int]:
    """Creates every file at its final size; where each tensor's data begin."""
    offsets: dict[TensorRef, int] = {}
    try:
        for target in targets:
            with _named("laying out", held, target), os.fdopen(held.create(target.file), "w+b") as file:
                offsets |= target.create(file)
                file.flush()
                reserve(file.fileno())
    except OSError:
        held.remove()  # nothing is gained yet, and the disk may be full of it
        raise
    _sync_all(held, targets)
    held.note_digest(run_digest)
    return offsets


def find_layout(held: Partial, targets: Sequence[TargetFile]) -> dict[TensorRef, int]:
    """What `lay_out` returned, of the files that it made; OSError or ConversionError where one is not to be seen."""
    offsets: dict[TensorRef, int] = {}
    for target in targets:
        with _named("opening", held, target), os.fdopen(held.open(target.file, os.O_RDONLY), "rb") as file:
            offsets |= target.find(file)
    return offsets


def _named(doing: str, held: Partial, target: TargetFile) -> contextlib.AbstractContextManager[None]:
    """An OSError in the block names the file that a user can find, and what was being done."""
    return descriptors.shown_as(doing, held.shown / target.file)


def join_layout(
    out: Path, targets: Sequence[TargetFile], run_digest: str
) -> tuple[Partial, dict[TensorRef, int]]:  # fmt: skip
    """Another rank's hold on what rank 0 has laid out; a network filesystem may show the files a little late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    shown = place.partial_folder(out)
    while True:
        try:
            held = partial.join(out, run_digest)
            try:
                return held, find_layout(held, targets)
            except BaseException:
                held.close()
                raise
        except (OSError, ConversionError) as error:
            logger.debug("%s is not to be seen yet: %s", shown, error)
        if time.monotonic() > deadline:
            raise ConversionError(
                f"{shown.absolute()}, which rank 0 has made, is not to be seen here; the output must be on a "
                "filesystem that all nodes share"
            )
        time.sleep(0.5)


def _sync_all(held: Partial, targets: Sequence[TargetFile]) -> None:
    """Makes the files, and the folders that name them, survive a power cut."""
    for target in targets:
        with _named("syncing", held, target):
            descriptor = held.open(target.file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    folders = {folder for target in targets for folder in Path(target.file).parents}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with descriptors.shown_as("syncing", held.shown / folder):
            descriptors.sync_folder(str(folder), held.checkpoint)


def combine_crcs(targets: Sequence[TargetFile], written: Iterable[Written]) -> dict[TensorRef, int]:
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
    held: Partial, targets: Sequence[TargetFile], offsets: Mapping[TensorRef, int], written: Iterable[Written],
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
        _check_complete(held, {*names, *last, *([file_sums.NAME] if sum_workers else [])})
        _prove(held, prove)
        held.remove()
        return
    crcs = combine_crcs(targets, written)
    for target in targets:
        with _named("finishing", held, target), os.fdopen(held.open(target.file), "r+b") as file:
            target.finish(file, crcs, offsets)
    _remove_strays(held.checkpoint, {*names})
    for name, content in files.items():
        if isinstance(content, Path):  # a copy is readable by nobody who cannot read what it is a copy of
            data = fileio.read_whole(content, fileio.MAX_TOKENIZER_BYTES)
            held.write(name, data, content.stat().st_mode & 0o777)
        else:
            held.write(name, content)
    if sum_workers:
        held.write(file_sums.NAME, file_sums.sums(held.shown, names, last, sum_workers))
    _sync_all(held, targets)
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
        held.remove()  # a signal after OUT is there: the work is done, and ends as such


def _prove(held: Partial, prove: Callable[[Path], None] | None) -> None:
    """Proves the finished folder, wherever it is; what fails is named OUT.unverified, never OUT."""
    if prove is None:
        return
    try:
        prove(held.shown)
    except ConversionError as error:
        kept = f"the output is kept as {held.set_aside()} for inspection"
        raise ConversionError(*error.problems, kept, whole=error.whole) from error


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
        os.close(held.open(name, os.O_RDONLY))
    except OSError:
        return False
    return True


def _remove_strays(top: int, expected: set[str]) -> None:
    """Removes what the finish of an earlier run wrote and this one will not, as a tokenizer file that is gone."""
    for above, _, names, descriptor in os.fwalk(".", dir_fd=top, follow_symlinks=False):
        for name in names:
            if Path(above, name).as_posix() not in expected:
                os.unlink(name, dir_fd=descriptor)


def remaining(chunks: Sequence[Chunk], done: Mapping[int, list[Written]]) -> list[tuple[int, Chunk]]:
    return [(number, chunk) for number, chunk in enumerate(chunks) if number not in done]
