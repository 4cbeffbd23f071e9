"""Puts an output together beside its final place, so that OUT appears complete or not at all.

    OUT.partial/checkpoint/   the output as it will be
    OUT.partial/journal/      what of it is known to be good: a plan digest, and the chunks that are done
    OUT.partial/lock          held by the process that writes
    OUT.partial/replaced/     what --overwrite has taken away, where the filesystem cannot exchange two folders at once

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from weights_conversion import __version__, checksums
from weights_conversion.config import ConversionError
from weights_conversion.execute import Written
from weights_conversion.placement import TensorRef
from weights_conversion.plan import Chunk, Plan

logger = logging.getLogger(__name__)

SYNC_BYTES = 1 << 30  # how much may have to be done again after a kill, per process
VISIBLE_SECONDS = 20.0  # how long another node's files may take to be seen here
MANIFEST = "checksums.sha256"
_PARTS = {"checkpoint", "journal", "lock", "replaced"}


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
    if out.name in ("", ".."):
        raise ConversionError(f"{out} cannot be renamed into place; name a folder of its own, inside or beside it")
    partial = partial_folder(out)
    replaced = partial / "replaced"
    if replaced.is_dir() and not out.exists():  # an earlier --overwrite was killed between its two renames
        replaced.rename(out)
    if published(out):  # an earlier run was killed when only its clean-up was left
        if overwrite:
            remove(partial)
        return  # `prepare` knows whether it was the same command
    if replaced.exists():
        raise ConversionError(f"{replaced} holds what an interrupted --overwrite took away; move it back")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConversionError(f"{out} exists and is not a folder; name another one")
    if out.is_dir() and os.path.ismount(out):
        raise ConversionError(f"{out} is a mount point, which cannot be renamed into place; name a folder inside it")
    if not overwrite and out.exists() and any(out.iterdir()):
        raise ConversionError(f"{out} exists and is not empty; --overwrite replaces it, or name another folder")


def check_apart(out: Path, plan: Plan) -> None:
    """Refuses an OUT that is, or holds, a file that the plan reads: --overwrite would delete its own source."""
    real = out.resolve()
    for file in source_files(plan):
        path = Path(file)
        if real in path.resolve().parents or real in (path.parent.resolve() / path.name).parents:
            raise ConversionError(f"{out} holds the source ({file}), which it would replace; name another folder")


def source_files(plan: Plan) -> list[str]:
    """Every file that the plan reads tensors from."""
    return sorted({b.ref.file for s in plan.steps for p in s.source for copy in p.copies for b in copy})


def digest(plan: Plan, targets: Sequence[TargetFile], extra: str) -> str:
    """Changes with everything that decides an output byte: sources (by size and time), plan, options, releases."""
    whole = (__version__, torch.__version__, extra, plan.new_rows, plan.source, plan.target, plan.config)
    sha = hashlib.sha256(repr(whole).encode())
    for file in source_files(plan):
        stat = os.stat(file)
        sha.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
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
    return stat.f_bavail * stat.f_frsize + _allocated(partial_folder(out))


def _existing_parent(out: Path) -> Path:
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return folder


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
        while size and libc.fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
            code = ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(code, os.strerror(code), str(path))
            if code != errno.EINTR:
                return  # not known here: a full disk will show when it is written


class Journal:
    """Which chunks are written and on the disk. A file per process; entries follow a sync of their data."""

    def __init__(self, folder: Path, refs: Sequence[TensorRef], rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._number = {ref: number for number, ref in enumerate(refs)}
        self._refs = refs
        self._waiting: list[str] = []
        self._bytes = 0
        self._sync_failed = False
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
        if not lines or self._sync_failed:
            return
        try:
            sync()
        except OSError:
            self._sync_failed = True  # the kernel reports lost data once, so no later sync vouches for anything
            raise
        with (self._folder / f"chunks.{self._rank}").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")  # in front too: a kill may have left half a line
            file.flush()
            os.fsync(file.fileno())


def prepare(out: Path, plan_digest: str) -> bool:
    """Makes OUT.partial ready for this process alone; True where an earlier run of the same plan can be continued."""
    partial = partial_folder(out)
    _hold(partial)
    note = partial / "journal" / "digest"
    same = note.is_file() and note.read_text() == plan_digest
    if published(out):
        if same:
            return True
        remove(partial)
        raise ConversionError(f"{out} exists and is complete; --overwrite replaces it, or name another folder")
    checkpoint = partial / "checkpoint"
    if same and checkpoint.is_dir() and _publishing(partial) in (None, checkpoint.stat().st_ino):
        return True
    if note.is_file():
        logger.warning("%s was left by a run with another source, option or release: starting over", partial)
    note.unlink(missing_ok=True)  # first: from here on, nothing that is left can be continued
    for name in ("checkpoint", "journal"):
        if (partial / name).exists():
            shutil.rmtree(partial / name)
    (partial / "journal").mkdir()
    (partial / "checkpoint").mkdir()
    return False


def _hold(partial: Path) -> None:
    """Takes the lock on OUT.partial, creating the folder. Nothing in it may be touched before."""
    while True:
        if partial.is_symlink():
            raise ConversionError(f"{partial} is a symbolic link, and was not left by this converter; move it away")
        partial.mkdir(parents=True, exist_ok=True)
        if {path.name for path in partial.iterdir()} - _PARTS:
            raise ConversionError(f"{partial} exists and was not left by this converter; move it away")
        path = partial / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another process has just finished and removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise ConversionError(f"another process is writing {partial} at this moment; wait for it") from error
            return  # a filesystem without locks
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                _held[partial] = descriptor
                return
        except FileNotFoundError:
            pass
        os.close(descriptor)


_held: dict[Path, int] = {}


def find_layout(out: Path, targets: Sequence[TargetFile], plan_digest: str) -> dict[TensorRef, int]:
    """What `lay_out` returned to rank 0, on another rank; a network filesystem may show the files a little late."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    partial = partial_folder(out)
    while True:
        try:
            if (partial / "journal" / "digest").read_text() == plan_digest:
                offsets = lay_out(out, targets, plan_digest, resume=True)
                root = out if published(out) else partial / "checkpoint"
                for target in targets:
                    os.close(os.open(root / target.file, os.O_RDONLY))
                return offsets
        except (OSError, ConversionError) as error:
            logger.debug("%s is not to be seen yet: %s", partial, error)
        if time.monotonic() > deadline:
            raise ConversionError(
                f"{partial.absolute()}, which rank 0 has made, is not to be seen here; the output must be on a "
                "filesystem that all nodes share"
            )
        time.sleep(0.5)


