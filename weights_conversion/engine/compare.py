"""Whether a finished OUT that others may write is, byte for byte, what this run would write.

What such a folder notes of itself proves nothing. So everything is converted again, in memory, and compared.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from weights_conversion.engine.execute import execute
from weights_conversion.engine.job import Job
from weights_conversion.engine.streams import Source, bytes_of
from weights_conversion.files import fileio, watch
from weights_conversion.layouts.placement import TensorRef, Written
from weights_conversion.output import descriptors, file_sums, finished, finishing
from weights_conversion.output.assembly import TargetFile

_MOST = fileio.MAX_TOKENIZER_BYTES
_PIECE = 4 << 20  # bytes compared at a time


class _Differs(Exception):
    """A file of OUT is not what would be written; its message is the file's name."""


def difference(job: Job, checksums: bool, workers: int) -> str | None:
    """The name of a file in which OUT differs, has more or has less, or that is not the user's own; None: in nothing.

    Reads the whole source and the whole of OUT. Raises ConversionError where the source changes meanwhile.
    """
    source = Source()
    try:
        shown = descriptors.shown_as("comparing", job.out.absolute())
        with shown, descriptors.folder(job.out) as top, contextlib.ExitStack() as held:
            _compare_names(job, checksums, top)
            for name, content in {**job.files, **job.last}.items():
                wanted = (
                    content if isinstance(content, bytes) else fileio.read_whole(content, fileio.MAX_TOKENIZER_BYTES)
                )
                if descriptors.read_note(top, name, len(wanted)) != wanted:
                    raise _Differs(name)
            _compare_tensors(job, top, source, workers, held)
            if checksums:
                names = [*(target.file for target in job.targets), *job.files]
                wanted = file_sums.sums(descriptors.path_of(top), names, job.last, workers)
                for name, content in wanted.items():
                    if descriptors.read_note(top, name, len(content)) != content:
                        raise _Differs(name)
    except (_Differs, ValueError) as differs:  # ValueError: folders nested beyond all bounds
        return str(differs)
    except OSError as error:
        if not descriptors.is_no_file(error):
            raise  # what could not be read is neither the same nor different
        return error.filename if isinstance(error.filename, str) else str(error.strerror)
    finally:
        source.close()
    if (seen := watch.current()) is not None:
        seen.check()
    return None


def _compare_names(job: Job, checksums: bool, top: int) -> None:
    """The files are those of the job, and all belong to whom OUT belongs to."""
    names = [*(target.file for target in job.targets), *job.files]
    expected = {*names, *job.last, *(file_sums.written(names) if checksums else [])}
    owner, present = os.fstat(top).st_uid, set()
    for name, status in finished.entries(top):
        if status.st_uid != owner or stat.S_IFMT(status.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise _Differs(name)
        if stat.S_ISREG(status.st_mode):
            present.add(name)
    if wrong := sorted(present ^ expected):
        raise _Differs(wrong[0])


def _compare_tensors(job: Job, top: int, source: Source, workers: int, held: contextlib.ExitStack) -> None:
    """Every tensor's bytes as they are converted, then what stands around them in the files."""
    offsets: dict[TensorRef, int] = {}
    drafts: dict[str, tuple[TargetFile, BinaryIO, int]] = {}
    for target in job.targets:
        there = descriptors.open_regular(target.file, top, os.O_RDONLY)
        held.callback(os.close, there)
        draft = held.enter_context(_draft())
        offsets |= target.create(draft)
        draft.flush()
        if os.fstat(there).st_size != os.fstat(draft.fileno()).st_size:
            raise _Differs(target.file)
        drafts[target.file] = target, draft, there
    written: list[Written] = []
    lock = threading.Lock()

    def done(_: int, __: object, writes: list[Written]) -> None:
        with lock:
            written.extend(writes)

    same = _Same({file: there for file, (_, _, there) in drafts.items()}, offsets)
    execute(job.plan, list(enumerate(job.plan.chunks())), source, same, workers, done)
    crcs = finishing.combine_crcs(job.targets, written)
    for target, draft, there in drafts.values():
        target.finish(draft, crcs, offsets)
        draft.flush()
        for start, stop in _gaps(target, offsets, os.fstat(there).st_size):
            for at in range(start, stop, _PIECE):
                length = min(_PIECE, stop - at)
                if os.pread(draft.fileno(), length, at) != os.pread(there, length, at):
                    raise _Differs(target.file)


def _draft() -> BinaryIO:
    """A file of nobody else's, in memory where that is to be had; what is not written of it takes no space."""
    try:
        return os.fdopen(os.memfd_create("draft"), "w+b")
    except (AttributeError, OSError):
        return tempfile.TemporaryFile()


def _gaps(target: TargetFile, offsets: Mapping[TensorRef, int], size: int) -> Iterator[tuple[int, int]]:
    """First and last byte, exclusive, of everything in a file that is no tensor's data."""
    position = 0
    for at, length in sorted((offsets[ref], ref.nbytes) for ref in target.refs):
        if at > position:
            yield position, at
        position = max(position, at + length)
    if size > position:
        yield position, size


class _Same:
    """Takes what would be written, and raises _Differs where a file holds something else."""

    def __init__(self, files: Mapping[str, int], offsets: Mapping[TensorRef, int]) -> None:
        self._files, self._offsets = files, offsets
        self._buffers = threading.local()

    def write(self, ref: TensorRef, start: int, data: Tensor) -> None:
        """Compares the contiguous tensor `data` with what stands at byte `start` of `ref`."""
        wanted = torch.frombuffer(bytes_of(data), dtype=torch.uint8) if data.numel() else torch.empty(0)
        position = self._offsets[ref] + start
        for at in range(0, wanted.numel(), _PIECE):
            part = wanted[at : at + _PIECE]
            there = self._buffer()[: part.numel()]
            with fileio.named("reading", Path(ref.file)):
                count = os.preadv(self._files[ref.file], [bytes_of(there)], position + at)
            if count != part.numel() or not torch.equal(part, there):
                raise _Differs(ref.file)

    def _buffer(self) -> Tensor:
        if not hasattr(self._buffers, "tensor"):
            self._buffers.tensor = torch.empty(_PIECE, dtype=torch.uint8)
        return self._buffers.tensor
