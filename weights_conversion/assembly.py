"""Puts an output together beside its final place, so that OUT appears complete or not at all.

    OUT.partial/checkpoint/   the output as it will be
    OUT.partial/journal/      what of it is known to be good: a plan digest, and the chunks that every process has finished

The last step renames `checkpoint` to OUT. A run with the same plan continues from the journal; any other starts over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from weights_conversion import __version__, checksums
from weights_conversion.config import ConversionError
from weights_conversion.execute import Written
from weights_conversion.placement import TensorRef
from weights_conversion.plan import Chunk, Plan

logger = logging.getLogger(__name__)

SYNC_BYTES = 1 << 30  # how much may have to be done again after a kill, per process
VISIBLE_SECONDS = 20.0  # how long another node's files may take to be seen here


class TargetFile(Protocol):
    """A file of tensors that can be laid out before its data exist."""

    @property
    def file(self) -> str: ...

    @property
    def refs(self) -> tuple[TensorRef, ...]: ...

    def create(self, root: Path, resume: bool = False) -> dict[TensorRef, int]: ...

    def finish(self, root: Path, crcs: Mapping[TensorRef, int], offsets: Mapping[TensorRef, int]) -> None: ...


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_absent(out: Path, overwrite: bool) -> None:
    """Refuses an OUT that is there already, unless it is an empty folder or may be replaced."""
    replaced = out.with_name(out.name + ".replaced")
    if replaced.exists() and not out.exists():  # an earlier --overwrite was killed between its two renames
        replaced.rename(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConversionError(f"{out} exists and is not a folder; name another one")
    if not overwrite and out.exists() and any(out.iterdir()):
        raise ConversionError(f"{out} exists and is not empty; --overwrite replaces it, or name another folder")


def digest(plan: Plan, targets: Sequence[TargetFile], extra: str) -> str:
    """Changes with everything that decides an output byte: sources (by size and time), plan, options, release."""
    sha = hashlib.sha256(f"{__version__}\n{extra}\n{plan.new_rows}\n{plan.source}\n{plan.target}\n".encode())
    files = sorted({b.ref.file for s in plan.steps for p in s.source for copy in p.copies for b in copy})
    for file in files:
        stat = os.stat(file)
        sha.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for step in plan.steps:
        sha.update(repr(step).encode())
    for target in targets:
        sha.update(f"{target.file} {target.refs}\n".encode())
    return sha.hexdigest()


def output_bytes(targets: Sequence[TargetFile]) -> int:
    return sum(ref.nbytes for target in targets for ref in target.refs)


def check_space(out: Path, needed: int) -> None:
    """Refuses to begin where the filesystem has not the space, or the folder cannot be written."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(f"{folder} is not writable; name another place for {out.name}")
    stat = os.statvfs(folder)
    free, held = stat.f_bavail * stat.f_frsize, _allocated(partial_folder(out))
    if needed > free + held:
        raise ConversionError(
            f"{out} needs {needed / 1e9:.3f} GB, but its filesystem has {(free + held) / 1e9:.3f} GB free; "
            "free some space, or name a place elsewhere"
        )


def _allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def reserve(path: Path) -> None:
    """Allocates a file's blocks now, so that a full disk or quota shows before the work and not within it."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "fallocate"):
            return
        # The C library's fallocate, not posix_fallocate: the latter writes every block where the call is not known.
        if libc.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
            code = ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(code, os.strerror(code), str(path))


class Journal:
    """Which chunks are written and on the disk. One file per process; entries follow a sync of the data they vouch for."""

    def __init__(self, folder: Path, refs: Sequence[TensorRef], rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._number = {ref: number for number, ref in enumerate(refs)}
        self._refs = refs
        self._waiting: list[str] = []
        self._bytes = 0
        self._lock = threading.Lock()

    def load(self) -> dict[int, list[Written]]:
        """Chunks that any process has finished, with what they wrote."""
        done: dict[int, list[Written]] = {}
        for path in sorted(self._folder.glob("chunks.*")):
            for line in path.read_text().splitlines():
                try:
                    number, writes = json.loads(line)
                except ValueError:  # the line that a kill cut off
                    continue
                done[number] = [Written(self._refs[ref], start, length, crc) for ref, start, length, crc in writes]
        return done

    def load_all(self, count: int) -> dict[int, list[Written]]:
        """All of `count` chunks, as the ranks noted them; a network filesystem may show their notes a little late."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while len(done := self.load()) < count:
            if time.monotonic() > deadline:
                raise ConversionError(
                    f"{self._folder} shows {len(done)} of {count} parts as written, after all ranks have written "
                    "theirs; the output must be on a filesystem that all nodes share"
                )
            time.sleep(0.5)
        return done

    def add(self, number: int, written: Iterable[Written], sync: Callable[[], None]) -> None:
        """Notes a finished chunk; after every SYNC_BYTES the data are synced and the notes written."""
        writes = [(self._number[w.ref], w.start, w.length, w.crc) for w in written]
        with self._lock:
            self._waiting.append(json.dumps([number, writes]))
            self._bytes += sum(length for _, _, length, _ in writes)
            if self._bytes < SYNC_BYTES:
                return
            self._flush(sync)

    def flush(self, sync: Callable[[], None]) -> None:
        with self._lock:
            self._flush(sync)

    def _flush(self, sync: Callable[[], None]) -> None:
        lines, self._waiting, self._bytes = self._waiting, [], 0
        if not lines:
            return
        sync()
        with (self._folder / f"chunks.{self._rank}").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")  # in front too: a kill may have left half a line
            file.flush()
            os.fsync(file.fileno())