def lock(out: Path) -> int:
    """The descriptor by which `prepare` holds OUT.partial (-1 where there are no locks); to be closed."""
    return _held.pop(partial_folder(out), -1)


def lay_out(out: Path, targets: Sequence[TargetFile], plan_digest: str, resume: bool) -> dict[TensorRef, int]:
    """Creates every file at its final size (or finds them, with `resume`); where each tensor's data begin."""
    root = out if published(out) else partial_folder(out) / "checkpoint"
    offsets: dict[TensorRef, int] = {}
    try:
        for target in targets:
            offsets |= target.create(root, resume)
            if not resume:
                reserve(root / target.file)
    except OSError:
        if not resume:
            remove(partial_folder(out))  # nothing is gained yet, and the disk may be full of it
        raise
    if not resume:
        _sync_all(root, targets)
        note = partial_folder(out) / "journal" / "digest"
        note.write_text(plan_digest)
        sync_path(note)
        sync_path(note.parent)
    return offsets


def _sync_all(root: Path, targets: Sequence[TargetFile]) -> None:
    """Makes the files, and the folders that name them, survive a power cut."""
    for target in targets:
        sync_path(root / target.file)
    folders = {folder for target in targets for folder in Path(target.file).parents}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        sync_path(root / folder)


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
    files: Mapping[str, bytes | Path], last: Mapping[str, bytes], overwrite: bool, manifest_workers: int = 0,
    prove: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """CRCs, small files (`last` ones after all others are on the disk), then the rename that makes OUT appear.

    `manifest_workers` > 0: a manifest of SHA-256 sums is written too, on so many threads. `prove` is called with the
    finished folder just before the rename; should it raise ConversionError, the folder becomes OUT.unverified instead.
    """
    if published(out):
        remove(partial_folder(out))
        return
    root = partial_folder(out) / "checkpoint"
    crcs = combine_crcs(targets, written)
    for target in targets:
        target.finish(root, crcs, offsets)
    _remove_strays(root, {*(target.file for target in targets), *files})
    for name, content in files.items():
        write_file(root / name, content)
    if manifest_workers:
        names = [*(target.file for target in targets), *files]
        write_file(root / MANIFEST, manifest(root, names, last, manifest_workers))
    _sync_all(root, targets)
    for name, text in last.items():
        write_file(root / name, text)
    sync_path(root)
    if prove is not None:
        try:
            prove(root)
        except ConversionError as error:
            raise ConversionError(*error.problems, f"the output is kept as {_set_aside(out)} for inspection") from error
    publish(out, overwrite)


