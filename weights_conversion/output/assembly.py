"""Lays out every file of an output at its final size, or finds what an earlier run, or rank 0, has laid out."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from weights_conversion.errors import ConversionError
from weights_conversion.files import fileio
from weights_conversion.layouts.placement import TensorRef
from weights_conversion.output import beginning, descriptors, place, space
from weights_conversion.output.journal import VISIBLE_SECONDS
from weights_conversion.output.partial import Partial
from weights_conversion.output.together import together

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


def lay_out(held: Partial, targets: Sequence[TargetFile]) -> dict[TensorRef, int]:
    """Creates every file at its final size; where each tensor's data begin. Nothing is synced yet."""
    offsets: dict[TensorRef, int] = {}
    try:
        for target in targets:
            with named("laying out", held, target), os.fdopen(held.create(target.file), "w+b") as file:
                offsets |= target.create(file)
                file.flush()
                space.reserve(file.fileno())
    except OSError:
        held.remove()  # nothing is gained yet, and the disk may be full of it
        raise
    return offsets


def find_layout(held: Partial, targets: Sequence[TargetFile]) -> dict[TensorRef, int]:
    """What `lay_out` returned, of the files that it made; OSError or ConversionError where one is not to be seen."""
    offsets: dict[TensorRef, int] = {}
    for target in targets:
        with named("opening", held, target), os.fdopen(held.open(target.file, os.O_RDONLY), "rb") as file:
            offsets |= target.find(file)
    return offsets


def named(doing: str, held: Partial, target: TargetFile) -> contextlib.AbstractContextManager[None]:
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
            held = beginning.join(out, run_digest)
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


def folder_syncs(held: Partial, names: Iterable[str]) -> list[Callable[[], None]]:
    """Calls, in any order, that make the names of files (relative to the checkpoint) survive a power cut."""

    def sync(folder: str) -> None:
        with descriptors.shown_as("syncing", held.shown / folder):
            descriptors.sync_folder(folder, held.checkpoint)

    folders = sorted({str(folder) for name in names for folder in Path(name).parents})
    return [functools.partial(sync, folder) for folder in folders]


def sync_layout(held: Partial, targets: Sequence[TargetFile]) -> None:
    """Makes the files as they were laid out, and the folders that name them, survive a power cut."""

    def sync(target: TargetFile) -> None:
        with named("syncing", held, target):
            descriptor = held.open(target.file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                fileio.close_quietly(descriptor)

    files = [functools.partial(sync, target) for target in targets]
    together([*files, *folder_syncs(held, [target.file for target in targets])])