def prepare(out: Path, plan_digest: str) -> bool:
    """Makes OUT.partial ready; True where an earlier run of the same plan can be continued."""
    partial = partial_folder(out)
    note = partial / "journal" / "digest"
    if partial.exists():
        if not (partial / "journal").is_dir():
            raise ConversionError(f"{partial} exists and was not left by this converter; move it away")
        if note.is_file() and note.read_text() == plan_digest:
            return True
        logger.warning("%s was left by a run with another source, option or release: starting over", partial)
        shutil.rmtree(partial)
    (partial / "journal").mkdir(parents=True)
    (partial / "checkpoint").mkdir()
    return False


def lay_out(out: Path, targets: Sequence[TargetFile], plan_digest: str, resume: bool) -> dict[TensorRef, int]:
    """Creates every file at its final size (or finds them, with `resume`); where each tensor's data begin."""
    root = partial_folder(out) / "checkpoint"
    offsets: dict[TensorRef, int] = {}
    for target in targets:
        offsets |= target.create(root, resume)
        if not resume:
            reserve(root / target.file)
    if not resume:
        for target in targets:
            sync_path(root / target.file)
        note = partial_folder(out) / "journal" / "digest"
        note.write_text(plan_digest)
        sync_path(note)
        sync_path(note.parent)
    return offsets


def find_layout(out: Path, targets: Sequence[TargetFile], plan_digest: str) -> dict[TensorRef, int]:
    """What `lay_out` returned to rank 0, on another rank; a network filesystem may show the files a little late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            return lay_out(out, targets, plan_digest, resume=True)
        except (OSError, ConversionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def lock(out: Path) -> int:
    """Holds OUT.partial for this process, until it ends."""
    descriptor = os.open(partial_folder(out) / "journal", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise ConversionError(f"another process is writing {out} at this moment; wait for it") from error
        return -1  # a filesystem without locks
    return descriptor


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
            crcs[ref] = checksums.combine([(crc, length) for _, length, crc in sorted(
                (start, length, crc) for start, length, crc in parts.get(ref, []))])  # fmt: skip
    return crcs


def finish(
    out: Path, targets: Sequence[TargetFile], offsets: Mapping[TensorRef, int], written: Iterable[Written],
    files: Mapping[str, bytes | Path], last: Mapping[str, bytes], overwrite: bool,
) -> None:  # fmt: skip
    """CRCs, small files (`last` ones after all others are on the disk), then the rename that makes OUT appear."""
    root = partial_folder(out) / "checkpoint"
    crcs = combine_crcs(targets, written)
    for target in targets:
        target.finish(root, crcs, offsets)
        sync_path(root / target.file)
    for name, content in files.items():
        write_file(root / name, content)
    for folder in {(root / target.file).parent for target in targets} | {root}:
        while folder != root.parent:
            sync_path(folder)
            folder = folder.parent
    for name, text in last.items():
        write_file(root / name, text)
    sync_path(root)
    publish(out, overwrite)


def publish(out: Path, overwrite: bool) -> None:
    """Renames the finished `checkpoint` to OUT, and removes what is left of OUT.partial."""
    partial = partial_folder(out)
    replaced = out.with_name(out.name + ".replaced")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConversionError(f"{out} has appeared in the meantime; {partial} holds the finished output")
        if replaced.exists():
            shutil.rmtree(replaced)
        out.rename(replaced)
    elif out.exists():
        out.rmdir()
    (partial / "checkpoint").rename(out)
    sync_path(out.absolute().parent)
    shutil.rmtree(partial)
    if replaced.exists():
        shutil.rmtree(replaced)


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


def remaining(chunks: Sequence[Chunk], done: Mapping[int, list[Written]]) -> list[tuple[int, Chunk]]:
    return [(number, chunk) for number, chunk in enumerate(chunks) if number not in done]