def _set_aside(out: Path) -> Path:
    """Renames what has failed its proof to OUT.unverified, in place of what failed it before."""
    aside = out.with_name(out.name + ".unverified")
    if aside.exists():
        shutil.rmtree(aside)
    (partial_folder(out) / "checkpoint").rename(aside)
    remove(partial_folder(out))
    return aside


def _remove_strays(root: Path, expected: set[str]) -> None:
    """Removes what the finish of an earlier run wrote and this one will not, as a tokenizer file that is gone."""
    for path in root.rglob("*"):
        if not path.is_dir() and path.relative_to(root).as_posix() not in expected:
            path.unlink()


def manifest(root: Path, names: Sequence[str], further: Mapping[str, bytes], workers: int) -> bytes:
    """SHA-256 of files below `root`, and of `further` contents, as sha256sum writes and checks them. Reads the disk."""
    stop = threading.Event()

    def sum_of(name: str) -> str:
        sha, buffer = hashlib.sha256(), memoryview(bytearray(8 << 20))
        with (root / name).open("rb", buffering=0) as file:
            while (count := file.readinto(buffer)) and not stop.is_set():
                sha.update(buffer[:count])
        return sha.hexdigest()

    with ThreadPoolExecutor(workers, thread_name_prefix="checksums") as pool:
        try:
            sums = dict(zip(names, pool.map(sum_of, names), strict=True))
        except BaseException:
            stop.set()
            raise
    sums |= {name: hashlib.sha256(content).hexdigest() for name, content in further.items()}
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def publish(out: Path, overwrite: bool) -> None:
    """Renames the finished `checkpoint` to OUT, and removes what is left of OUT.partial."""
    partial = partial_folder(out)
    finished, note = partial / "checkpoint", partial / "journal" / "publishing"
    note.write_text(str(finished.stat().st_ino))  # by which OUT is known again, should the clean-up be interrupted
    sync_path(note)
    sync_path(note.parent)
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ConversionError(f"{out} has appeared in the meantime; {partial} holds the finished output")
        if not _exchange(finished, out):
            out.rename(partial / "replaced")
            try:
                finished.rename(out)
            except OSError:
                (partial / "replaced").rename(out)
                raise
    else:
        finished.rename(out)
    sync_path(out.absolute().parent)
    remove(partial)


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


def remove(partial: Path) -> None:
    """Removes OUT.partial; what a kill leaves of it is recognised, and never trusted."""
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


def remaining(chunks: Sequence[Chunk], done: Mapping[int, list[Written]]) -> list[tuple[int, Chunk]]:
    return [(number, chunk) for number, chunk in enumerate(chunks) if number not in done]
